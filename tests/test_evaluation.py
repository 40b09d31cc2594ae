"""kNN and the linear probe against scikit-learn; evaluation leaves the network as it was, labels
teach it nothing; learning rates."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from test_losses import Sizes
from torch import nn

import analyze
import simclr
import vicreg

def clusters(n, dim=12, classes=7, seed=0):
    """Overlapping clusters of different scales and a constant: x (n, dim) in float64, y (n,)."""
    generator, y = torch.Generator().manual_seed(seed), torch.arange(n) % classes
    x = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    x += 2 * torch.eye(classes, dim)[y]
    x[:, -1] = 0
    return x * torch.linspace(0.1, 5, dim) + 1, y

@pytest.mark.parametrize("k", [1, 10, 50])
def test_knn_equals_scikit_learn(k):
    """Cosine, majority, ties to the lower class; a thousand test images at a time."""
    (train_x, train_y), (test_x, test_y) = clusters(900), clusters(2100, seed=1)
    reference = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(train_x, train_y)
    with Sizes() as seen:
        found = simclr.knn_accuracy(train_x, train_y, test_x, test_y, k)
    assert found == pytest.approx(100 * reference.score(test_x, test_y)) and 20 < found < 90
    assert max(seen.sizes) == 1000 * 900
    x, y = torch.eye(3), torch.tensor([0, 1, 2])  # fewer images than neighbours: all tie, class 0
    assert simclr.knn_accuracy(x, y, x, y, k) == pytest.approx(100 if k == 1 else 100 / 3)

@pytest.mark.parametrize("n, dim, classes", [(600, 12, 7), (600, 12, 2), (70_000, 6, 3)])
def test_linear_probe_equals_scikit_learn(n, dim, classes, monkeypatch):
    """Weights and accuracy, in one block and in two, which copy the features no more than once."""
    (train_x, train_y), (test_x, test_y) = (clusters(m, dim, classes, m) for m in (n, 500))
    scaler, solver, caught = StandardScaler().fit(train_x), torch.optim.LBFGS, []
    reference = LogisticRegression(C=2 if classes == 2 else 1, max_iter=5000, tol=1e-9)
    reference.fit(scaler.transform(train_x), train_y)
    monkeypatch.setattr(torch.optim, "LBFGS", lambda p, **k: caught.extend(p) or solver(p, **k))
    before = train_x.clone()
    with Sizes() as seen:
        accuracy = vicreg.linear_probe(train_x, train_y, test_x, test_y)
    assert torch.equal(train_x, before) and (n < 2**16 or seen.sizes.count(n * dim) == 1)
    assert accuracy == pytest.approx(100 * reference.score(scaler.transform(test_x), test_y))
    for mine, theirs in zip(caught, (reference.coef_.T, reference.intercept_)):
        mine = mine.detach().numpy()
        mine = mine[..., 1:] - mine[..., :1] if classes == 2 else mine
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-4)

def setup(script, n, flags=""):
    """Arguments, a model whose buffers have moved, 300 images of 8 px to train on, some without
    label, and n to test on, labelled by their number."""
    args = script.parse_args(f"--data shapes --dim 6 {flags}".split())
    torch.manual_seed(0)
    train, test = torch.randint(256, (300 + n, 3, 8, 8), dtype=torch.uint8).split([300, n])
    model = script.Model(args, 8, 10)
    model(train[:100] / 255, train[100:200] / 255)
    return args, model, ([*"abcdefghij"], train, torch.arange(300) % 11 - 1, test, torch.arange(n))

def test_evaluation_measures_and_leaves_the_network_alone():
    """Every parameter, buffer and mode and the random state are as before."""
    args, model, (*data, test_y) = setup(vicreg, 60, "--batch-size 40")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    test_y, random_state = test_y % 10, torch.get_rng_state()
    with_linear, without = (vicreg.evaluate(model, (*data, test_y), args, x) for x in (True, False))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    known = data[2] >= 0
    with torch.no_grad():
        h, test_h = (model.eval().backbone(x / 255) for x in (data[1][known], data[3]))
        online = (model.probe(test_h).argmax(1) == test_y).float().mean().item()
    sets = h, data[2][known], test_h, test_y
    expected = {"knn": vicreg.knn_accuracy(*sets), "online": 100 * online,
                "rank": analyze.effective_rank(test_h)}
    assert without == pytest.approx(expected, abs=0.01)
    assert with_linear == pytest.approx(expected | {"linear": vicreg.linear_probe(*sets)}, abs=0.01)

def test_evaluation_of_a_collapsed_network():
    args, model, (*data, test_y) = setup(simclr, 60)
    model.backbone[-1] = nn.Sequential(nn.Flatten(), nn.Linear(256, 256))
    nn.init.zeros_(model.backbone[-1][1].weight)
    for bias in (0, 1):
        nn.init.constant_(model.backbone[-1][1].bias, bias)
        metrics = simclr.evaluate(model, (*data, test_y % 10), args)
        assert metrics["rank"] == 1 and metrics["knn"] == metrics["linear"] == 10

def test_embeddings_and_neighbours(tmp_path):
    """Of a sample of at most 10,000: h, z = g(h), labels; a picture of nearest images."""
    args, model, data = setup(simclr, 10_050, "--head expander --hidden 32")
    data[3].files = [b"%d" % i for i in range(10_050)]  # as of a Folder
    simclr.evaluate(model, data, args, linear=False, folder=tmp_path)
    h, z, index, paths = torch.load(tmp_path / "embeddings.pt", weights_only=True).values()
    assert (h.shape, z.shape, index.shape) == ((10_000, 256), (10_000, 6), (10_000,))
    assert (h.dtype, z.dtype, index.dtype) == (torch.float32, torch.float32, torch.int64)
    images = data[3][index]
    assert paths == [str(i) for i in index.tolist()]
    with torch.no_grad():
        torch.testing.assert_close(h, model.eval().backbone(images / 255), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(z, model.head(h), rtol=1e-4, atol=1e-4)
        assert (index.diff() > 0).all() and not torch.allclose(z, model.train().head(h), atol=0.1)
    picture = torch.from_numpy(np.array(Image.open(tmp_path / "neighbours.png"))).permute(2, 0, 1)
    assert picture.shape == (3, 8 * 10 + 2, 10 * 10 + 2)
    tiles = picture[:, 2:, 2:].unfold(1, 8, 10).unfold(2, 8, 10).permute(1, 2, 0, 3, 4)
    assert torch.equal(tiles[[0, -1], 0], images[[0, -1]])
    for row in tiles:  # the image itself, then the nearest
        shown = [(images == tile).flatten(1).all(1).nonzero().item() for tile in row[:3]]
        assert F.cosine_similarity(h[shown[0]], h, dim=1).topk(3).indices.tolist() == shown

SCALER = torch.amp.GradScaler("cpu", enabled=False)

def test_online_probe_teaches_no_one():
    """Labels reach the probe and nothing else: the backbone's gradient does not depend on them."""
    (args, model, data), gradients = setup(simclr, 16), []
    optimizer, draws = torch.optim.SGD(model.parameters(), 0.0), torch.rand(2, 36, 16, 1, 1, 1)
    for y in (torch.arange(16) % 10, torch.arange(16) % 9 + 1, torch.full((16,), -1)):
        parts = simclr.train_step(model, optimizer, SCALER, simclr.augment, simclr.loss_fn,
                                  data[3], y, draws, args, torch.float32)
        assert all(value.isfinite() for value in parts.values())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        for other in gradients[1:]:
            assert torch.equal(gradient, other[name]) != name.startswith("probe"), name

