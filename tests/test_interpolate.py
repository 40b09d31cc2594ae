"""interpolate.py's losses against loops of their formulas, the other scripts' and lightly's; the
duality that the path rests on, as identities between numbers."""

import inspect
import math

import pytest
import torch
from lightly.loss import BarlowTwinsLoss, DCLLoss, NTXentLoss, VICRegLoss
from test_losses import SHAPES, Largest, embeddings

import interpolate
import simclr
import vicreg

METHODS = list(interpolate.VARIANTS)
VARIANTS = [  # flags of every method, and of every normalisation, blend and coefficient
    *(("--method", name) for name in METHODS),
    *(("--method", name, "--normalize", kind) for name in ("simclr", "dcl-sq") for kind in "AB"),
    ("--method", "vicreg-exp", "--cov-coeff", "3", "--temperature", "0.4", "--std-coeff", "2"),
    ("--method", "vicreg-ctr", "--sim-coeff", "7", "--temperature", "0.3"),
    ("--method", "spectral", "--mu", "3"),
    ("--method", "barlow", "--off-diagonal", "0.4"),
    ("--method", "tcr", "--eps", "0.7", "--tcr-coeff", "2"),
    ("--method", "vicreg", "--blend", "simclr", "--alpha", "0.25"),
    ("--method", "dcl", "--blend", "barlow", "--alpha", "0.9"),
]


def arguments(*flags):
    return interpolate.parse_args([*flags])


def loss_of(flags):
    args = arguments(*flags)
    return lambda z1, z2: interpolate.loss_fn(z1, z2, args)[0]


# Loops over lists of floats, one entry at a time, that share nothing with the script.
def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def unit(row):
    return [x / math.sqrt(dot(row, row)) for x in row]


def transposed(z):
    return [list(column) for column in zip(*z)]


def centred(z):
    """Each column less its mean."""
    return transposed([[x - sum(c) / len(c) for x in c] for c in transposed(z)])


def variance_loop(z):
    """Mean over the columns of the hinge on their deviation."""
    columns = transposed(centred(z))
    return sum(max(0, 1 - math.sqrt(dot(c, c) / (len(z) - 1) + 1e-4)) for c in columns) / len(z[0])


def covariance_loop(z):
    columns = transposed(centred(z))
    return [[dot(a, b) / (len(z) - 1) for b in columns] for a in columns]


def squares_loop(matrix):
    """Sum of the squared off-diagonal entries, over the side."""
    side = range(len(matrix))
    return sum(matrix[i][j] ** 2 for i in side for j in side if i != j) / len(matrix)


def exp_loop(matrix, t):
    """Mean over the rows of log sum exp of the off-diagonal entries."""
    side = range(len(matrix))
    return sum(math.log(sum(math.exp(matrix[i][j] / t) for j in side if j != i))
               for i in side) / len(matrix)


def vicreg_family_loop(variant, z1, z2, args):
    n, dim = len(z1), len(z1[0])
    sim = sum((a - b) ** 2 for r, s in zip(z1, z2) for a, b in zip(r, s)) / (n * dim)
    c = args.cov_coeff
    if variant == "ctr":
        z1, z2 = transposed(centred(z1)), transposed(centred(z2))
    if variant:
        c = args.sim_coeff * args.temperature if c is None else c
        cov = sum(exp_loop(covariance_loop(z), args.temperature) for z in (z1, z2))
    else:
        c = 1.0 if c is None else c
        cov = sum(squares_loop(covariance_loop(z)) for z in (z1, z2))
    std = (variance_loop(z1) + variance_loop(z2)) / 2
    return args.sim_coeff * sim + args.std_coeff * std + c * cov


