"""interpolate.py's losses against loops of their formulas, the other scripts' and lightly's; the
duality that the path rests on, as identities between numbers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightly.loss import BarlowTwinsLoss, DCLLoss, NTXentLoss, VICRegLoss
from test_losses import (SHAPES, Sizes, check_half_precision, check_symmetry,
                         check_value_and_gradient, embeddings)

import interpolate
import simclr
import vicreg

VARIANTS = [  # flags of every method, and of every normalisation, blend and coefficient
    *(f"--method {name}" for name in interpolate.PATH),
    *(f"--method {name} --normalize {kind}" for name in ("simclr", "dcl-sq") for kind in "AB"),
    "--method vicreg --sim-coeff 3 --std-coeff 5 --cov-coeff 7",
    "--method vicreg-exp --cov-coeff 3 --temperature 0.4 --std-coeff 2",
    "--method vicreg-ctr --sim-coeff 7 --temperature 0.3",
    "--method spectral --mu 3", "--method barlow --off-diagonal 0.4",
    "--method tcr --eps 0.7 --tcr-coeff 2",
    "--method vicreg --blend simclr --alpha 0.25", "--method vicreg --blend dcl --normalize B", "--method dcl --blend barlow --alpha 0.9"]

def arguments(flags):
    return interpolate.parse_args(flags.split())

def loss_of(flags):
    args = arguments(flags)
    return lambda z1, z2: interpolate.loss_fn(z1, z2, args)[0]

# Loops over numpy's rows, one pair at a time, that share nothing with the script.
def unit(z):
    return np.stack([row / math.sqrt(row @ row) for row in z])

def others(n):
    return [(i, j) for i in range(n) for j in range(n) if i != j]

def vicreg_family_loop(variant, z1, z2, args):
    sim, std, cov = np.mean([(a - b) ** 2 for a, b in zip(z1.flat, z2.flat)]), 0, 0
    for z in (z1, z2):
        z = (z - z.mean(0)).T if variant == "ctr" else z
        columns = [c - c.mean() for c in z.T]
        c = np.array([[a @ b / (len(z) - 1) for b in columns] for a in columns])
        std += np.mean([max(0, 1 - math.sqrt(v + 1e-4)) for v in np.diag(c)]) / 2
        if variant:
            rows = [sum(math.exp(c[i, j] / args.temperature) for j in range(len(c)) if j != i)
                    for i in range(len(c))]
            cov += args.sim_coeff * args.temperature * np.mean(np.log(rows))
        else:
            cov += sum(c[i, j] ** 2 for i, j in others(len(c))) / len(c)
    return args.sim_coeff * sim + args.std_coeff * std + args.cov_coeff * cov

def simclr_family_loop(name, variant, z1, z2, args):
    n, dim = z1.shape
    if args.normalize != "classical":
        z1, z2 = z1 - z1.mean(0), z2 - z2.mean(0)
    if args.normalize == "B":
        z = np.concatenate([unit(z.T).T * math.sqrt(n / dim) for z in (z1, z2)])
    else:
        z = unit(np.concatenate([z1, z2]))
    of = {"": lambda s: s, "abs": abs, "sq": lambda s: s * s}[variant]
    total = 0.0
    for i in range(2 * n):
        positive = (i + n) % (2 * n)
        terms = [math.exp(of(z[i] @ z[j]) / args.temperature) for j in range(2 * n)
                 if j != i and (name == "simclr" or j != positive)]
        total += math.log(sum(terms)) - of(z[i] @ z[positive]) / args.temperature
    return total / (2 * n)

def spectral_loop(z1, z2, args):
    z1, z2 = ([row * min(1, math.sqrt(args.mu / (row @ row))) for row in z] for z in (z1, z2))
    positive = np.mean([a @ b for a, b in zip(z1, z2)])
    negative = np.mean([(z1[i] @ z2[j]) ** 2 for i, j in others(len(z1))])
    return 5 * (negative - 2 * positive) / args.mu

def barlow_loop(z1, z2, args):
    n, dim = z1.shape
    a, b = ([(c - c.mean()) / math.sqrt(c.var() + 1e-5) for c in z.T] for z in (z1, z2))
    total = sum((1 - a[i] @ b[i] / n) ** 2 for i in range(dim))
    total += args.off_diagonal * sum((a[i] @ b[j] / n) ** 2 for i, j in others(dim))
    return 3 / dim * total

def tcr_loop(z1, z2, args):
    n, dim = z1.shape
    z1, z2, scale = unit(z1), unit(z2), dim / (n * args.eps)
    rates = [np.linalg.slogdet(np.eye(dim) + scale * z.T @ z)[1] / 2 for z in (z1, z2)]
    cosine = np.mean([a @ b for a, b in zip(z1, z2)])
    return 30 * (args.tcr_coeff * (1 - cosine) - np.mean(rates) / n)

def loop_of(flags):
    args = arguments(flags)
    def loop(method, z1, z2):
        name, _, variant = method.partition("-")
        if name == "vicreg":
            return vicreg_family_loop(variant, z1, z2, args)
        if name in ("simclr", "dcl"):
            return simclr_family_loop(name, variant, z1, z2, args)
        return {"spectral": spectral_loop, "barlow": barlow_loop, "tcr": tcr_loop}[name](
            z1, z2, args)
    def whole(z1, z2):
        z1, z2 = z1.numpy(), z2.numpy()
        value, alpha = loop(args.method, z1, z2), args.alpha
        return (1 - alpha) * value + alpha * loop(args.blend, z1, z2) if args.blend else value
    return whole

@pytest.mark.parametrize("flags", VARIANTS)
def test_equals_the_loop(flags):
    interpolate.build_head(8, arguments(flags))  # is not refused
    for shape in SHAPES:
        check_value_and_gradient(loss_of(flags), loop_of(flags), shape, rel=1e-10)
    check_symmetry(loss_of(flags))
    for dtype in (torch.float16, torch.bfloat16):
        check_half_precision(loss_of(flags), dtype)

@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (128, 1024)], ids=str)
@pytest.mark.parametrize("flags, theirs", [
    ("--method vicreg", lambda a, b: vicreg.vicreg_loss(a, b)[0]),
    ("--method simclr --temperature 0.5", simclr.nt_xent),
    ("--method dcl --blend vicreg --alpha 1", lambda a, b: vicreg.vicreg_loss(a, b)[0]),
    ("--method simclr --temperature 0.5 --blend tcr --alpha 0", simclr.nt_xent)])
def test_ends_of_the_path_to_the_bit(shape, flags, theirs):
    """They are the other scripts' losses, value and gradient; so are the ends of a blend."""
    leaves = [z.requires_grad_() for z in embeddings(*shape, dtype=torch.float32)]
    values = loss_of(flags)(*leaves), theirs(*leaves)
    assert torch.equal(*values)
    gradients = [torch.autograd.grad(value, leaves) for value in values]
    assert all(torch.equal(a, b) for a, b in zip(*gradients))

