"""Every transform against torchvision.transforms.v2.functional, image by image; the draws against
torchvision's own distributions."""

import itertools
import math

import pytest
import torch
import torchvision.transforms as v1
import torchvision.transforms.v2.functional as tv

import directclr
import simclr
import vicreg

TOLERANCE = dict(rtol=0, atol=1 / 255)
ADJUST = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
OFF = "--crop 1 1 --jitter 0 0 0 0 --gray 0 "

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

def arguments(flags):
    return simclr.parse_args(["--data", "shapes", *flags.split()])

def draw(n, count=simclr.DRAWS, seed=0):
    return torch.rand(count, n, 1, 1, 1, generator=torch.Generator().manual_seed(seed))

def boxes(draws, size, low, high):
    """Top, left, height, width of each crop, as RandomResizedCrop.get_params finds them: the first
    of ten tries that fits, else the whole image, which is square. draws (22, N)."""
    found = []
    for u in draws.flatten(1).T.tolist():
        height = width = size
        for area, ratio in zip(u[:10], u[10:20]):
            area = size * size * (low + (high - low) * area)
            ratio = math.exp(math.log(3 / 4) + ratio * (math.log(4 / 3) - math.log(3 / 4)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= size and 0 < h <= size:
                height, width = h, w
                break
        top, left = int(u[20] * (size - height + 1)), int(u[21] * (size - width + 1))
        found.append((top, left, height, width))
    return found

@pytest.mark.parametrize("size, low, high", [
    (32, 0.2, 1), (33, 0.08, 1), (96, 0.08, 1), (32, 0.9, 1), (32, 1, 1), (16, 0.0005, 0.004)])
def test_random_crop(size, low, high):
    x, draws = photographs(24, size).float() / 255, draw(24, 22, seed=1)
    out, found = vicreg.random_crop(x, draws, low, high), boxes(draws, size, low, high)
    for i in range(24):
        expected = tv.resized_crop(x[i], *found[i], [size, size], antialias=True)
        torch.testing.assert_close(out[i], expected, rtol=0, atol=1e-4)
    assert (low == 1) == ({box[2:] for box in found} == {(size, size)})

def test_color_jitter_in_each_images_own_order():
    """All 24 orders in one batch; factors from nothing to twice, hue all around."""
    order = torch.tensor([*itertools.permutations(range(4))])  # (24, 4)
    x, factors = photographs(24).float() / 255, draw(24, 4, seed=2) * 2 - 1
    factors[3] = torch.linspace(-0.5, 0.5, 24).view(24, 1, 1, 1)
    out = simclr.color_jitter(x, factors, order.T.reshape(4, 24, 1, 1, 1))
    for i in range(24):
        expected = x[i]
        for step in order[i].tolist():
            expected = ADJUST[step](expected, float(factors[step, i]) + (step < 3))
        torch.testing.assert_close(out[i], expected, **TOLERANCE)
        hue = tv.adjust_hue(x[i], float(factors[3, i]))
        torch.testing.assert_close(simclr.shift_hue(x, factors[3])[i], hue, rtol=0, atol=1e-5)

@pytest.mark.parametrize("size, kernel", [(8, 3), (32, 3), (96, 9), (224, 23)])
def test_gaussian_blur(size, kernel):
    x, sigma = photographs(4, size).float() / 255, torch.tensor([0.1, 0.5, 1.3, 2.0])
    out = directclr.gaussian_blur(x, sigma.view(4, 1, 1, 1))
    for i in range(4):
        expected = tv.gaussian_blur(x[i], [kernel, kernel], [float(sigma[i])] * 2)
        torch.testing.assert_close(out[i], expected, rtol=0, atol=1e-5)

@pytest.mark.parametrize("view, blur, solarize", [(0, 0, 0), (1, 0.6, 0.7)])
def test_whole_view(view, blur, solarize):
    """Crop, flip, jitter, grayscale, blur, solarisation, in torchvision's order and each on its own
    draws; either view has its own strengths."""
    n, args = 24, arguments("--gray 0.4 --blur 0 0.6 --solarize 0 0.7 --jitter 0.8 0.2 0.9 0.3")
    x, draws = photographs(n), draw(n)
    out = directclr.augment(x, draws, view, args)
    crop, jitter, order, (flip, jittered, gray, blurred, sigma, solar) = draws.split([22, 4, 4, 6])
    order, found = order.argsort(0).flatten(1), boxes(crop, 32, 0.2, 1)
    for i in range(n):
        one = tv.resized_crop(x[i] / 255, *found[i], [32, 32], antialias=True)
        one = tv.horizontal_flip(one) if flip[i] < 0.5 else one
        for k in order[:, i].tolist() if jittered[i] < 0.8 else ():
            one = ADJUST[k](one, args.jitter[k] * (2 * float(jitter[k, i]) - 1) + (k < 3))
        one = tv.rgb_to_grayscale(one, 3) if gray[i] < 0.4 else one
        soft = tv.gaussian_blur(one, [3, 3], [0.1 + 1.9 * float(sigma[i])] * 2)
        one = soft if blurred[i] < blur else one
        near_half = (one - 0.5).abs() < 1e-4  # solarisation jumps there
        assert near_half.float().mean() < 0.05
        expected = tv.solarize(one, 0.5) if solar[i] < solarize else one
        torch.testing.assert_close(out[i], torch.where(near_half, out[i], expected), **TOLERANCE)

PATCH = photographs(2)[:1, :, 8:16, 8:16]
MIRROR = torch.cat([PATCH[..., :4], PATCH[..., :4].flip(3)], dim=3)  # whose flip is itself

@pytest.mark.parametrize("name, flags, kinds", [
    ("crop", "--crop 0.2 0.5", 12), ("flip", "", 2), ("jitter", "--jitter 0.4 0.4 0.4 0.1", 10),
    ("gray", "--gray 0.5", 2), ("blur", "--blur 1 1", 12), ("solarize", "--solarize 0.5 0.5", 2)])
def test_images_of_a_batch_get_different_draws(name, flags, kinds):
    """Equal images come out different, and a draw's effect stays with its own image."""
    x = (PATCH if name == "flip" else MIRROR).expand(16, 3, 8, 8)
    draws, args = draw(16), arguments(OFF + flags)
    out = simclr.augment(x, draws, 0, args)
    assert len(torch.unique(out.flatten(1), dim=0)) >= kinds
    alone = torch.cat([simclr.augment(x[:1], draws[:, i : i + 1], 0, args) for i in range(16)])
    torch.testing.assert_close(out, alone)

def kolmogorov_smirnov(a, b):
    """Largest distance of the distribution functions of two samples, over its 1e-6 threshold."""
    both = torch.cat([a, b]).sort().values
    gap = (torch.searchsorted(a.sort().values, both, right=True) / len(a)
           - torch.searchsorted(b.sort().values, both, right=True) / len(b)).abs().max()
    return gap / math.sqrt(-0.5 * math.log(1e-6 / 2) * (len(a) + len(b)) / (len(a) * len(b)))

@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.08, 1.0), (0.95, 1.0)], ids=str)
def test_crops_follow_torchvision(scale):
    """Boxes, which the scripts' crops have, against RandomResizedCrop.get_params, by KS tests."""
    n, image, get_params = 10_000, torch.zeros(3, 32, 32), v1.RandomResizedCrop.get_params
    mine = torch.tensor(boxes(draw(n, 22), 32, *scale)).float()
    torch.manual_seed(0)
    theirs = torch.tensor([get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(n)]).float()
    for a, b in ((0, 0), (1, 1), (2, 2), (3, 3), (2, 3), (0, 2)):  # marginal; two joint ones
        assert kolmogorov_smirnov(mine[:, a] * mine[:, b], theirs[:, a] * theirs[:, b]) < 1