def simclr_family_loop(name, variant, z1, z2, args):
    n, dim = len(z1), len(z1[0])
    if args.normalize != "classical":
        z1, z2 = centred(z1), centred(z2)
    if args.normalize == "B":
        z1, z2 = (transposed([[x * math.sqrt(n / dim) for x in unit(column)]
                              for column in transposed(z)]) for z in (z1, z2))
        z = z1 + z2
    else:
        z = [unit(row) for row in z1 + z2]
    of = {"": lambda s: s, "abs": abs, "sq": lambda s: s * s}[variant]
    total = 0.0
    for i in range(2 * n):
        positive = (i + n) % (2 * n)
        others = [j for j in range(2 * n) if j != i and (name == "simclr" or j != positive)]
        total += math.log(sum(math.exp(of(dot(z[i], z[j])) / args.temperature) for j in others))
        total -= of(dot(z[i], z[positive])) / args.temperature
    return total / (2 * n)


def spectral_loop(z1, z2, mu):
    z1, z2 = ([[x * min(1, math.sqrt(mu / dot(r, r))) for x in r] for r in z] for z in (z1, z2))
    n = len(z1)
    positive = sum(dot(a, b) for a, b in zip(z1, z2)) / n
    negative = [dot(z1[i], z2[j]) ** 2 for i in range(n) for j in range(n) if i != j]
    return (-2 * positive + sum(negative) / len(negative)) / mu


def barlow_loop(z1, z2, weight):
    a, b = ([[x / math.sqrt(dot(c, c) / len(z1) + 1e-5) for x in c] for c in transposed(centred(z))]
            for z in (z1, z2))
    total = 0.0
    for i in range(len(a)):
        for j in range(len(b)):
            c = dot(a[i], b[j]) / len(z1)
            total += (1 - c) ** 2 if i == j else weight * c**2
    return total


def tcr_loop(z1, z2, coeff, eps):
    n, dim = len(z1), len(z1[0])
    z1, z2 = [unit(r) for r in z1], [unit(r) for r in z2]
    rate = 0.0
    for z in (z1, z2):
        second = torch.tensor([[dot(a, b) for b in transposed(z)] for a in transposed(z)],
                              dtype=torch.float64)
        rate += torch.linalg.slogdet(torch.eye(dim).double() + dim / (n * eps) * second)[1] / 4
    cosine = sum(dot(a, b) for a, b in zip(z1, z2)) / n
    return coeff * (1 - cosine) - float(rate) / n


def loop_of(flags):
    args = arguments(*flags)

    def loop(method, z1, z2):
        name, _, variant = method.partition("-")
        if name == "vicreg":
            return vicreg_family_loop(variant, z1, z2, args)
        if name in ("simclr", "dcl"):
            return simclr_family_loop(name, variant, z1, z2, args)
        if name == "spectral":
            return 5 * spectral_loop(z1, z2, args.mu)
        if name == "barlow":
            return 3 / len(z1[0]) * barlow_loop(z1, z2, args.off_diagonal)
        return 30 * tcr_loop(z1, z2, args.tcr_coeff, args.eps)

    def whole(z1, z2):
        z1, z2 = z1.tolist(), z2.tolist()
        value = loop(args.method, z1, z2)
        if args.blend:
            value = (1 - args.alpha) * value + args.alpha * loop(args.blend, z1, z2)
        return value

    return whole


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("flags", VARIANTS, ids=" ".join)
def test_equals_the_loop(flags, shape):
    z1, z2 = (0.6 * z for z in embeddings(*shape))  # standard deviations on both sides of the hinge
    assert loss_of(flags)(z1, z2).item() == pytest.approx(loop_of(flags)(z1, z2), rel=1e-10)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("flags", VARIANTS, ids=" ".join)
def test_gradient(flags, shape):
    z1, z2 = (0.6 * z for z in embeddings(*shape, seed=1))
    assert torch.autograd.gradcheck(loss_of(flags), (z1.requires_grad_(), z2.requires_grad_()))


