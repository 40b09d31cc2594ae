"""Each loss against a float64 loop written from its formula, its symmetries, and lightly's."""

import math

import pytest
import torch
from lightly.loss import NTXentLoss, VICRegLoss
from torch.utils._python_dispatch import TorchDispatchMode

import directclr
import interpolate
import simclr
import vicreg


def embeddings(n, dim, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    z1 = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    z2 = z1 + 0.5 * torch.randn(n, dim, generator=generator, dtype=torch.float64) + 0.3
    return z1.to(dtype), z2.to(dtype)


def nt_xent_loop(z1, z2, temperature):
    """Chen et al. 2020, equation 1, one pair at a time."""
    z = [row / math.sqrt(sum(v * v for v in row)) for row in [*z1.numpy(), *z2.numpy()]]
    total = 0.0
    for i in range(len(z)):
        positive = (i + len(z1)) % len(z)
        negatives = [math.exp(z[i] @ z[k] / temperature) for k in range(len(z)) if k != i]
        total -= math.log(math.exp(z[i] @ z[positive] / temperature) / sum(negatives))
    return total / len(z)


def vicreg_loop(z1, z2, sim_coeff, std_coeff, cov_coeff):
    """Bardes et al. 2022, equations 1 to 6, the variance halved, one entry at a time."""
    n, dim = z1.shape
    sim = sum(float(z1[i, j] - z2[i, j]) ** 2 for i in range(n) for j in range(dim)) / (n * dim)
    std = cov = 0.0
    for z in (z1.tolist(), z2.tolist()):
        mean = [sum(row[j] for row in z) / n for j in range(dim)]
        for j in range(dim):
            var = sum((row[j] - mean[j]) ** 2 for row in z) / (n - 1)
            std += max(0.0, 1 - math.sqrt(var + 1e-4)) / dim
            for k in range(dim):
                if k != j:
                    c = sum((row[j] - mean[j]) * (row[k] - mean[k]) for row in z) / (n - 1)
                    cov += c * c / dim
    return sim_coeff * sim + std_coeff * std / 2 + cov_coeff * cov


def info_nce_loop(z1, z2, temperature):
    """DirectCLR's loss as its official code defines it, one pair at a time, both directions."""
    z1, z2 = ([row / math.sqrt(sum(v * v for v in row)) for row in z.numpy()] for z in (z1, z2))
    total = 0.0
    for a, b in ((z1, z2), (z2, z1)):
        for i in range(len(a)):
            others = [math.exp(a[i] @ b[j] / temperature) for j in range(len(b))]
            total -= math.log(others[i] / sum(others)) / len(a) / 2
    return total


def official_covariance(z):
    """The D x D form: the covariance matrix itself, its diagonal left out."""
    c = torch.cov(z.T).reshape(z.shape[1], z.shape[1])
    return (c - torch.diag(c.diagonal())).square().sum() / z.shape[1]


def scalar(loss):
    return loss[0] if isinstance(loss, tuple) else loss


LOSSES = {
    "nt_xent": lambda a, b: simclr.nt_xent(a, b, 0.5),
    "nt_xent-cold": lambda a, b: simclr.nt_xent(a, b, 0.1),
    "info_nce": lambda a, b: directclr.info_nce(a, b, 0.1),
    "vicreg": lambda a, b: scalar(vicreg.vicreg_loss(a, b)),
    "vicreg-weights": lambda a, b: scalar(vicreg.vicreg_loss(a, b, 3.0, 5.0, 7.0)),
}
LOOPS = {
    "nt_xent": lambda a, b: nt_xent_loop(a, b, 0.5),
    "nt_xent-cold": lambda a, b: nt_xent_loop(a, b, 0.1),
    "info_nce": lambda a, b: info_nce_loop(a, b, 0.1),
    "vicreg": lambda a, b: vicreg_loop(a, b, 25.0, 25.0, 1.0),
    "vicreg-weights": lambda a, b: vicreg_loop(a, b, 3.0, 5.0, 7.0),
}
SHAPES = [(6, 3), (5, 5), (4, 9)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_loop(name, shape):
    z1, z2 = embeddings(*shape)
    z1, z2 = 0.6 * z1, 0.6 * z2  # standard deviations on both sides of VICReg's hinge
    assert LOSSES[name](z1, z2).item() == pytest.approx(LOOPS[name](z1, z2), rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_gradient(name, shape):
    z1, z2 = (0.6 * z for z in embeddings(*shape, seed=1))
    assert torch.autograd.gradcheck(LOSSES[name], (z1.requires_grad_(), z2.requires_grad_()))


@pytest.mark.parametrize("name", LOSSES)
def test_views_swap_and_images_permute(name):
    z1, z2 = embeddings(8, 12)
    value = LOSSES[name](z1, z2)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(order, torch.arange(8))
    torch.testing.assert_close(LOSSES[name](z2, z1), value)
    torch.testing.assert_close(LOSSES[name](z1[order], z2[order]), value)
    assert not torch.isclose(LOSSES[name](z1[order], z2), value)  # positives matter


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_nt_xent_of_equal_embeddings(temperature):
    z = torch.ones(16, 4)
    assert simclr.nt_xent(z, z, temperature).item() == pytest.approx(math.log(31), rel=1e-6)


def test_nt_xent_of_orthogonal_pairs():
    z = torch.eye(8)
    expected = -2 + math.log(math.exp(2) + 14)
    assert simclr.nt_xent(z, z, 0.5).item() == pytest.approx(expected, rel=1e-6)


def test_nt_xent_pushes_from_dissimilar_negatives_too():
    """A clamp on the similarities would leave negative ones without gradient."""
    z = torch.tensor([[1.0, 0.1], [-1.0, 0.2]], requires_grad=True)
    simclr.nt_xent(z, z.detach(), 0.5).backward()
    assert (z.grad.abs().sum(1) > 1e-4).all()


def test_vicreg_at_collapse_and_at_its_minimum():
    z = torch.ones(16, 4, dtype=torch.float64)
    loss, parts = vicreg.vicreg_loss(z, z)
    assert loss.item() == pytest.approx(25 * (1 - 0.01), rel=1e-9)
    assert parts["sim"] == parts["cov"] == 0
    white = torch.linalg.qr(embeddings(64, 8)[0] - embeddings(64, 8)[0].mean(0))[0] * math.sqrt(63)
    assert vicreg.vicreg_loss(white, white)[0].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("shape", [(32, 8), (32, 32), (32, 33), (8, 64)], ids=str)
def test_covariance_by_either_matrix(shape):
    """Value and gradient of the smaller side equal the D x D form's, whichever is smaller."""
    mine, theirs = (embeddings(*shape)[1].requires_grad_() for _ in range(2))
    vicreg.covariance(mine).backward()
    official_covariance(theirs).backward()
    values = vicreg.covariance(mine), official_covariance(theirs)
    torch.testing.assert_close(*values, rtol=1e-11, atol=0)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12)


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation gives."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_matrix_of_dimensions_when_the_batch_is_smaller():
    """The largest tensor that the loss allocates, forward and backward, is N x D, never D x D."""
    z1, z2 = (z.requires_grad_() for z in embeddings(16, 512, dtype=torch.float32))
    with Largest() as largest:
        vicreg.vicreg_loss(z1, z2)[0].backward()
    assert 0 < largest.numel <= 16 * 512
    with Largest() as largest:
        official_covariance(z1).backward()
    assert largest.numel == 512 * 512


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_of_large_norm_stays_finite(name, dtype):
    z1, z2 = embeddings(32, 64, dtype=torch.float32)
    z1, z2 = ((1000 * z).to(dtype).requires_grad_() for z in (z1, z2))
    loss = LOSSES[name](z1, z2)
    assert loss.dtype == torch.float32 and loss.isfinite()
    torch.testing.assert_close(loss, LOSSES[name](z1.float(), z2.float()))
    if "nce" in name or "nt_xent" in name:  # VICReg's own gradient is beyond fp16 at this norm
        loss.backward()
        assert z1.grad.isfinite().all() and z2.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_equals_lightly(temperature):
    z1, z2 = embeddings(32, 16, dtype=torch.float32)
    expected = NTXentLoss(temperature=temperature)(z1, z2)
    torch.testing.assert_close(simclr.nt_xent(z1, z2, temperature), expected)


@pytest.mark.parametrize("shape", [(64, 16), (16, 64)], ids=str)
def test_vicreg_equals_lightly(shape):
    z1, z2 = embeddings(*shape, dtype=torch.float32)
    expected = VICRegLoss(lambda_param=25.0, mu_param=25.0, nu_param=1.0)(z1, z2)
    torch.testing.assert_close(vicreg.vicreg_loss(z1, z2)[0], expected)


@pytest.mark.parametrize("script", [simclr, vicreg, directclr, interpolate],
                         ids=lambda s: s.METHOD)
def test_seam(script):
    """loss_fn returns the copied-out function's value and finite, detached scalars."""
    args = script.parse_args(["--data", "shapes", "--dim", "16"])
    head = script.build_head(24, args)
    h1, h2 = (h.requires_grad_() for h in embeddings(8, 24, dtype=torch.float32))
    z1, z2 = head(h1), head(h2)
    assert z1.shape == (8, 16)
    loss, parts = script.loss_fn(z1, z2, args)
    loss.backward()
    assert loss.shape == () and loss.dtype == torch.float32
    for tensor in (h1, h2, *head.parameters()):
        assert tensor.grad.isfinite().all() and tensor.grad.abs().sum() > 0
    assert all(part.shape == () and not part.requires_grad for part in parts.values())


@pytest.mark.parametrize("kind, count", [
    ("mlp", 24 * 32 + 32 + 32 * 16 + 16), ("linear", 24 * 16), ("none", 0),
    ("expander", 24 * 32 + 32 + 64 + 32 * 32 + 32 + 64 + 32 * 16)])
@pytest.mark.parametrize("script", [simclr, vicreg, interpolate], ids=lambda s: s.METHOD)
def test_projectors(script, kind, count):
    args = script.parse_args(["--head", kind, "--dim", "16", "--hidden", "32"])
    head = script.build_head(24, args)
    assert sum(p.numel() for p in head.parameters()) == count
    assert head(torch.zeros(4, 24)).shape == (4, 24 if kind == "none" else 16)


def test_vicreg_expander():
    """--dim 8192 is 8192-8192-8192; --hidden sets the two inner widths; the last layer is bare."""
    def widths(*flags):
        with torch.device("meta"):
            head = vicreg.build_head(512, vicreg.parse_args([*flags]))
        assert head[-1].bias is None
        return [m.out_features for m in head if isinstance(m, torch.nn.Linear)]

    assert widths("--dim", "8192") == [8192, 8192, 8192]
    assert widths("--dim", "64", "--hidden", "128") == [128, 128, 64]
    assert widths("--dim", "64") == [1024, 1024, 64]
    assert widths() == [1024, 1024, 1024]


def directclr_head(*flags):
    torch.manual_seed(0)
    args = directclr.parse_args(["--data", "shapes", *flags])
    return directclr.build_head(24, args), args


@pytest.mark.parametrize("kind, dim, trained", [
    ("slice", 6, 0), ("none", 24, 0), ("linear", 6, 24 * 6), ("diagonal", 24, 24),
    ("mlp", 6, 24 * 24 + 48 + 24 * 6 + 12), ("orthogonal", 24, 24 * 24), ("lowrank", 24, 0)])
def test_directclr_heads(kind, dim, trained):
    """Output width, trainable numbers, and for the linear ones the singular values of the map."""
    head, args = directclr_head("--head", kind, "--dim", "6")
    assert args.dim == (dim if trained or kind in ("slice", "none") else 6)
    h = embeddings(40, 24, dtype=torch.float32)[0]
    assert head(h).shape == (40, dim)
    assert sum(p.numel() for p in head.parameters() if p.requires_grad) == trained
    if kind in ("slice", "none", "diagonal"):
        torch.testing.assert_close(head(h), h[:, :dim])  # the diagonal starts at one
    if kind in ("orthogonal", "lowrank"):
        for _ in range(3 if trained else 0):  # it stays so while it learns
            gradient = torch.autograd.grad((head(h) - h.flip(0)).square().mean(), head.parameters())
            with torch.no_grad():
                for p, g in zip(head.parameters(), gradient):
                    p -= g
        values = torch.linalg.svdvals(head(torch.eye(24)).detach())
        expected = torch.cat([torch.ones(dim if trained else 6), torch.zeros(0 if trained else 18)])
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-4)


def test_directclr_slice_leaves_the_other_features_without_gradient():
    head, args = directclr_head("--head", "slice", "--dim", "6")
    h1, h2 = (h.requires_grad_() for h in embeddings(8, 24, dtype=torch.float32))
    directclr.loss_fn(head(h1), head(h2), args)[0].backward()
    assert (h1.grad[:, :6] != 0).all() and (h1.grad[:, 6:] == 0).all()


def test_directclr_random_and_group():
    """Random sees d0 features, others each time; group sees each feature once and sums."""
    z1, z2 = embeddings(8, 24, dtype=torch.float32)
    head, args = directclr_head("--head", "random", "--dim", "6")
    seen = []
    for seed in range(5):
        a = head(z1).clone().requires_grad_()
        torch.manual_seed(seed)
        loss = directclr.loss_fn(a, head(z2), args)[0]
        loss.backward()
        chosen = torch.where(a.grad.abs().sum(0) > 0)[0]
        torch.testing.assert_close(loss, directclr.info_nce(z1[:, chosen], z2[:, chosen], 0.1))
        seen.append(tuple(chosen.tolist()))
    assert all(len(chosen) == 6 for chosen in seen) and len(set(seen)) == 5
    head, args = directclr_head("--head", "group", "--dim", "6")
    torch.manual_seed(0)
    groups = torch.randperm(24).split(6)
    torch.manual_seed(0)
    loss = directclr.loss_fn(head(z1), head(z2), args)[0]
    expected = sum(directclr.info_nce(z1[:, g], z2[:, g], 0.1) for g in groups)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("flags, message", [
    (("--dim", "25"), "more than the 24 features"),
    (("--head", "group", "--dim", "7"), "divide"),
    (("--head", "random", "--dim", "30"), "more than the 24")])
def test_directclr_refuses(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        directclr_head(*flags)
    assert stop.value.code == 2 and message in capsys.readouterr().err
