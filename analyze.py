"""Look inside embeddings: their spectra and the duality in numbers; and the toy experiments.

Reads run folders of simclr.py, vicreg.py, directclr.py and interpolate.py, of which it needs no
more than embeddings.pt, and .npy, .npz or .pt files of embeddings (n, D) made by anything else;
several side by side. In a run it looks at the representation h = f(x) and the embedding z = g(h)
of test images, in a file at every floating array (n, D), under its key:

    spectrum   singular values of the covariance matrix, how many have collapsed to nearly zero
    duality    L_c = sum_{i != j} <z_i, z_j>^2 over images, L_nc the same over dimensions, of rows
               of norm 1; residual of L_nc + sum_j |z_.j|^4 = L_c + sum_i |z_i|^4; to_lower, sum_j
               |z_.j|^4 over its least value n^2 / D (_nc: columns for rows); std_sqrt_D of cosines,
               1 for random directions; gram, covariance: mean diagonal over mean of the rest
    compare    accuracies, ranks and both criteria of many runs as one table
    toy        collapse in linear networks: by strong augmentation, mode by mode, by depth

Garrido, Chen, Bardes, Najman, LeCun, On the duality between contrastive and non-contrastive
    self-supervised learning, ICLR 2023
Jing, Vincent, LeCun, Tian, Understanding dimensional collapse in contrastive self-supervised
    learning, ICLR 2022

Run     python analyze.py runs/vicreg-shapes runs/simclr-shapes     the first three
        python analyze.py compare runs/interpolate-all-shapes       a folder of runs
        python analyze.py spectrum mine.npy                         embeddings of your own
Copy    spectrum, duality, effective_rank, participation_ratio, collapsed, with what they call
Leaves  runs/analysis/NAME.json and NAME.md, NAME.svg too where matplotlib is installed
"""

# ==== 1. Imports [own] ============================================================================
import argparse
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

# ==== 2. Measures [own] ===========================================================================
# Of embeddings z (n, D) on the CPU, one row an image, half to double precision. Sums are in float64
# and in blocks: no matrix is larger than the smaller of n and D, squared.
def row_norms(z):
    """Norms (n,) of the rows of z (n, m), and their inverses, 0 for a row of zeros."""
    norms = torch.cat([part.double().norm(dim=1) for part in z.split(1000)])
    return norms, torch.where(norms > 0, 1 / norms, 0)

def spectrum(z, normalize=True):
    """Singular values (D,) of the covariance matrix of z (n, D), falling; normalize: rows first.

    Normalised rows and 1 / (n - 1) are those of DirectCLR's official spectrum.py; its paper has
    1 / n. Where n < D the centred rows' Gram matrix is taken, whose singular values are the same.
    Values below float64's rounding are 0. ValueError for a single row.
    """
    n, dim = z.shape
    if n < 2:
        raise ValueError(f"a covariance matrix takes at least two rows, not {n}")
    scale = row_norms(z)[1][:, None] if normalize else torch.ones(n, 1, dtype=torch.float64)
    pieces = [slice(i, i + 1000) for i in range(0, max(n, dim), 1000)]
    mean = sum((z[i].double() * scale[i]).sum(dim=0) for i in pieces) / n
    small = torch.zeros(min(n, dim), min(n, dim), dtype=torch.float64)
    for i in pieces:
        if dim <= n:
            part = z[i].double() * scale[i] - mean
        else:
            part = (z[:, i].double() * scale - mean[i]).T
        small.addmm_(part.T, part)
    values = torch.linalg.eigvalsh(small).flip(0) / (n - 1)
    rounding = torch.finfo(values.dtype).eps * (values.sum() + mean.square().sum())
    return torch.nn.functional.pad(values.where(values > rounding, 0), (0, dim - len(values)))

def participation_ratio(values):
    """(sum of values)^2 / sum of values^2 of a spectrum (D,): 1 to D, D where all are equal."""
    return (values.sum() ** 2 / values.double().square().sum().clamp(min=1e-300)).item()

def collapsed(values, threshold=1e-6):
    """How many values of a spectrum (D,) are at most threshold times the largest."""
    return int((values <= threshold * values.max()).sum())