@pytest.mark.parametrize("flags", VARIANTS, ids=" ".join)
def test_views_swap_and_images_permute(flags):
    loss = loss_of(flags)
    z1, z2 = embeddings(8, 12)
    value = loss(z1, z2)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(order, torch.arange(8))
    torch.testing.assert_close(loss(z2, z1), value)
    torch.testing.assert_close(loss(z1[order], z2[order]), value)
    assert not torch.isclose(loss(z1[order], z2), value)  # positives matter


@pytest.mark.parametrize("flags", VARIANTS, ids=" ".join)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised(flags, dtype):
    z1, z2 = (z.to(dtype) for z in embeddings(32, 64))
    loss = loss_of(flags)(z1, z2)
    assert loss.dtype == torch.float32 and loss.isfinite()
    torch.testing.assert_close(loss, loss_of(flags)(z1.float(), z2.float()))


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (128, 1024)], ids=str)
def test_vicreg_and_simclr_to_the_bit(shape):
    """The ends of the path are the other scripts' losses, value and gradient."""
    pairs = [
        (("--method", "vicreg"), lambda a, b: vicreg.vicreg_loss(a, b)[0]),
        (("--method", "simclr", "--temperature", "0.5"), lambda a, b: simclr.nt_xent(a, b, 0.5))]
    for flags, theirs in pairs:
        leaves = [[z.requires_grad_() for z in embeddings(*shape, dtype=torch.float32)]
                  for _ in range(2)]
        mine, other = loss_of(flags)(*leaves[0]), theirs(*leaves[1])
        mine.backward()
        other.backward()
        assert torch.equal(mine, other)
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(*leaves))


@pytest.mark.parametrize("name", ["variance", "covariance", "build_head"])
def test_pieces_are_vicregs_own(name):
    """What the scripts have in common is the same text, but for the check of flags."""
    mine, theirs = (inspect.getsource(getattr(s, name)) for s in (interpolate, vicreg))
    assert mine.replace("    check_flags(args)\n", "") == theirs
    if name == "build_head":
        assert inspect.getsource(simclr.build_head) == theirs and mine != theirs


@pytest.mark.parametrize("shape", [(32, 16), (16, 48)], ids=str)
def test_equals_lightly(shape):
    z1, z2 = embeddings(*shape, dtype=torch.float32)

    def check(mine, theirs):
        torch.testing.assert_close(mine, theirs(z1, z2))

    check(interpolate.nt_xent(z1, z2, 0.2), NTXentLoss(temperature=0.2))
    check(interpolate.nt_xent(z1, z2, 0.1, decoupled=True), DCLLoss(temperature=0.1))
    check(interpolate.barlow_loss(z1, z2, 0.0051), BarlowTwinsLoss(lambda_param=0.0051))
    check(interpolate.vicreg_loss(z1, z2)[0], VICRegLoss())


@pytest.mark.parametrize("shape", [(32, 8), (8, 8), (8, 32)], ids=str)
def test_spectral_closed_form(shape):
    """As traces of matrices: -2 tr(Z Z') / N + (|Z Z'^T|^2 - its diagonal) / N (N - 1)."""
    z1, z2 = (0.1 * z for z in embeddings(*shape))  # all norms below sqrt(mu)
    n, gram = len(z1), z1 @ z2.T
    assert z1.norm(dim=1).max() < 1 and z2.norm(dim=1).max() < 1
    expected = -2 * gram.trace() / n + (gram.square().sum() - gram.diagonal().square().sum()) / (
        n * (n - 1))
    torch.testing.assert_close(interpolate.spectral_loss(z1, z2), expected)
    long = interpolate.spectral_loss(100 * z1, 100 * z2)  # clipped: unit norms
    torch.testing.assert_close(long, interpolate.spectral_loss(1e4 * z1, 1e4 * z2))
    zero = torch.zeros(shape).double().requires_grad_()
    interpolate.spectral_loss(zero, z2).backward()
    assert zero.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(32, 8), (8, 8), (8, 9), (8, 64)], ids=str)