def test_blend_reports_both_losses():
    z1, z2 = embeddings(8, 12)
    loss, parts = interpolate.loss_fn(z1, z2, arguments("--method vicreg --blend dcl --alpha 0.3"))
    assert list(parts) == ["sim", "std", "cov", "vicreg", "dcl"]
    torch.testing.assert_close(loss, 0.7 * parts["vicreg"] + 0.3 * parts["dcl"])

@pytest.mark.parametrize("method", ["byol", "byol-sq", "vicreg-foo", "simclr-foo", "dcl-exp"])
def test_a_name_without_a_loss_is_an_error(method):
    with pytest.raises(KeyError):
        interpolate.method_loss(method, *embeddings(8, 12), arguments("--method vicreg"))

@pytest.mark.parametrize("shape", [(32, 16), (16, 48)], ids=str)
def test_equals_lightly(shape):
    z1, z2 = embeddings(*shape, dtype=torch.float32)
    for mine, theirs in (
            (simclr.nt_xent(z1, z2, 0.2), NTXentLoss(temperature=0.2)),
            (interpolate.nt_xent(z1, z2, 0.1, decoupled=True), DCLLoss(temperature=0.1)),
            (interpolate.barlow_loss(z1, z2, 0.0051), BarlowTwinsLoss(lambda_param=0.0051)),
            (vicreg.vicreg_loss(z1, z2)[0], VICRegLoss())):
        torch.testing.assert_close(mine, theirs(z1, z2))

@pytest.mark.parametrize("shape", [(32, 8), (8, 8), (8, 9), (8, 64)], ids=str)
def test_either_side_gives_the_same(shape):
    """Value and gradient of the smaller matrix equal those of the one that the formula names."""
    def barlow(z1, z2):
        a, b = (F.batch_norm(z, None, None, training=True) for z in (z1, z2))
        c = a.T @ b / len(a)
        return (1 - c.diagonal()).square().sum() + 0.002 * off_diagonal_square(c)
    def rate(z, _):
        z, (n, dim) = F.normalize(z, dim=1), z.shape
        return torch.logdet(torch.eye(dim).double() + dim / (n * 0.5) * z.T @ z) / 2
    def spectral(z1, z2):  # as traces of matrices; every row is longer than sqrt(mu)
        n, gram = len(z1), F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).T
        return off_diagonal_square(gram) / (n * (n - 1)) - 2 * gram.trace() / n
    product = interpolate.product_square
    for smaller, plain in (
            (interpolate.barlow_loss, barlow), (lambda a, _: interpolate.coding_rate(a, 0.5), rate),
            (lambda a, b: interpolate.spectral_loss(100 * a, 100 * b), spectral),
            (product, lambda a, b: (a @ b.T).square().sum()),
            (lambda a, b: product(a.T, b.T), lambda a, b: (a.T @ b).square().sum())):
        leaves = [z.requires_grad_() for z in embeddings(*shape)]
        values = smaller(*leaves), plain(*leaves)
        torch.testing.assert_close(*values, rtol=1e-11, atol=0)
        gradients = (torch.autograd.grad(v, leaves, materialize_grads=True) for v in values)
        torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)

