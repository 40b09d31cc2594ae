"""Every transform against torchvision.transforms.v2.functional, image by image; the draws against
torchvision's own distributions."""

import math

import pytest
import torch
import torchvision.transforms as v1
import torchvision.transforms.v2.functional as tv

import simclr

TOLERANCE = dict(rtol=0, atol=1 / 255)


def photographs(n=12, size=32, seed=0):
    """Smooth colour images with edges, noise, black, white and gray areas: uint8 (n, 3, S, S)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 5, 5, generator=generator)
    x = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic")
    x = x + 0.1 * torch.randn(n, 3, size, size, generator=generator)
    x[:, :, : size // 4, : size // 4] = torch.rand(n, 1, 1, 1, generator=generator)
    x[-1, :, :, size // 2 :] = 0
    x[-1, :, :, -3:] = 1
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def arguments(*flags):
    return simclr.parse_args(["--data", "shapes", *flags])


OFF = ("--crop", "1", "1", "--flip", "0", "--jitter-prob", "0", "--gray", "0")


def draw(n, seed=0):
    return torch.rand(n, simclr.DRAWS, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [32, 96])
def test_crop_resize_flip(size):
    x = photographs(size=size).float() / 255
    generator = torch.Generator().manual_seed(1)
    height, width = torch.randint(1, size + 1, (2, len(x)), generator=generator)
    height[0], width[0] = size, size
    top = (torch.rand(len(x), generator=generator) * (size - height + 1)).long()
    left = (torch.rand(len(x), generator=generator) * (size - width + 1)).long()
    flip = torch.arange(len(x)) % 2 == 1
    out = simclr.crop_resize_flip(x, *(p.float() for p in (top, left, height, width)), flip)
    for i in range(len(x)):
        box = (int(p[i]) for p in (top, left, height, width))
        expected = tv.resized_crop(x[i], *box, [size, size], antialias=True)
        expected = tv.horizontal_flip(expected) if flip[i] else expected
        torch.testing.assert_close(out[i], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)], ids=str)
def test_color_jitter(order):
    x = photographs().float() / 255
    n, generator = len(x), torch.Generator().manual_seed(2)
    factors = torch.rand(n, 4, generator=generator) * 2
    factors[:, 3] = torch.linspace(-0.5, 0.5, n)
    out = simclr.color_jitter(x, factors, torch.tensor(order).expand(n, 4))
    transforms = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    for i in range(n):
        expected = x[i]
        for step in order:
            expected = transforms[step](expected, float(factors[i, step]))
        torch.testing.assert_close(out[i], expected, **TOLERANCE)


def test_color_jitter_takes_each_images_own_order():
    x = photographs(2).float() / 255
    factors = torch.tensor([[1.8, 0.3, 1.7, 0.2]]).expand(2, 4)
    orders = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
    both = simclr.color_jitter(x, factors, orders)
    for i in range(2):
        alone = simclr.color_jitter(x[i : i + 1], factors[i : i + 1], orders[i : i + 1])
        torch.testing.assert_close(both[i : i + 1], alone)
    assert (simclr.color_jitter(x, factors, orders.flip(0)) - both).abs().max() > 0.05


def test_grayscale_and_solarize():
    x = photographs().float() / 255
    gray = simclr.grayscale(x).expand_as(x)
    torch.testing.assert_close(gray, tv.rgb_to_grayscale(x, 3), **TOLERANCE)
    torch.testing.assert_close(simclr.solarize(x), tv.solarize(x, 0.5), rtol=0, atol=0)


@pytest.mark.parametrize("size, kernel", [(16, 3), (32, 3), (96, 9), (224, 23)])
def test_gaussian_blur(size, kernel):
    x = photographs(4, size).float() / 255
    sigma = torch.tensor([0.1, 0.5, 1.3, 2.0])
    out = simclr.gaussian_blur(x, sigma)
    for i in range(4):
        expected = tv.gaussian_blur(x[i], [kernel, kernel], [float(sigma[i])] * 2)
        torch.testing.assert_close(out[i], expected, rtol=0, atol=1e-5)


def test_probability_zero_is_the_identity():
    x = photographs()
    for view in (0, 1):
        assert torch.equal(simclr.augment(x, draw(len(x)), view, arguments(*OFF)), x.float() / 255)


ALONE = {
    "crop": ("--crop", "0.2", "0.5"),
    "flip": ("--flip", "0.5"),
    "jitter": ("--jitter-prob", "1"),
    "gray": ("--gray", "0.5"),
    "blur": ("--blur", "1"),
    "solarize": ("--solarize", "0.5"),
}


@pytest.mark.parametrize("name", ALONE)
def test_images_of_a_batch_get_different_draws(name):
    """Equal images come out different, and a draw's effect stays with its own image."""
    args = arguments(*OFF, *ALONE[name])
    x, draws = photographs(2)[:1].expand(16, 3, 32, 32), draw(16)
    out = simclr.augment(x, draws, 0, args)
    kinds = 2 if name in ("flip", "gray", "solarize") else 12
    assert len(torch.unique(out.flatten(1), dim=0)) >= kinds
    alone = torch.cat([simclr.augment(x[:1], row[None], 0, args) for row in draws])
    torch.testing.assert_close(out, alone)