@pytest.mark.parametrize("flags, factor", [
    ("--dim 512", 1), ("--dim 8192", 1 / 8), ("--dim 64 --hidden 4096", 1 / 32),
    ("--dim 2", 1 / 256), ("--dim 8192 --optimizer lars", 1)])
def test_wide_and_narrow_expanders_learn_slower(flags, factor):
    """Wide within, of few dimensions at the end; also where BatchNorm is synchronised."""
    args = vicreg.parse_args(f"--data shapes --lr 0.2 --batch-size 256 {flags}".split())
    with torch.device("meta"):
        model = vicreg.Model(args, 32, 10)
        for model in (model, nn.SyncBatchNorm.convert_sync_batchnorm(model)):
            rates = [group["lr"] for group in vicreg.build_optimizer(model, args).param_groups]
            assert rates == pytest.approx([0.2, 0.2 * factor, 0.1])

def test_learning_rate_schedule(monkeypatch):
    """A rise over the warm-up, never above the peak, then a cosine to zero; ten epochs of ten."""
    args, model, data = setup(vicreg, 20, "--lr 25.6 --batch-size 2 --epochs 10 --dim 512")
    seen, none, optimizer = [], lambda *args, **options: {}, vicreg.build_optimizer(model, args)
    monkeypatch.setattr(vicreg, "evaluate", none)
    monkeypatch.setattr(vicreg, "train_step", lambda *args: seen.append(
        [group["lr"] for group in optimizer.param_groups]) or {"loss": torch.zeros(())})
    state = {"step": 0, "seconds": 0.0, "sums": torch.zeros(0)}
    vicreg.train(model, optimizer, SCALER, (data[0], *data[3:]), args, torch.float32, state, none,
                 none)
    rates = torch.tensor(seen)
    torch.testing.assert_close(rates[:10, 0], 0.2 * torch.arange(1, 11) / 10)
    torch.testing.assert_close(rates[55], torch.tensor([0.1, 0.1, 0.05]))  # the probe has .1
    assert len(rates) == 100 and rates[99, 0] < 1e-3 and (rates[10:].diff(dim=0) < 0).all()
