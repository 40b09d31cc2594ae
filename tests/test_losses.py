"""Each loss against a float64 loop written from its formula, its symmetries, and more."""

import math

import pytest
import torch
from benchmark import official_covariance
from torch.utils._python_dispatch import TorchDispatchMode

import directclr
import interpolate
import simclr
import vicreg

SHAPES = [(6, 3), (5, 5), (4, 9)]

def embeddings(n, dim, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    z1 = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    z2 = z1 + 0.5 * torch.randn(n, dim, generator=generator, dtype=torch.float64) + 0.3
    return z1.to(dtype), z2.to(dtype)

def contrastive_loop(z1, z2, temperature, both_views):
    """Chen et al. 2020, equation 1, one pair at a time; or DirectCLR's official code, whose sum
    has the other view's images only, the positive among them."""
    n, total = len(z1), 0.0
    z = [row / math.sqrt(sum(v * v for v in row)) for row in [*z1.numpy(), *z2.numpy()]]
    for i in range(2 * n):
        positive = (i + n) % (2 * n)
        others = [k for k in range(2 * n) if k != i and (both_views or (k < n) != (i < n))]
        exps = {k: math.exp(z[i] @ z[k] / temperature) for k in others}
        total -= math.log(exps[positive] / sum(exps.values()))
    return total / (2 * n)

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

LOSSES = {  # the script's function and the loop
    "nt_xent": (simclr.nt_xent, lambda a, b: contrastive_loop(a, b, 0.5, True)),
    "nt_xent-cold": (lambda a, b: simclr.nt_xent(a, b, 0.1),
                     lambda a, b: contrastive_loop(a, b, 0.1, True)),
    "info_nce": (directclr.info_nce, lambda a, b: contrastive_loop(a, b, 0.1, False)),
    "vicreg": (lambda a, b: vicreg.vicreg_loss(a, b)[0], lambda a, b: vicreg_loop(a, b, 25, 25, 1)),
    "vicreg-weights": (lambda a, b: vicreg.vicreg_loss(a, b, 3.0, 5.0, 7.0)[0],
                       lambda a, b: vicreg_loop(a, b, 3, 5, 7)),
}

def check_value_and_gradient(loss, loop, shape, rel=1e-12):
    z1, z2 = (0.6 * z for z in embeddings(*shape))  # deviations on both sides of VICReg's hinge
    assert loss(z1, z2).item() == pytest.approx(loop(z1, z2), rel=rel)
    z1, z2 = ((0.6 * z).requires_grad_() for z in embeddings(*shape, seed=1))
    assert torch.autograd.gradcheck(loss, (z1, z2), fast_mode=True)

def check_symmetry(loss):
    """Views may be swapped and images permuted, but not in one view alone."""
    z1, z2 = embeddings(8, 12)
    value, order = loss(z1, z2), torch.tensor([3, 7, 0, 1, 6, 4, 2, 5])
    torch.testing.assert_close(loss(z2, z1), value)
    torch.testing.assert_close(loss(z1[order], z2[order]), value)
    assert not torch.isclose(loss(z1[order], z2), value)

def check_half_precision(loss, dtype, scale=1.0):
    """It is raised to float32; returns the value and its leaves."""
    z1, z2 = ((scale * z).to(dtype).requires_grad_() for z in embeddings(32, 64))
    value = loss(z1, z2)
    assert value.dtype == torch.float32 and value.isfinite()
    torch.testing.assert_close(value, loss(z1.float(), z2.float()))
    return value, z1, z2

@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_loop(name):
    for shape in SHAPES:
        check_value_and_gradient(*LOSSES[name], shape)
    check_symmetry(LOSSES[name][0])

@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_of_large_norm_stays_finite(name, dtype):
    value, *leaves = check_half_precision(LOSSES[name][0], dtype, 1000)
    if "vicreg" not in name:  # VICReg's own gradient is beyond fp16 at this norm
        value.backward()
        assert all(z.grad.isfinite().all() for z in leaves)

def test_nt_xent_at_known_points():
    for z, temperature, expected in (
            (torch.ones(16, 4), 0.07, math.log(31)), (torch.ones(16, 4), 0.5, math.log(31)),
            (torch.eye(8), 0.5, -2 + math.log(math.exp(2) + 14))):
        assert simclr.nt_xent(z, z, temperature).item() == pytest.approx(expected, rel=1e-6)
    z = torch.tensor([[1.0, 0.1], [-1.0, 0.2]], requires_grad=True)
    simclr.nt_xent(z, z.detach(), 0.5).backward()  # a clamp would spare dissimilar negatives
    assert (z.grad.abs().sum(1) > 1e-4).all()

def test_vicreg_at_collapse_and_at_its_minimum():
    z = torch.ones(16, 4, dtype=torch.float64)
    loss, parts = vicreg.vicreg_loss(z, z)
    assert loss.item() == pytest.approx(25 * 0.99, rel=1e-9) and parts["sim"] == parts["cov"] == 0
    z = embeddings(64, 8)[0]
    white = torch.linalg.qr(z - z.mean(0))[0] * math.sqrt(63)
    assert vicreg.vicreg_loss(white, white)[0].item() == pytest.approx(0, abs=1e-12)

class Sizes(TorchDispatchMode):
    """Notes the numbers of elements of the tensors that operations give, not in place."""
    def __enter__(self):
        self.sizes = []
        return super().__enter__()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            self.sizes += [t.numel()] if torch.is_tensor(t) and not func._schema.is_mutable else []
        return out

@pytest.mark.parametrize("n, dim", [(64, 16), (32, 32), (32, 33), (16, 512)])
def test_covariance_by_the_smaller_matrix(n, dim):
    """Value and gradient are the D x D form's; VICReg's loss makes no tensor larger than N x D."""
    z1, z2 = (z.requires_grad_() for z in embeddings(n, dim))
    values = vicreg.covariance(z1), official_covariance(z1)
    torch.testing.assert_close(*values, rtol=1e-11, atol=0)
    gradients = (torch.autograd.grad(value, z1)[0] for value in values)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    with Sizes() as seen:
        vicreg.vicreg_loss(z1, z2)[0].backward()
    assert max(seen.sizes) == n * dim

MLP, EXPANDER = 24 * 32 + 32 + 32 * 6 + 6, 24 * 32 + 32 * 32 + 6 * 32 + 6 * 32
HEADS = [  # of 24 features: flags, width of the embedding, trained numbers
    *((script, f"--hidden 32 --head {head}", 6, MLP if head == "mlp" else EXPANDER)
      for script in (simclr, interpolate) for head in ("mlp", "expander")),
    (vicreg, "--hidden 32", 6, EXPANDER),
    *((directclr, f"--head {head}", *numbers) for head, *numbers in [
        ("slice", 6, 0), ("none", 24, 0), ("linear", 6, 24 * 6), ("diagonal", 24, 24),
        ("mlp", 6, 24 * 24 + 48 + 24 * 6 + 12), ("orthogonal", 24, 24 * 24), ("lowrank", 24, 0),
        ("random", 24, 0)])]

@pytest.mark.parametrize("script, flags, width, trained", HEADS)
def test_heads_and_the_seam(script, flags, width, trained):
    """Widths, trained numbers; loss_fn's gradient reaches all; tensors that NCCL takes."""
    args = script.parse_args(["--data", "shapes", "--dim", "6", *flags.split()])
    head = script.build_head(24, args)
    learned = [p for p in head.parameters() if p.requires_grad]
    assert sum(p.numel() for p in learned) == trained
    h1, h2 = (h.requires_grad_() for h in embeddings(8, 24, dtype=torch.float32))
    z1, z2 = head(h1), head(h2)
    assert z1.shape == z2.shape == (8, width)
    loss, parts = script.loss_fn(z1, z2, args)
    loss.backward()
    assert loss.shape == () and loss.dtype == torch.float32
    for tensor in (h1, h2, *learned):
        assert tensor.grad.isfinite().all() and tensor.grad.abs().sum() > 0
    assert all(part.shape == () and not part.requires_grad for part in parts.values())
    model = script.Model(args, 32, 10).to(memory_format=torch.channels_last)
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        assert t.is_contiguous() or t.ndim == 4 and t.is_contiguous(
            memory_format=torch.channels_last), name

@pytest.mark.parametrize("flags, widths", [
    (("--dim", "8192"), [8192] * 3), (("--dim", "64", "--hidden", "128"), [128, 128, 64]),
    (("--dim", "64"), [1024, 1024, 64]), ((), [1024] * 3)])
def test_vicreg_expander(flags, widths):
    """--dim 8192 is 8192-8192-8192; --hidden sets the two inner widths; the last layer is bare."""
    with torch.device("meta"):
        head = vicreg.build_head(512, vicreg.parse_args([*flags]))
    assert [m.out_features for m in head if isinstance(m, torch.nn.Linear)] == widths
    assert head[-1].bias is None

def directclr_head(*flags):
    args = directclr.parse_args(["--data", "shapes", "--dim", "6", *flags])
    return directclr.build_head(24, args), args

def test_directclr_slices_features_not_images():
    """The loss leaves what lies behind the slice, of every image, without gradient."""
    for kind, kept in (("slice", 6), ("none", 24), ("diagonal", 24)):  # which starts at one
        head, args = directclr_head("--head", kind)
        h1, h2 = (h.requires_grad_() for h in embeddings(8, 24, dtype=torch.float32))
        assert torch.equal(head(h1), h1[:, :kept])
        directclr.loss_fn(head(h1), head(h2), args)[0].backward()
        for h in (h1, h2):
            assert (h.grad[:, :kept] != 0).all() and (h.grad[:, kept:] == 0).all()

@pytest.mark.parametrize("kind, ones", [("orthogonal", 256), ("lowrank", 6)])
def test_singular_values_are_one_and_stay_so(kind, ones):
    """Of the linear map, before and after steps of the script's own optimiser."""
    args, h = directclr_head("--head", kind)[1], torch.eye(256)
    model = directclr.Model(args, 32, 10)
    optimizer, before = directclr.build_optimizer(model, args), model.head(h).detach()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    after, expected = model.head(h).detach(), (torch.arange(256) < ones).float()
    for matrix in (before, after):
        torch.testing.assert_close(torch.linalg.svdvals(matrix), expected, rtol=0, atol=1e-4)
    assert torch.allclose(before, after, atol=0.01) == (kind == "lowrank")

def test_directclr_random_draws_anew_and_alike_for_both_views():
    head, args = directclr_head("--head", "random")
    z2, seen = embeddings(8, 24, dtype=torch.float32)[1], set()
    for seed in range(5):
        z1 = embeddings(8, 24, dtype=torch.float32)[0].requires_grad_()
        torch.manual_seed(seed)
        loss = directclr.loss_fn(head(z1), head(z2), args)[0]
        loss.backward()
        chosen = torch.where(z1.grad.abs().sum(0) > 0)[0]
        torch.testing.assert_close(loss, directclr.info_nce(z1[:, chosen], z2[:, chosen], 0.1))
        seen.add(tuple(chosen.tolist()))
    assert len(seen) == 5 and {len(chosen) for chosen in seen} == {6}
