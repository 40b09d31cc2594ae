"""kNN and the linear probe against scikit-learn; evaluation leaves the network as it was."""

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

import simclr
import vicreg


@pytest.fixture(scope="module")
def features():
    """Features of drawn shapes from an untrained backbone: train x, y and test x, y."""
    torch.manual_seed(0)
    backbone, _ = simclr.build_backbone("convnet", 32)
    parts = []
    for n, seed in ((2000, 1), (1000, 2)):
        images, labels = simclr.draw_shapes(n, seed)
        parts += [simclr.extract_features(backbone, [images], len(images)), labels]
    return parts


@pytest.mark.parametrize("k", [1, 10, 50])
def test_knn_equals_scikit_learn(features, k):
    train_x, train_y, test_x, test_y = features
    train_x, test_x = train_x.double(), test_x.double()  # rounding decides no neighbour
    reference = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(train_x, train_y)
    expected = 100 * reference.score(test_x, test_y)
    assert simclr.knn_accuracy(train_x, train_y, test_x, test_y, k) == pytest.approx(expected)


def test_knn_with_fewer_images_than_neighbours():
    x, y = torch.eye(3), torch.tensor([0, 1, 2])
    assert simclr.knn_accuracy(x, y, x, y, k=10) == pytest.approx(100 / 3)  # all tie: class 0
    assert simclr.knn_accuracy(x, y, x, y, k=1) == 100


def test_linear_probe_equals_scikit_learn(features):
    train_x, train_y, test_x, test_y = features
    scaler = StandardScaler().fit(train_x)
    reference = LogisticRegression(C=1.0, max_iter=5000).fit(scaler.transform(train_x), train_y)
    expected = 100 * reference.score(scaler.transform(test_x), test_y)
    mine = simclr.linear_probe(train_x, train_y, test_x, test_y)
    assert 20 < expected < 95  # a level at which the two could differ
    assert mine == pytest.approx(expected, abs=0.3)
    assert simclr.linear_probe(train_x, train_y, test_x, test_y) == mine


def test_linear_probe_separates_what_is_separable():
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    x = torch.eye(4).repeat(10, 1) + 0.01 * x
    y = torch.arange(4).repeat(10)
    assert simclr.linear_probe(x, y, x, y) == 100
    x = torch.cat([x, 0 * x], dim=1)  # dimensions without variance do no harm
    assert simclr.linear_probe(x, y, x, y) == 100


def test_effective_rank():
    assert simclr.effective_rank(torch.eye(16)) == pytest.approx(16, rel=1e-5)
    assert simclr.effective_rank(torch.ones(50, 8)) == pytest.approx(1, abs=0.01)
    x = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    sigma = torch.linalg.svdvals(x.double())
    p = sigma / sigma.sum()
    expected = math.exp(-sum(v * math.log(v) for v in p.tolist()))
    assert simclr.effective_rank(x) == pytest.approx(expected)