@pytest.mark.parametrize("flag, tv_one", [
    ("--flip", lambda x: tv.horizontal_flip(x)),
    ("--gray", lambda x: tv.rgb_to_grayscale(x, 3)),
    ("--solarize", lambda x: tv.solarize(x, 0.5)),
])
def test_probability_one_is_the_transform(flag, tv_one):
    x = photographs()
    out = simclr.augment(x, draw(len(x)), 0, arguments(*OFF, flag, "1"))
    torch.testing.assert_close(out, tv_one(x.float() / 255), **TOLERANCE)


def test_transforms_follow_in_torchvisions_order():
    """One whole view: crop, flip, jitter, grayscale, blur, solarisation, on the same draws."""
    x, draws = photographs(), draw(12)
    args = arguments("--jitter-prob", "1", "--gray", "0.4", "--blur", "1", "--solarize", "1")
    u = draws.split([20, 2, 1, 1, 4, 4, 1, 1, 1, 1], dim=1)
    boxes = torch.stack(simclr.draw_crops(u[0], u[1], 32, 0.2, 1.0), dim=1)
    factors, orders = simclr.draw_jitter(u[4], args.jitter), u[5].argsort(1)
    transforms = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    out = simclr.augment(x, draws, 0, args)
    for i in range(12):
        one = tv.resized_crop(x[i] / 255, *boxes[i].int().tolist(), [32, 32], antialias=True)
        one = tv.horizontal_flip(one) if u[2][i] < 0.5 else one
        for step in orders[i].tolist():
            one = transforms[step](one, float(factors[i, step]))
        one = tv.rgb_to_grayscale(one, 3) if u[6][i] < 0.4 else one
        one = tv.gaussian_blur(one, [3, 3], [0.1 + 1.9 * float(u[8][i])] * 2)
        near_half = (one - 0.5).abs() < 1e-4  # solarisation jumps there
        expected = torch.where(near_half, out[i], tv.solarize(one, 0.5))
        torch.testing.assert_close(out[i], expected, **TOLERANCE)
        assert near_half.float().mean() < 0.05


def test_each_view_has_its_own_strength():
    args = arguments(*OFF, "--blur", "1", "0", "--solarize", "0", "1")
    x, draws = photographs(), draw(12)
    blurred, solarized = (simclr.augment(x, draws, view, args) for view in (0, 1))
    torch.testing.assert_close(solarized, tv.solarize(x.float() / 255, 0.5))
    assert not torch.equal(blurred, x.float() / 255)
    assert arguments("--blur", "0.3").blur == [0.3, 0.3]