def test_either_side_gives_the_same(shape):
    """Value and gradient of the smaller matrix equal those of the one that the formula names."""
    def both(smaller, plain):
        a, b = ([z.requires_grad_() for z in embeddings(*shape)] for _ in range(2))
        values = smaller(*a), plain(*b)
        for value in values:
            value.backward()
        torch.testing.assert_close(*values, rtol=1e-11, atol=0)
        for x, y in zip(a, b):
            if y.grad is not None:
                torch.testing.assert_close(x.grad, y.grad, rtol=1e-8, atol=1e-10)

    def barlow(z1, z2):
        a, b = (torch.nn.functional.batch_norm(z, None, None, training=True) for z in (z1, z2))
        c = a.T @ b / len(a)
        off = c - torch.diag(c.diagonal())
        return (1 - c.diagonal()).square().sum() + 0.002 * off.square().sum()

    def rate(z1, _):
        z = torch.nn.functional.normalize(z1, dim=1)
        n, dim = z.shape
        return torch.logdet(torch.eye(dim).double() + dim / (n * 0.5) * z.T @ z) / 2

    both(interpolate.barlow_loss, barlow)
    both(lambda a, _: interpolate.coding_rate(a, 0.5), rate)
    both(interpolate.product_square, lambda a, b: (a @ b.T).square().sum())
    both(lambda a, b: interpolate.product_square(a.T, b.T), lambda a, b: (a.T @ b).square().sum())


@pytest.mark.parametrize("shape", [(16, 512), (512, 16)], ids=str)
@pytest.mark.parametrize("method", ["vicreg", "spectral", "barlow", "tcr"])
def test_only_the_smaller_side_is_built(method, shape):
    """The largest tensor, forward and backward, is N x D, never the larger of N x N and D x D."""
    z1, z2 = (z.requires_grad_() for z in embeddings(*shape, dtype=torch.float32))
    with Largest() as largest:
        loss_of(("--method", method))(z1, z2).backward()
    assert 0 < largest.numel <= 16 * 512


# The duality: K = Z^T, (D, N) in the paper.
def off_diagonal_square(matrix):
    return (matrix - torch.diag(matrix.diagonal())).square().sum()


def sample_contrastive(z):
    """L_c, Definition 3.2."""
    return off_diagonal_square(z @ z.T)


def dimension_contrastive(z):
    """L_nc, Definition 3.2."""
    return off_diagonal_square(z.T @ z)


def fourth_powers(z, dim):
    return z.square().sum(dim).square().sum()


@pytest.fixture(scope="module")
def trained(image_folder, tmp_path_factory):
    """Embeddings (40, 32) in float64 of a short run's test images, not centred, and its run."""
    out = tmp_path_factory.mktemp("trained") / "run"
    flags = ["--data", str(image_folder), "--method", "vicreg-ctr", "--arch", "convnet", "--dim",
             "32", "--hidden", "32", "--batch-size", "20", "--epochs", "3", "--out", str(out)]
    interpolate.main(flags)
    args = interpolate.parse_args(["--resume", str(out)])
    model, saved = interpolate.Model(args, 16, 10), interpolate.load_checkpoint(out)
    for part in ("backbone", "head"):
        getattr(model, part).load_state_dict(saved[part])
    images = interpolate.load_data(args).test_images
    features = interpolate.extract_features(model.backbone, [images], len(images))
    with torch.no_grad():
        return model.head.eval()(features).double()


@pytest.fixture(params=["tall", "wide", "trained"])
def z(request):
    if request.param == "trained":
        return request.getfixturevalue("trained")
    return embeddings(*{"tall": (40, 12), "wide": (12, 40)}[request.param])[1]


def test_theorem(z):
    """Theorem 3.3: L_nc and L_c differ by the fourth powers of the rows' and columns' norms."""
    left = dimension_contrastive(z) + fourth_powers(z, 0)
    right = sample_contrastive(z) + fourth_powers(z, 1)
    torch.testing.assert_close(left, right, rtol=1e-12, atol=0)
    assert not torch.isclose(dimension_contrastive(z), sample_contrastive(z))