@pytest.mark.parametrize("arch", ["convnet", "resnet18"])
def test_evaluation_leaves_the_network_alone(arch):
    """Every parameter and buffer, every mode and the random state are as before."""
    args = simclr.parse_args(["--data", "shapes", "--arch", arch])
    images, labels = simclr.draw_shapes(60, 1)
    labels[:10] = -1  # unlabelled images are left out of the probes
    data = simclr.Data(images, labels, images, labels.clamp(min=0), list(range(10)))
    torch.manual_seed(0)
    model = simclr.Model(args, 32, 10)
    model(images.float() / 255, images.float() / 255)  # move the buffers off their initial values
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    metrics = simclr.evaluate(model, data, torch.device("cpu"), linear=True)
    assert set(metrics) == {"knn", "online", "rank", "linear"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_features_do_not_depend_on_the_batch():
    images, _ = simclr.draw_shapes(30, 1)
    torch.manual_seed(0)
    backbone, _ = simclr.build_backbone("convnet", 32)
    whole = simclr.extract_features(backbone, [images], len(images))
    parts = simclr.extract_features(backbone, images.split(7), len(images))
    torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
@pytest.mark.parametrize("size", [32, 224])
def test_backbone_is_torchvisions(arch, size):
    """The exported names load into torchvision's own model with strict=True."""
    import torchvision

    with torch.device("meta"):
        backbone, num_features = simclr.build_backbone(arch, size)
        model = getattr(torchvision.models, arch)()
        assert model.fc.in_features == num_features
        model.fc = torch.nn.Identity()
        if size == 32:
            model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.load_state_dict(backbone.state_dict(), strict=True)
        assert isinstance(backbone.maxpool, torch.nn.Identity) == (size == 32)


def test_online_probe_teaches_no_one():
    """Labels reach the probe and nothing else: the backbone's gradient does not depend on them."""
    args = simclr.parse_args(["--data", "shapes", "--batch-size", "16"])
    images, labels = simclr.draw_shapes(16, 1)
    gradients = []
    for y in (labels, (labels + 1) % 10, torch.full_like(labels, -1)):
        torch.manual_seed(0)
        model = simclr.Model(args, 32, 10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        parts = simclr.train_step(model, optimizer, scaler, simclr.augment, images, y, args, None)
        assert all(value.isfinite() for value in parts.values())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name in gradients[0]:
        same = torch.equal(gradients[0][name], gradients[1][name])
        assert same != name.startswith("probe"), name
        assert torch.equal(gradients[0][name], gradients[2][name]) != name.startswith("probe"), name


@pytest.mark.parametrize("flags, factor", [
    (("--dim", "512"), 1), (("--dim", "8192"), 1 / 8), (("--dim", "64", "--hidden", "4096"), 1 / 4),
    (("--dim", "8192", "--head-lr", "0.5"), 0.5), (("--dim", "8192", "--optimizer", "lars"), 1)])
def test_wide_expanders_learn_slower(flags, factor):
    args = vicreg.parse_args(["--data", "shapes", "--lr", "0.2", "--batch-size", "256", *flags])
    with torch.device("meta"):
        optimizer = vicreg.build_optimizer(vicreg.Model(args, 32, 10), args)
    backbone, head, probe = optimizer.param_groups
    assert (backbone["lr"], head["lr"], probe["lr"]) == pytest.approx((0.2, 0.2 * factor, 0.1))


def lars_loop(weights, gradients, lr, momentum, weight_decay, eta):
    """LARS as in VICReg's official code, one tensor and one step at a time."""
    state = [torch.zeros_like(w) for w in weights]
    for step in gradients:
        for i, (w, g) in enumerate(zip(weights, step)):
            if w.ndim > 1:
                g = g + weight_decay * w
                if w.norm() > 0 and g.norm() > 0:
                    g = g * eta * w.norm() / g.norm()
            state[i] = momentum * state[i] + g
            weights[i] = w - lr * state[i]
    return weights


def test_lars_equals_the_loop():
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (4,), (2, 4, 1, 1), (3, 3)]
    start = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    start[3].zero_()
    gradients = [[torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
                 for _ in range(4)]
    params = [torch.nn.Parameter(w.clone()) for w in start]
    optimizer = simclr.LARS(params, lr=0.3, momentum=0.9, weight_decay=0.1)
    for step in gradients:
        for p, g in zip(params, step):
            p.grad = g.clone()
        optimizer.step()
    expected = lars_loop([w.clone() for w in start], gradients, 0.3, 0.9, 0.1, 0.001)
    for p, w in zip(params, expected):
        torch.testing.assert_close(p.detach(), w)


def test_lars_trains_the_online_probe_as_sgd_does():
    weights = {}
    for kind in ("sgd", "lars"):
        args = simclr.parse_args(["--data", "shapes", "--optimizer", kind])
        torch.manual_seed(0)
        model = simclr.Model(args, 32, 10)
        optimizer = simclr.build_optimizer(model, args)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
        weights[kind] = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name in weights["sgd"]:
        same = torch.allclose(weights["sgd"][name], weights["lars"][name])
        assert same or not name.startswith("probe"), name
    assert not torch.allclose(weights["sgd"]["head.0.weight"], weights["lars"]["head.0.weight"])


def test_learning_rate_schedule():
    args = simclr.parse_args(["--lr", "0.1", "--batch-size", "512", "--data", "shapes"])
    optimizer = simclr.build_optimizer(simclr.Model(args, 32, 10), args)
    rates = []
    for step in range(100):
        simclr.set_learning_rate(optimizer, step, 100, 10)
        rates.append([group["lr"] for group in optimizer.param_groups])
    rates = torch.tensor(rates)
    torch.testing.assert_close(rates[:10, 0], 0.2 * torch.arange(1, 11) / 10)
    torch.testing.assert_close(rates[55], torch.tensor([0.1, 0.1, 0.05]))  # the probe has .1
    simclr.set_learning_rate(optimizer, 0, 2, 1)  # a warm-up ends at the peak, never above it
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)
    assert rates[99, 0] < 1e-3 and (rates[10:].diff(dim=0) < 0).all()