def kolmogorov_smirnov(a, b):
    """Largest distance of the distribution functions of two samples, over its 1e-6 threshold."""
    both = torch.cat([a, b]).sort().values
    gap = (torch.searchsorted(a.sort().values, both, right=True) / len(a)
           - torch.searchsorted(b.sort().values, both, right=True) / len(b)).abs().max()
    return gap / math.sqrt(-0.5 * math.log(1e-6 / 2) * (len(a) + len(b)) / (len(a) * len(b)))


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.08, 1.0), (0.95, 1.0)], ids=str)
def test_crops_follow_torchvision(scale):
    """Boxes against RandomResizedCrop.get_params, each marginal by a two-sample KS test."""
    n, size = 20_000, 32
    u = draw(n)
    mine = torch.stack(simclr.draw_crops(u[:, :20], u[:, 20:22], size, *scale), dim=1)
    torch.manual_seed(0)
    image = torch.zeros(3, size, size)
    get_params, ratio = v1.RandomResizedCrop.get_params, [3 / 4, 4 / 3]
    theirs = torch.tensor([get_params(image, list(scale), ratio) for _ in range(n)]).float()
    for column in range(4):
        assert kolmogorov_smirnov(mine[:, column], theirs[:, column]) < 1
    for a, b in ((2, 3), (0, 2)):  # and two joint ones, by product
        assert kolmogorov_smirnov(mine[:, a] * mine[:, b], theirs[:, a] * theirs[:, b]) < 1
    top, left, height, width = mine.unbind(1)
    assert (top >= 0).all() and (left >= 0).all() and (height >= 1).all() and (width >= 1).all()
    assert (top + height <= size).all() and (left + width <= size).all()


@pytest.mark.parametrize("strengths", [(0.4, 0.4, 0.4, 0.1), (0.8, 0.2, 1.5, 0.5)], ids=str)
def test_jitter_follows_torchvision(strengths):
    n = 20_000
    u = draw(n)
    mine = simclr.draw_jitter(u[:, :4], strengths)
    jitter = v1.ColorJitter(*strengths)
    ranges = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
    torch.manual_seed(0)
    drawn = torch.tensor([jitter.get_params(*ranges)[1:] for _ in range(n)])
    for column in range(4):
        assert kolmogorov_smirnov(mine[:, column], drawn[:, column]) < 1


def test_draws_are_independent(monkeypatch):
    """No two decisions share a random number; the jitter's orders are uniform over all 24."""
    n, seen = 4800, {}
    x = photographs(2)[:1].expand(n, 3, 32, 32)[..., 4:12, 4:12]
    for flag in ("flip", "gray", "blur", "solarize", "jitter-prob"):
        changed = simclr.augment(x, draw(n), 0, arguments(*OFF, f"--{flag}", "0.5")) != x / 255
        seen[flag] = changed.flatten(1).any(1).float()
    correlation = torch.corrcoef(torch.stack(list(seen.values())))
    assert (correlation - torch.eye(5)).abs().max() < 0.07  # five standard errors
    orders = []
    monkeypatch.setattr(simclr, "color_jitter", lambda x, f, o: orders.append(o) or x)
    simclr.augment(x, draw(n), 0, arguments())
    counts = torch.unique(orders[0], dim=0, return_counts=True)[1]
    assert len(counts) == 24 and counts.min() > 140 and counts.max() < 260  # 200 expected


def test_apply_probability():
    """A transform at probability p touches that share of the images."""
    x = photographs(2)[:1].expand(4000, 3, 32, 32)[:, :, 4:12, 4:12]
    for flag in ("--gray", "--solarize", "--jitter-prob", "--blur", "--flip"):
        out = simclr.augment(x, draw(4000), 0, arguments(*OFF, flag, "0.3"))
        touched = (out != x.float() / 255).flatten(1).any(1).float().mean()
        assert abs(touched - 0.3) < 0.03


def test_crops_of_a_folder_are_not_cropped_again():
    """They are flipped, half of them, and go on like any view."""
    x = photographs(200)
    out = simclr.augment(x, draw(200), 0, arguments("--jitter-prob", "0", "--gray", "0"), True)
    same, turned = ((out == y / 255).flatten(1).all(1) for y in (x, x.flip(3)))
    assert (same | turned).all() and 70 < turned.sum() < 130
    grayed = simclr.augment(x, draw(200), 0, arguments(*OFF, "--gray", "1"), True)
    assert torch.equal(grayed, simclr.grayscale(x / 255).expand_as(x))