def test_corollary_for_embeddings_of_unit_norm(z):
    """Corollary 3.4.1: L_nc - N + N^2/D <= L_c <= L_nc - N + N^2; equality at the two collapses."""
    def bounds(z):
        n, dim = z.shape
        base = dimension_contrastive(z) - n
        return base + n * n / dim, sample_contrastive(z), base + n * n

    low, value, high = bounds(torch.nn.functional.normalize(z, dim=1))
    assert low < value < high
    constant = torch.full_like(z, z.shape[1] ** -0.5)
    torch.testing.assert_close(*bounds(constant)[:2])
    one = torch.zeros_like(z)
    one[:, 0] = 1
    torch.testing.assert_close(*bounds(one)[1:])


def test_corollary_for_dimensions_of_unit_norm(z):
    """The same of the transpose: L_c - D + D^2/N <= L_nc <= L_c - D + D^2."""
    z = torch.nn.functional.normalize(z, dim=0)
    n, dim = z.shape
    base, value = sample_contrastive(z) - dim, dimension_contrastive(z)
    assert base + dim * dim / n < value < base + dim * dim


def test_vicreg_is_sample_contrastive_in_disguise(z):
    """Equations 8 to 10: L_c of the centred embeddings and norm terms have VICReg's gradient."""
    def disguised(z):
        c = z - z.mean(dim=0)
        criterion = sample_contrastive(c) + fourth_powers(c, 1) - fourth_powers(c, 0)
        return criterion / (len(z) - 1) ** 2 / z.shape[1]

    mine, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    disguised(mine).backward()
    interpolate.covariance(theirs).backward()
    assert mine.grad.abs().max() > 0
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-8, atol=1e-12)


def test_ctr_is_exp_of_the_transpose():
    """VICReg-ctr's regulariser of z is VICReg-exp's of z^T, once z is centred over the batch."""
    z1, z2 = (z - z.mean(dim=0) for z in embeddings(10, 24))
    args = arguments("--method", "vicreg-ctr", "--sim-coeff", "0", "--cov-coeff", "2.5")
    ctr = interpolate.method_loss("vicreg-ctr", z1, z2, args)[0]
    torch.testing.assert_close(ctr, interpolate.method_loss("vicreg-exp", z1.T, z2.T, args)[0])


def test_list(capsys):
    with pytest.raises(SystemExit) as stop:
        interpolate.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0 and len(lines) == 1 + len(METHODS)
    for name, line in zip(METHODS, lines[1:]):
        assert line.startswith(f"{name} ") and ("sample" in line or "dimension" in line)


@pytest.mark.parametrize("flags, message", [
    (("--method", "byol"), "invalid choice: 'byol' (choose from"),
    (("--blend", "byol"), "invalid choice: 'byol' (choose from"),
    (("--head", "slice"), "invalid choice: 'slice' (choose from"),
    (("--blend", "simclr"), "--alpha"),
    (("--alpha", "0.5"), "--blend"),
    (("--blend", "simclr", "--alpha", "1.5"), "at most 1"),
    (("--blend", "simclr", "--alpha", "-0.1"), "at least 0"),
    (("--method", "vicreg", "--normalize", "A"), "simclr and dcl"),
    (("--temperature", "0"), "above 0"),
    (("--method", "vicreg-exp", "--dim", "1"), "--dim"),
])
def test_refuses(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        interpolate.build_head(24, interpolate.parse_args([*flags]))
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and message in errors and errors.count("\n") == 1


def test_tcr_without_a_determinant_is_nan():
    """Rounding can make the matrix indefinite: NaN, which ends a run with a line, no traceback."""
    z = torch.ones(64, 200) + 1e-9
    loss = interpolate.tcr_loss(z * torch.linspace(1, 2, 64)[:, None], z, eps=1e-12)
    assert loss.isnan()