def test_draws_are_independent_and_of_the_right_size(monkeypatch):
    """No two decisions share a random number; each falls as often as its probability says."""
    n, seen, caught = 4800, {}, []
    for name, flags, share in (("flip", "", 0.5), ("jitter", "--jitter 0.4 0.4 0.4 0.1", 0.8),
                               ("gray", "--gray 0.6", 0.6), ("blur", "--blur 0.3 0", 0.3),
                               ("solarize", "--solarize 0.45 0", 0.45)):
        x = (PATCH if name == "flip" else MIRROR).expand(n, 3, 8, 8)
        out = vicreg.augment(x, draw(n), 0, arguments(OFF + flags))
        seen[name] = (out != x / 255).flatten(1).any(1).float()
        assert seen[name].mean() == pytest.approx(share, abs=0.03)  # four standard errors
    correlation = torch.corrcoef(torch.stack([*seen.values()]))
    assert (correlation - torch.eye(5)).abs().max() < 0.07
    monkeypatch.setattr(vicreg, "color_jitter", lambda x, *rest: caught.extend(rest) or x)
    vicreg.augment(x, draw(n), 0, arguments("--jitter 0.8 0.2 1 0.5"))
    factors, order = torch.stack(caught[0]).flatten(1), caught[1].flatten(1).T
    counts = torch.unique(order, dim=0, return_counts=True)[1]
    assert len(counts) == 24 and counts.min() > 140 and counts.max() < 260  # 200 expected
    jitter = v1.ColorJitter(0.8, 0.2, 1, 0.5)
    torch.manual_seed(0)
    theirs = torch.tensor([jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation,
                                             jitter.hue)[1:] for _ in range(n)]).T
    for i in range(4):
        assert kolmogorov_smirnov(factors[i] + (i < 3), theirs[i]) < 1

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folders_crops_are_not_cropped_again(dtype):
    """They are flipped, half of them, each view's own, and go on like any view."""
    pairs = photographs(400).view(200, 2, 3, 32, 32)
    for view in (0, 1):
        plain = directclr.augment(pairs, draw(200), view, arguments("--jitter 0 0 0 0 --gray 0"))
        same, turned = ((plain == y / 255).flatten(1).all(1)
                        for y in (pairs[:, view], pairs[:, view].flip(3)))
        assert (same | turned).all() and 70 < turned.sum() < 130
        out = directclr.augment(pairs, draw(200), view, arguments(OFF + "--gray 1"), dtype)
        assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(out, tv.rgb_to_grayscale(plain, 3).to(dtype))