def test_spectral_of_zeros_has_a_gradient():
    zero = torch.zeros(6, 4).requires_grad_()
    interpolate.spectral_loss(zero, torch.ones(6, 4)).backward()
    assert zero.grad.isfinite().all() and (zero.grad != 0).any()

@pytest.mark.parametrize("shape", [(16, 512), (512, 16)], ids=str)
@pytest.mark.parametrize("method", ["vicreg", "spectral", "barlow", "tcr"])
def test_only_the_smaller_side_is_built(method, shape):
    """The largest tensor, forward and backward, is N x D, never the larger of N x N and D x D."""
    z1, z2 = (z.requires_grad_() for z in embeddings(*shape, dtype=torch.float32))
    with Sizes() as seen:
        loss_of(f"--method {method}")(z1, z2).backward()
    assert max(seen.sizes) == 16 * 512

# The duality: K = Z^T, (D, N) in the paper.
def off_diagonal_square(matrix):
    return (matrix - torch.diag(matrix.diagonal())).square().sum()

def sample_contrastive(z):
    """L_c, Definition 3.2; of the transpose L_nc."""
    return off_diagonal_square(z @ z.T)

def fourth_powers(z, dim):
    return z.square().sum(dim).square().sum()

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Embeddings (40, 32) in float64 of a short run's test images, not centred."""
    out = tmp_path_factory.mktemp("trained") / "run"
    data = *interpolate.draw_shapes(80, 3, 16), *interpolate.draw_shapes(40, 4, 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpolate, "load_data", lambda args: ([*"abcdefghij"], *data))
        interpolate.main(f"--data shapes --method vicreg-ctr --dim 32 --hidden 32 --batch-size 20 "
                         f"--epochs 3 --out {out}".split())
    return torch.load(out / "embeddings.pt", weights_only=True)["z"].double()

@pytest.fixture(params=["tall", "wide", "trained"])
def z(request):
    if request.param == "trained":
        return request.getfixturevalue("trained")
    return embeddings(*{"tall": (40, 12), "wide": (12, 40)}[request.param])[1]

def test_theorem_and_its_corollary(z):
    """Theorem 3.3: L_nc and L_c differ by the fourth powers of the rows' and columns' norms.
    Corollary 3.4.1, of z and of its transpose: L_nc - N + N^2/D <= L_c <= L_nc - N + N^2 with unit
    rows, equal at the two collapses."""
    torch.testing.assert_close(sample_contrastive(z.T) + fourth_powers(z, 0),
                               sample_contrastive(z) + fourth_powers(z, 1), rtol=1e-12, atol=0)
    assert not torch.isclose(sample_contrastive(z.T), sample_contrastive(z))
    def bounds(z):
        (n, dim), base = z.shape, sample_contrastive(z.T) - len(z)
        return torch.stack([base + n * n / dim, sample_contrastive(z), base + n * n])
    for x in (z, z.T):
        low, value, high = bounds(F.normalize(x, dim=1))
        assert low < value < high
        torch.testing.assert_close(*bounds(torch.full_like(x, x.shape[1] ** -0.5))[:2])
        torch.testing.assert_close(*bounds(torch.eye(x.shape[1]).to(x)[:1].expand(x.shape))[1:])

def test_vicreg_is_sample_contrastive_in_disguise(z):
    """Equations 8 to 10: L_c of the centred embeddings and norm terms have VICReg's gradient."""
    z = z.clone().requires_grad_()
    c = z - z.mean(dim=0)
    criterion = sample_contrastive(c) + fourth_powers(c, 1) - fourth_powers(c, 0)
    mine, = torch.autograd.grad(criterion / (len(z) - 1) ** 2 / z.shape[1], z)
    assert mine.abs().max() > 0
    theirs, = torch.autograd.grad(interpolate.covariance(z), z)
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-12)

def test_ctr_is_exp_of_the_transpose():
    """VICReg-ctr's regularisers of z are VICReg-exp's of z^T, once z is centred over the batch."""
    z1, z2 = (z - z.mean(dim=0) for z in embeddings(10, 24))
    args = arguments("--method vicreg-ctr --sim-coeff 0.01 --cov-coeff 250")
    ctr, exp = (interpolate.method_loss(f"vicreg-{name}", *z, args)[0]
                for name, z in (("ctr", (z1, z2)), ("exp", (z1.T, z2.T))))
    torch.testing.assert_close(ctr, exp)

def test_list(capsys):
    with pytest.raises(SystemExit) as stop:
        interpolate.main(["--list"])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert stop.value.code == 0 and len(lines) == len(interpolate.PATH)
    for name, line in zip(interpolate.PATH, lines):
        assert line.startswith(f"{name} ") and ("sample" in line or "dimension" in line)

def test_tcr_without_a_determinant_is_nan():
    """Rounding can make the matrix indefinite: NaN, which ends a run with a line, no traceback."""
    z = torch.ones(64, 200) + 1e-9
    assert interpolate.tcr_loss(z * torch.linspace(1, 2, 64)[:, None], z, eps=1e-12).isnan()