@torch.no_grad()
def effective_rank(x):
    """exp of the entropy of the normalised singular values of x (n, F): RankMe, 1 at collapse.

    They are the roots of the eigenvalues of X^T X or X X^T, the smaller, in float64 on the CPU.
    """
    x = x if len(x) >= x.shape[1] else x.T
    gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for part in x.split(1000):
        part = part.to("cpu", torch.float64)
        gram.addmm_(part.T, part)
    p = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    p = p / p.sum().clamp(min=1e-12)
    return math.exp(-torch.special.xlogy(p, p).sum().item())

def pair_sums(z, functions):
    """Sum over all i != j of f(products, cosines), for each f, of the rows i and j of z (n, m).

    Each f takes two float64 tensors of one shape, inner products and cosines of some pairs, and
    returns their sum, of any shape. The (n, n) matrix is made block by block.
    """
    n, m = z.shape
    inverse = row_norms(z)[1]
    size = max(1, min(1000, 2**25 // m))
    totals = [0.0] * len(functions)
    for i in range(0, n, size):
        a = z[i : i + size].double()
        for j in range(i, n, size):
            products = a @ (a if i == j else z[j : j + size].double()).T
            cosines = products * inverse[i : i + size, None] * inverse[j : j + size]
            if i == j:
                off = ~torch.eye(len(a), dtype=torch.bool)
                products, cosines = products[off], cosines[off]
            weight = 1 if i == j else 2  # the block (j, i) holds the same
            totals = [t + weight * f(products, cosines) for t, f in zip(totals, functions)]
    return totals

def criterion(z):
    """The criterion over pairs of rows of z (n, m), and what surrounds it; a dict.

    criterion: L_c for embeddings, L_nc for their transpose, of z as it is (Garrido et al. 2023,
    Definition 3.2). fourth: sum of the rows' norms to the fourth. dominance: mean |z_i|^2 over mean
    |<z_i, z_j>|. unit: the same criterion with rows of norm 1; dual, the other one then; lower and
    upper, its bounds by dual (Corollary 3.4.1); to_lower: how many times its least value the sum
    that makes them is, 1 where the lower bound holds. Cosines: mean, std, histogram in [-1, 1];
    uniformity, log mean exp(-2 |z_i - z_j|^2) (Wang and Isola 2020). Rows of zeros count as none.
    ValueError for a single row, which has no pairs.
    """
    n, m = z.shape
    if n < 2:
        raise ValueError(f"pairs take at least two images and two dimensions, not {n}")
    norms, inverse = row_norms(z)
    absolute, squares, total, unit, spread, counts = pair_sums(z, [
        lambda p, c: p.abs().sum(), lambda p, c: p.square().sum(), lambda p, c: c.sum(),
        lambda p, c: c.square().sum(), lambda p, c: torch.exp(4 * c - 4).sum(),
        lambda p, c: torch.histc(c.clamp(-1, 1).float(), 200, -1, 1).double()])
    columns = sum((part.double() * scale[:, None]).square().sum(dim=0)
                  for part, scale in zip(z.split(1000), inverse.split(1000)))  # rows of norm 1
    rows, pairs, fourth = int((norms > 0).sum()), n * (n - 1), columns.square().sum()
    dual = unit + rows - fourth  # Theorem 3.3
    mean = total / pairs
    numbers = {
        "criterion": squares, "fourth": norms.pow(4).sum(), "unit": unit, "dual": dual,
        "lower": dual - rows + rows**2 / m, "upper": dual - rows + rows**2,
        "to_lower": fourth * m / max(rows, 1) ** 2,
        "dominance": norms.square().mean() * pairs / absolute.clamp(min=1e-300),
        "mean": mean, "std": (unit / pairs - mean**2).clamp(min=0).sqrt(),
        "uniformity": torch.log(spread / pairs)}
    return {name: float(value) for name, value in numbers.items()} | {"histogram": counts.tolist()}

def duality(z):
    """Both criteria of embeddings z (n, D): "samples" over rows, "dimensions" over columns; a dict.

    residual, of Theorem 3.3: l_nc + sum_j |z_.j|^4 = l_c + sum_i |z_i|^4, relative; each side is
    summed by itself. The theorem wants no centring; centre z before for VICReg's criterion.
    """
    samples, dimensions = criterion(z), criterion(z.T)
    left, right = (part["criterion"] + part["fourth"] for part in (dimensions, samples))
    return {"residual": abs(left - right) / max(right, 1e-300), "samples": samples,
            "dimensions": dimensions}

# ==== 3. Runs and files [own] =====================================================================
SPACES = {"h": "representation", "z": "embedding"}  # of a run, by embeddings.pt's keys
PATH = ("vicreg", "vicreg-exp", "vicreg-ctr", "simclr", "simclr-abs", "simclr-sq", "dcl", "dcl-abs",
        "dcl-sq", "spectral", "barlow", "tcr")  # interpolate.py's order, first in a folder

def fail(message):
    """End the program with one line on what was wrong and exit code 2."""
    print(f"analyze.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)

def find_runs(paths):
    """The files and finished runs among paths, or in folders that they name, {name: path}.

    What is no finished run is skipped with a line. A name is as much of a path as tells it apart.
    """
    found = []
    for path in map(Path, paths):
        inside = [path] if path.is_file() else []
        names = [] if inside else ["", *PATH, *sorted(each.name for each in path.iterdir())]
        for run in (path / name for name in dict.fromkeys(names)):
            if (run / "embeddings.pt").is_file():
                inside.append(run)
            elif (run / "log.jsonl").is_file() and run != path:
                print(f"skipped {run}: not finished, it has no embeddings.pt")
        inside or print(f"skipped {path}: no finished run there, none has embeddings.pt")
        found += [run.resolve() for run in inside]
    found = [*dict.fromkeys(found)] or fail(f"{' '.join(paths)}: no finished run there")
    length = next(k for k in itertools.count(1) if len({p.parts[-k:] for p in found}) == len(found))
    names = ["/".join(path.parts[-length:]) for path in found]
    return {name.encode(errors="backslashreplace").decode(): p for name, p in zip(names, found)}

def read_spaces(path):
    """The floating arrays (n, D) of a .npy, .npz or .pt file as tensors, {name: z}.

    Those of .npy and .pt stay on the disk until they are used. Nothing pickled is ever run.
    """
    spaces, held = {}, []
    try:
        if path.suffix == ".pt":
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        else:
            found = np.load(path, mmap_mode="c", allow_pickle=False)
        found = dict(found) if hasattr(found, "keys") else {"embedding": found}
        names = SPACES if found.keys() >= SPACES.keys() else {}
        for key, x in found.items():
            held.append(f"{key} {getattr(x, 'dtype', type(x))} {[*getattr(x, 'shape', '')]}")
            x = torch.from_numpy(x) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x
            if isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim == 2:
                if not all(part.float().isfinite().all() for part in x.split(1000)):
                    fail(f"{path}: {key} holds NaN, infinity or what is too large for float32")
                if min(x.shape) > 1:
                    spaces[names.get(key, str(key))] = x.detach()
    except Exception as error:  # a damaged or hostile file can raise nearly anything
        fail(f"{path}: damaged, or no .npy, .npz or .pt of plain arrays ({type(error).__name__})")
    if not spaces:
        fail(f"{path}: no floating array (n, D), n and D at least 2, among: {'; '.join(held)}")
    return spaces

def read_log(path):
    """What log.jsonl tells of a run: method, head and the final line's accuracies; {} without."""
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        args = records[0]["args"]
        final = next((record for record in reversed(records) if record.get("final")), {})
        return {"method": args.get("method", records[0]["method"]),
                "head": args.get("head", ""), **final}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except Exception as error:  # the same
        fail(f"{path}: damaged, or not a run's log ({type(error).__name__})")

def examine(name, path, options):
    """Measure a run or a file: a row for each space, a dict of numbers, texts and lists."""
    rows, log = [], read_log(path / "log.jsonl")
    for space, z in read_spaces(path / "embeddings.pt" if path.is_dir() else path).items():
        if options.limit and options.limit < len(z):  # evenly spread: a folder is sorted by class
            z = z[torch.linspace(0, len(z) - 1, options.limit).long()]
        if options.center:
            mean = sum(part.double().sum(dim=0) for part in z.split(1000)) / len(z)
            z = z - mean.to(torch.promote_types(z.dtype, torch.float32))
        values = spectrum(z, not options.raw)
        rows.append({
            "run": name, "space": space, "log": log, "n": len(z), "D": z.shape[1],
            "effective_rank": effective_rank(z), "participation": participation_ratio(values),
            "collapsed": collapsed(values, options.threshold), "singular_values": values.tolist()})
        if options.command != "spectrum":
            rows[-1] |= duality(z)
            rows[-1]["std_sqrt_D"] = rows[-1]["samples"]["std"] * math.sqrt(z.shape[1])
    return rows

# ==== 4. Toy experiments [own] ====================================================================
# DirectCLR's sections 4 and 5: x ~ N(0, I_16), z = W_L ... W_1 x, plain SGD, no normalisation.
# Several settings, R, train at once: weights (R, 16, 16), embeddings (R, N, 16). An experiment
# returns rows, dicts of the same kind: numbers go to its table, lists to its figure.
WIDTH = 16

def toy_logits(z1, z2, loss):
    """Logits (R, N, N) of the toy losses; the positive's are on the diagonal.

    paper: equation 2, -|z_i - z_j|^2 / 2 to the same view's others, -|z_i - z'_i|^2 / 2 to the
    positive. code: the official code's, inner products with the other view over .1.
    """
    if loss == "code":
        return z1 @ z2.mT / 0.1
    half = z1.square().sum(dim=2) / 2  # |z_i|^2 / 2, left out in row i: the softmax is the same
    logits = torch.baddbmm(-half[:, None], z1, z1.mT)
    positive = half - (z1 - z2).square().sum(dim=2) / 2
    return logits.diagonal_scatter(positive, dim1=1, dim2=2)

def toy_loss(z1, z2, loss):
    """Mean over the N images of the toy loss, (R,)."""
    return -toy_logits(z1, z2, loss).log_softmax(dim=2).diagonal(dim1=1, dim2=2).mean(dim=1)

def toy_forward(x, weights, relu=False):
    """z (R, N, 16) of x (N, 16) or (R, N, 16); relu (R, 1, 1): which networks rectify between."""
    for i, weight in enumerate(weights):
        x = x if i == 0 else torch.where(torch.as_tensor(relu), x.relu(), x)
        x = x @ weight.mT
    return x

def toy_init(kind, layers, generator):
    """Weights (layers, 16, 16), float64.

    uniform: within 1/4, PyTorch's default. decaying: U diag(exp(-.35 k)) V, the official code's.
    aligned: decaying, each layer's V the U of the one below, as Theorem 3 supposes.
    """
    shape = (layers, WIDTH, WIDTH) if kind == "uniform" else (layers, 2, WIDTH, WIDTH)
    drawn = torch.rand(shape, generator=generator, dtype=torch.float64)
    if kind == "uniform":
        return drawn / 2 - 1 / 4
    u, v = torch.linalg.svd(drawn)[0].unbind(1)
    if kind == "aligned":
        v = torch.cat([v[:1], u[:-1].mT])
    return u * torch.exp(-0.35 * torch.arange(WIDTH, dtype=torch.float64)) @ v

def toy_train(weights, noise, loss, lr, steps, relu=False, seed=0):
    """Train weights [(R, 16, 16)] * L in place; yield (step, x, x') before each step and at last.

    noise (R, 16): deviation of the augmentation, on x' for the paper's loss, on both views for the
    code's. Batches of 128 of 10,000 fixed samples; x and x' (R, 128, 16) are the step's batch.
    """
    generator, kind = torch.Generator().manual_seed(seed), weights[0].dtype
    samples = torch.randn(10000, WIDTH, generator=generator, dtype=kind)
    for step in range(steps + 1):
        x = samples[torch.randint(10000, (128,), generator=generator)].expand(len(noise), -1, -1)
        e = torch.randn(2, 128, WIDTH, generator=generator, dtype=kind)
        x2 = x + noise[:, None] * e[0]
        if loss == "code":
            x = x + noise[:, None] * e[1]
        yield step, x, x2
        if step < steps:
            leaves = [weight.requires_grad_() for weight in weights]
            z = toy_forward(torch.cat([x, x2], dim=1), leaves, relu)
            gradients = torch.autograd.grad(toy_loss(*z.chunk(2, dim=1), loss).sum(), leaves)
            for weight, gradient in zip(weights, gradients):
                weight.requires_grad_(False).sub_(gradient, alpha=lr)

def toy_x(weights, x1, x2):
    """X = S0 - S1 (R, 16, 16) of Lemma 2, so that equation 2's gradient is G = -W X, W the product.

    S0 = mean_i sum_j a_ij (x_i - x_j)(x_i - x_j)^T, S1 = mean_i (1 - a_ii)(x'_i - x_i)(..)^T with a
    the softmax of the logits.
    """
    a = toy_logits(toy_forward(x1, weights), toy_forward(x2, weights), "paper").softmax(dim=2)
    own = a.diagonal(dim1=1, dim2=2)
    a = a - torch.diag_embed(own)
    to = (a.sum(dim=2) + a.sum(dim=1))[..., None]  # how often x_i is in a pair
    s0 = x1.mT @ (to * x1) - x1.mT @ (a + a.mT) @ x1
    s1 = (x2 - x1).mT @ ((1 - own)[..., None] * (x2 - x1))
    return (s0 - s1) / x1.shape[1]

def log_spectrum(weights, relu=False):
    """Natural logs (R, 16) of the embedding covariance's singular values, on 1,000 samples."""
    x = torch.randn(1000, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z = toy_forward(x, [weight.double() for weight in weights], relu)
    z = z - z.mean(dim=1, keepdim=True)
    return torch.linalg.svdvals(z.mT @ z / 999).clamp(min=1e-300).log()

def toy_networks(loss, lr, layers, settings, quiet, steps, seed):
    """Train a network for each of settings (init, relu, noise), without noise on `quiet` inputs.

    Rows: singular_values of W = W_L .. W_1; log_spectrum of the embedding's covariance; collapsed,
    how many of it are below -8.
    """
    inits, relu, deviations = zip(*settings)
    weights = [toy_init(init, layers, torch.Generator().manual_seed(seed)) for init in inits]
    weights, rectified = [*torch.stack(weights, 1).float()], torch.tensor(relu)[:, None, None]
    noise = torch.tensor(deviations)[:, None] * (torch.arange(WIDTH) >= quiet)
    for _ in toy_train(weights, noise, loss, lr, steps, rectified, seed):
        pass
    product = toy_forward(torch.eye(WIDTH).double(), [weight.double() for weight in weights])
    rows, spectra = [], log_spectrum(weights, rectified).tolist()
    for i, values in enumerate(torch.linalg.svdvals(product.mT).tolist()):
        rows.append({"loss": loss, "layers": layers, "init": inits[i], "relu": relu[i],
                     "noise": deviations[i], "singular_values": values, "log_spectrum": spectra[i],
                     "collapsed": sum(value < -8 for value in spectra[i])})
    return rows

def toy_augmentation(steps, seed):
    """Figure 3: one layer, noise on its last eight inputs; strong noise kills eight dimensions."""
    settings = [("uniform", False, noise) for noise in (0.01, 0.5, 1.0, 1.5, 2.0, 3.0)]
    return [row for loss, lr in (("paper", 1e-2), ("code", 1e-3))
            for row in toy_networks(loss, lr, 1, settings, 8, steps, seed)]

def toy_layers(steps, seed):
    """Figures 5 and 6: two layers, hardly any noise; the singular values over time.

    Rows: w1 (singular values) and log_embedding (the covariance's) over steps; at the end
    alignment |V2^T U1|, balance |W1 W1^T - W2^T W2| / |W1 W1^T|, grown, how many of W1's values are
    above a quarter of the largest, grown_alignment, the mean of their |V2^T U1|_kk. For equation 2
    law, W1's values as Theorem 3 has aligned layers grow, d s1 = s1 s2^2 (v1^T X v1) dt, added up
    along the way that the weights took; off_law, how far they are from it at the end, relatively.
    """
    inits, rows = ("decaying", "uniform", "aligned"), []
    noise = torch.full((len(inits), WIDTH), 1e-3, dtype=torch.float64)
    for loss, lr in (("paper", 0.1), ("code", 0.01)):
        generator = torch.Generator().manual_seed(seed)
        weights = [*torch.stack([toy_init(kind, 2, generator) for kind in inits], dim=1)]
        history, law = [], torch.linalg.svdvals(weights[0])
        for step, x1, x2 in toy_train(weights, noise, loss, lr, steps, seed=seed):
            if step % 100 == 0 or step in (10, 20, 50, steps):
                history.append((step, torch.linalg.svdvals(weights[0]), log_spectrum(weights), law))
            if loss == "paper":
                v1, s2 = torch.linalg.svd(weights[0])[2], torch.linalg.svdvals(weights[1])
                growth = s2**2 * ((v1 @ toy_x(weights, x1, x2)) * v1).sum(dim=2)
                law = law * (1 + lr * growth)
        (u1, s1, _), v2 = torch.linalg.svd(weights[0]), torch.linalg.svd(weights[1])[2]
        first, second = weights[0] @ weights[0].mT, weights[1].mT @ weights[1]
        balance = (first - second).norm(dim=(1, 2)) / first.norm(dim=(1, 2))
        alignment, grown = (v2 @ u1).abs(), s1 > s1[:, :1] / 4
        when, *over = zip(*history)
        w1, embedding, law = (torch.stack(values, dim=1) for values in over)  # (3, times, 16)
        off_law = (law[:, -1] / w1[:, -1] - 1).abs().amax(dim=1)
        for i, init in enumerate(inits):
            rows.append({
                "loss": loss, "init": init, "grown": int(grown[i].sum()), "steps": when,
                "grown_alignment": alignment[i].diagonal()[grown[i]].mean().item(),
                "balance": balance[i].item(), "alignment": alignment[i].tolist(),
                "w1": w1[i].tolist(), "log_embedding": embedding[i].tolist()})
            if loss == "paper":
                rows[-1] |= {"law": law[i].tolist(), "off_law": off_law[i].item()}
    return rows

def toy_depth(steps, seed):
    """Figure 11: one to four layers, linear or with ReLU between; deeper ones collapse further."""
    settings = [(init, relu, 1e-3) for relu in (False, True) for init in ("decaying", "uniform")]
    return [row for loss, lr in (("paper", 0.1), ("code", 0.01)) for layers in (1, 2, 3, 4)
            for row in toy_networks(loss, lr, layers, settings, 0, steps, seed)]

# ==== 5. Tables and figures [own] =================================================================
def compare(rows):
    """A row for each run with those of its spaces, h and z; other arrays count as runs, as z."""
    runs = {}
    for row in rows:
        name = row["run"] if row["space"] in SPACES.values() else f"{row['run']}: {row['space']}"
        part = "h" if row["space"] == SPACES["h"] else "z"
        runs.setdefault(name, {"run": name, "log": row["log"]})[part] = row
    return [*runs.values()]

def lines_spectra(rows, title, label, key, over=None):
    """Logs of row[key], singular values, over row[over] or their index; at 1e-12 what is less."""
    lines = []
    for row in (row for row in rows if key in row):
        y = row[key] if key.startswith("log_") else np.log(np.maximum(row[key], 1e-12))
        x = np.maximum(row[over], 5) if over else np.arange(len(y)) + 1  # a log axis has no step 0
        lines.append((title.format(**row), label.format(**row), x, y))
    return lines

def lines_duality(rows):
    """Densities of the cosines of images, and of dimensions."""
    lines, x = [], np.linspace(-0.995, 0.995, 200)
    for row, side in itertools.product(rows, ("samples", "dimensions")):
        counts = np.array(row[side]["histogram"])
        density = np.where(counts > 0, 100 * counts / max(counts.sum(), 1), np.nan)
        lines.append((f"{row['space']}: pairs of {side}", row["run"], x, density))
    return lines

def lines_layers(rows):
    """Singular values of W1, with Theorem 3's, and of the embedding's covariance over the steps."""
    title = "{loss}'s loss, {init}: "
    return [*lines_spectra(rows, title + "W₁", "trained", "w1", "steps"),
            *lines_spectra(rows, title + "W₁", "by Theorem 3", "law", "steps"),
            *lines_spectra(rows, title + "embedding", "trained", "log_embedding", "steps")]

def draw(path, lines, columns=2, size=(4, 3), **settings):
    """Draw lines, each (title of its panel, label, x, y), into path if matplotlib is here.

    A label looks the same in every panel. size: of a panel, inches; settings: Axes.set()'s.
    """
    try:
        import matplotlib
    except ImportError:
        print(f"no figure {path.name}: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [(*[text.replace("$", r"\$") for text in line[:2]], *line[2:]) for line in lines]
    titles, labels = ([*dict.fromkeys(line[i] for line in lines)] for i in (0, 1))
    columns = min(columns, len(titles))
    across = max(1, int(16 * columns * size[0] / (8 + max(map(len, labels)))))
    rows, below = math.ceil(len(titles) / columns), math.ceil(len(labels) / across)
    with pyplot.rc_context({"font.size": 9, "axes.titlesize": 9, "svg.hashsalt": "0"}):
        figure = pyplot.figure(
            figsize=(size[0] * columns, size[1] * rows + 0.2 * below), layout="constrained")
        panels = {title: figure.add_subplot(rows, columns, i + 1, title=title)
                  for i, title in enumerate(titles)}
        shown = {}
        for title, label, x, y in lines:
            i = labels.index(label)  # colour, dashes and marker: distinct without colour too
            shown[label] = panels[title].plot(
                x, y, color=f"C{i % 10}", linestyle=("-", "--", "-.", ":")[i % 4], linewidth=1.2,
                marker="os^DvxP*<"[i % 9] if np.ndim(y) == 1 else None, markersize=4,
                markevery=(0.03 * (i % 5), 0.15) if len(x) > 20 else 1)[0]
            panels[title].set(**settings)
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=across,
                      fontsize=8, frameon=False)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)
    print(f"wrote {path}")

def table(rows, columns):
    """Rows as Markdown that lines up. columns: the keys, TITLE=KEY.KEY for what is further in."""
    def cell(value, keys):
        for key in keys.split("."):
            value = value[int(key)] if isinstance(value, list) else (value or {}).get(key)
        text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
        return " ".join(text.split()).replace("|", "\\|")

    titles, keys = zip(*[(column.split("=")[0], column.split("=")[-1]) for column in columns])
    cells = [titles, *[[cell(row, key) for key in keys] for row in rows]]
    widths = [max(3, *map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "".join("| " + " | ".join(map(str.rjust, row, widths)) + " |\n" for row in cells)

def publish(name, options, rows):
    """Print rows as a table; leave it as OUT/NAME.md, all they hold as NAME.json, a figure."""
    columns, lines, layout = REPORTS[name]
    text = table(rows, columns.split())
    print(f"\n{name}\n\n{text}")
    record = {"argv": sys.argv, "torch": torch.__version__, "rows": rows}
    for suffix, content in ((".md", text), (".json", json.dumps(record))):
        (options.out / f"{name}{suffix}").write_text(content, encoding="utf-8")
        print(f"wrote {options.out / name}{suffix}")
    if lines:
        draw(options.out / f"{name}.{options.figure}", lines(rows), **layout)

# ==== 6. Commands [own] ===========================================================================
COMMANDS = ("spectrum", "duality", "compare", "toy")
TOYS = {"augmentation": toy_augmentation, "layers": toy_layers, "depth": toy_depth}
OVER_K = {"xlabel": "index k of the singular value", "ylabel": "log σₖ (natural)"}
TO_16 = {**OVER_K, "xticks": (1, 4, 8, 12, 16)}
REPORTS = {  # columns of the table, lines of the figure, its layout
    "spectrum": (
        "run space n D effective_rank participation collapsed s_1=singular_values.0 "
        "s_D=singular_values.-1",
        lambda rows: lines_spectra(rows, "{space}", "{run}", "singular_values"),
        {"xscale": "log", **OVER_K}),
    "duality": (
        "run space D residual L_c=samples.unit L_nc=samples.dual to_lower=samples.to_lower "
        "to_lower_nc=dimensions.to_lower std_sqrt_D gram=samples.dominance "
        "covariance=dimensions.dominance uniformity=samples.uniformity", lines_duality,
        {"xlabel": "cosine", "ylabel": "density", "yscale": "log", "ylim": (1e-3, 50)}),
    "compare": (
        "run method=log.method head=log.head knn=log.knn linear=log.linear online=log.online "
        "rank_h=h.effective_rank rank_z=z.effective_rank collapsed_h=h.collapsed "
        "collapsed_z=z.collapsed L_c=z.samples.unit L_nc=z.samples.dual seconds=log.seconds",
        None, {}),
    "toy-augmentation": (
        "loss noise s_1=singular_values.0 s_8=singular_values.7 s_9=singular_values.8 "
        "s_16=singular_values.15",
        lambda rows: lines_spectra(rows, "{loss}'s loss", "noise {noise}", "singular_values"),
        TO_16),
    "toy-layers": (
        "loss init grown log_s_1=log_embedding.-1.0 log_s_16=log_embedding.-1.15 grown_alignment "
        "balance off_law", lines_layers,
        {"columns": 3, "size": (3, 2.3), "xlabel": "step", "ylabel": "log σₖ", "xscale": "log"}),
    "toy-depth": (
        "loss layers relu init collapsed log_s_1=log_spectrum.0 log_s_16=log_spectrum.15",
        lambda rows: lines_spectra(
            rows, "{loss}'s loss, ReLU {relu}", "L = {layers}, {init}", "log_spectrum"),
        TO_16)}

def parse_args(argv=None):
    """Parse the command line; command is "all" where none was given, what the rest of the words."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="analyze.py [spectrum | duality | compare] RUN ... [flags]\n"
              "       analyze.py toy [augmentation | layers | depth ...] [flags]")
    parser.error = fail
    add = parser.add_argument
    add("what", nargs="+", metavar="RUN",
        help="a run folder, a folder of run folders, or a .npy, .npz or .pt file")
    add("--limit", type=int, default=0, help="images at most, evenly spread (%(default)s: all)")
    add("--center", action="store_true", help="first subtract the mean over the images")
    add("--raw", action="store_true", help="spectra of the rows as they are, not of norm 1")
    add("--threshold", type=float, default=1e-6, help="s_k <= it * s_1 is collapsed (%(default)s)")
    add("--steps", type=int, default=10000, help="toy: of SGD (the official code's %(default)s)")
    add("--seed", type=int, default=0, help="toy: decides every random choice (%(default)s)")
    add("--out", type=Path, default=Path("runs/analysis"), help="folder to write to (%(default)s)")
    add("--figure", choices=("svg", "png"), default="svg", help="format of figures (%(default)s)")
    options = parser.parse_intermixed_args(argv)
    options.command = options.what.pop(0) if options.what[0] in COMMANDS else "all"
    if options.command == "toy" and not {*options.what} <= {*TOYS}:
        fail(f"toy takes {', '.join(TOYS)}")
    if options.command != "toy" and not options.what:
        fail(f"{options.command} takes run folders or files")
    least = min(options.limit, options.seed, options.steps - 1)
    if least < 0 or options.limit == 1 or options.seed >= 2**63:
        fail("--limit takes 0 or at least 2, --steps at least 1, --seed 0 to 2^63 - 1")
    return options

def main(argv=None):
    """Do what the command line asks."""
    options, rows = parse_args(argv), []
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        if options.command == "toy":
            torch.set_num_threads(1)  # more only wait for each other, the matrices are so small
            torch.set_flush_denormal(True)  # or vanishing singular values slow it down
            for name in options.what or TOYS:
                print(f"toy {name}: {options.steps:,} steps, seed {options.seed}", flush=True)
                publish(f"toy-{name}", options, TOYS[name](options.steps, options.seed))
        else:
            for name, path in find_runs(options.what).items():
                print(f"reading {name}", flush=True)
                rows += examine(name, path, options)
            for name in COMMANDS[:3] if options.command == "all" else [options.command]:
                publish(name, options, compare(rows) if name == "compare" else rows)
    except OSError as error:
        fail(error)

if __name__ == "__main__":
    hasattr(sys.stdout, "reconfigure") and sys.stdout.reconfigure(errors="replace")  # odd paths
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
