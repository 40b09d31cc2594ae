"""Look inside trained runs: spectra, the duality in numbers, neighbours; and the toy experiments.

Reads the run folders of simclr.py, vicreg.py, directclr.py and interpolate.py, several side by
side, in the space of the representation h = f(x) and of the embedding z = g(h), test images only:

    spectrum   singular values of the covariance matrix, how many are (nearly) zero
    duality    L_c = sum_{i != j} <z_i, z_j>^2 over images, L_nc the same over dimensions;
               L_nc + sum_j |z_.j|^4 = L_c + sum_i |z_i|^4 and what follows from it
    compare    accuracies, ranks and both criteria of many runs as one table
    nearest    the nearest neighbours of some images, and two augmented views of each
    toy        collapse in linear networks: by strong augmentation, by depth, mode by mode

    Garrido, Chen, Bardes, Najman, LeCun, On the duality between contrastive and non-contrastive
        self-supervised learning, ICLR 2023
    Jing, Vincent, LeCun, Tian, Understanding dimensional collapse in contrastive self-supervised
        learning, ICLR 2022

Run     python analyze.py runs/vicreg-shapes runs/simclr-shapes     the first four
        python analyze.py compare runs/interpolate-all-shapes       a folder of runs
        python analyze.py toy
Copy    spectrum, participation_ratio, effective_rank, duality, pair_sums, alignment
Shapes  n test images, C H W image, F features of the backbone, D dims of the embedding;
        h (n, F) representation, z (n, D) embedding
Leaves  runs/analysis/NAME.json, figures beside them where matplotlib is installed; compare also
        writes Markdown and CSV

Sums are in float64 and in blocks: no matrix is larger than the smaller of n and D, squared.
"""

# ==== 1. Imports [own] ============================================================================
import argparse
import collections
import concurrent.futures
import copy
import csv
import itertools
import json
import math
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize, resized_crop


# ==== 2. Heads [own] ==============================================================================
METHOD = "analyze"
HEADS = {  # of every script, by the names that its runs record
    "simclr": ("mlp", "linear", "none", "expander"),
    "vicreg": ("mlp", "linear", "none", "expander"),
    "interpolate": ("mlp", "linear", "none", "expander"),
    "directclr": ("slice", "none", "linear", "mlp", "diagonal", "orthogonal", "lowrank", "random",
                  "group"),
}


PATH = ("vicreg", "vicreg-exp", "vicreg-ctr", "simclr", "simclr-abs", "simclr-sq", "dcl", "dcl-abs",
        "dcl-sq", "spectral", "barlow", "tcr")  # the order in which a folder of these is shown


def fail(message):
    """End the program with one line on what was wrong and exit code 2."""
    print(f"{METHOD}.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


class Slice(nn.Module):
    """DirectCLR's projector: the first d0 features, (N, F) -> (N, d0)."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, h):
        return h[:, : self.dim]


class Diagonal(nn.Module):
    """One trainable factor for each feature, at first one: (N, F) -> (N, F)."""

    def __init__(self, num_features):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))

    def forward(self, h):
        return h * self.weight


class LowRank(nn.Module):
    """A fixed matrix U diag(1, .., 1, 0, .., 0) V with d0 ones, U and V orthogonal: (N, F)."""

    def __init__(self, num_features, dim):
        super().__init__()
        u, v = (torch.linalg.qr(torch.randn(num_features, num_features))[0] for _ in range(2))
        self.register_buffer("weight", u[:, :dim] @ v[:dim])

    def forward(self, h):
        return h @ self.weight


def directclr_head(num_features, args):
    """Return the projector: (N, F) -> (N, D). Random and group choose among all in the loss."""
    whole = args.head in ("none", "diagonal", "orthogonal")
    args.dim = num_features if whole else args.dim
    if args.dim > num_features and args.head not in ("linear", "mlp"):
        fail(f"--dim {args.dim} is more than the {num_features} features of --arch {args.arch}")
    if args.head == "group" and num_features % args.dim:
        fail(f"--head group: --dim {args.dim} does not divide the {num_features} features")
    if args.head == "slice":
        return Slice(args.dim)
    if args.head == "mlp":
        return nn.Sequential(
            nn.Linear(num_features, num_features, bias=False), nn.BatchNorm1d(num_features),
            nn.ReLU(), nn.Linear(num_features, args.dim, bias=False), nn.BatchNorm1d(args.dim),
        )
    if args.head == "linear":
        return nn.Linear(num_features, args.dim, bias=False)
    if args.head == "diagonal":
        return Diagonal(num_features)
    if args.head == "orthogonal":
        square = nn.Linear(num_features, num_features, bias=False)
        return nn.utils.parametrizations.orthogonal(square, orthogonal_map="matrix_exp")
    if args.head == "lowrank":
        return LowRank(num_features, args.dim)
    return nn.Identity()


def projector(num_features, args):
    """Return the projector g: (N, F) -> (N, D); the expander's last layer is bare.

    SGD's largest stable learning rate falls with the width: beyond 1024 the expander gets less.
    """
    hidden = args.hidden or max(1024, args.dim)
    if args.head == "expander":
        if args.optimizer == "sgd":
            args.head_lr = args.head_lr or min(1.0, 1024 / max(hidden, args.dim))
        return nn.Sequential(
            nn.Linear(num_features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
            nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
            nn.Linear(hidden, args.dim, bias=False),
        )
    if args.head == "mlp":
        return nn.Sequential(
            nn.Linear(num_features, hidden), nn.ReLU(), nn.Linear(hidden, args.dim)
        )
    if args.head == "linear":
        return nn.Linear(num_features, args.dim, bias=False)
    return nn.Identity()


def build_head(num_features, args):
    """Return the head that the script args.script gives a run."""
    build = directclr_head if args.script == "directclr" else projector
    return build(num_features, args)


# ==== 3. Data [shared] ============================================================================
# Images are uint8 (n, 3, S, S), in memory or a Folder of that shape; labels int64 (n,), -1 where
# there is none (STL-10's unlabelled).
Data = collections.namedtuple("Data", "train_images train_labels test_images test_labels classes")
DOWNLOADS = ("cifar10", "cifar100", "stl10")


def load_data(args):
    """Return Data on the CPU: what --data names, as args describe it.

    With --holdout n the last n of a fixed shuffle of the labelled training images take the place
    of the test set, so that choices can be made without looking at it.
    """
    try:
        if args.data == "shapes":
            data = Data(*draw_shapes(5000, seed=1), *draw_shapes(1000, seed=2), list(SHAPES))
        elif args.data in DOWNLOADS:
            data = load_torchvision(args.data, args.data_dir)
        else:
            data = load_folder(Path(args.data), args)
    except OSError as error:
        fail(f"cannot read --data {args.data}: {error}")
    if args.holdout:
        train, labels = data.train_images, data.train_labels
        known = torch.where(labels >= 0)[0]
        if args.holdout >= len(known):
            fail(f"--holdout {args.holdout} leaves nothing of {len(known)} labelled images")
        shuffled = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(0))]
        held = torch.zeros(len(labels), dtype=torch.bool)
        held[shuffled[-args.holdout :]] = True
        data = Data(train[~held], labels[~held], train[held], labels[held], data.classes)
    return data


def load_torchvision(name, root):
    """CIFAR-10, CIFAR-100 or STL-10 as Data, downloaded to root on first use."""
    dataset = getattr(torchvision.datasets, name.upper())
    train, test = ("train+unlabeled", "test") if name == "stl10" else (True, False)
    try:
        train, test = dataset(root, train, download=True), dataset(root, test, download=True)
    except (OSError, RuntimeError) as error:
        fail(f"{name} is not in {root} and cannot be downloaded ({error}); "
             "try --data shapes (drawn, nothing to download) or --data DIR (a folder of images)")

    def images(part):
        array = torch.from_numpy(part.data)
        return array if name == "stl10" else array.permute(0, 3, 1, 2).contiguous()

    def labels(part):
        return torch.tensor(part.labels if name == "stl10" else part.targets).long()

    return Data(images(train), labels(train), images(test), labels(test), train.classes)


def load_folder(root, args):
    """ROOT/train/CLASS/* and ROOT/val|test/CLASS/* as Data.

    In memory images are whole central squares of --image-size. With --stream they stay Folders:
    training crops are then taken from the images as they are, other squares from 7/8 of them.
    """
    split = next((s for s in ("val", "test") if (root / s).is_dir()), None)
    if not root.is_dir():
        fail(f"--data {root}: no such folder; give a folder, cifar10, cifar100, stl10 or shapes")
    if not (root / "train").is_dir() or split is None:
        fail(f"--data {root}: needs train/CLASS/* and val/CLASS/* or test/CLASS/*")
    train = torchvision.datasets.ImageFolder(root / "train")
    test = torchvision.datasets.ImageFolder(root / split)
    unknown = sorted(set(test.classes) - set(train.classes))
    if unknown:
        fail(f"--data {root}: {split}/ has classes that train/ lacks: {', '.join(unknown[:5])}")
    size = args.image_size or min(224, *decode_image(train.samples[0][0]).shape[1:])
    large = (len(train) + len(test)) * 3 * size**2 > 4 * 2**30
    stream = large if args.stream is None else args.stream
    found = []
    for part in (train, test):
        labels = torch.tensor([train.class_to_idx[part.classes[i]] for i in part.targets])
        images = Folder([path for path, _ in part.samples], size, 7 / 8 if stream else 1.0, args)
        if not stream:
            print(f"reading {len(images):,} images of {part.root}", flush=True)
            folder, where = images, torch.arange(len(images))
            images = torch.empty(folder.shape, dtype=torch.uint8)
            batches = ((index, None) for index in where.clone().split(100))
            for i, (batch, index) in enumerate(fetch(folder, batches, torch.device("cpu"))):
                images[100 * i :][:100], where[100 * i :][:100] = batch, index
            labels = labels[where]
        found += [images, labels]
    return Data(*found, train.classes)


class Folder(torch.utils.data.Dataset):
    """Images of a folder, read by fetch(): a uint8 tensor (n, 3, S, S) that is not there.

    An item is (index, seed): two random crops (2, 3, S, S), torchvision's with that seed; without
    one the central square (3, S, S), `part` of the shorter side. The next readable image takes the
    place of an unreadable one; with an item come its index, -1 if there is none, and the errors.
    Other subscripts, slices and masks, give the Folder of these.
    """

    def __init__(self, paths, size, part, args):
        self.paths = np.array([os.fsencode(p) for p in paths])  # one block, which workers share
        self.size, self.part, self.crop, self.device = size, part, args.crop, torch.device("cpu")
        self.limit, self.workers, self.unreadable = args.max_unreadable, args.workers, set()

    nbytes = math.inf
    shape = property(lambda self: (len(self.paths), 3, self.size, self.size))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, item):
        if not isinstance(item, tuple):
            part = copy.copy(self)
            part.paths = self.paths[item]
            return part
        (index, seed), errors, size = item, [], [self.size, self.size]
        for i in (j % len(self) for j in range(index, index + self.limit + 1)):
            try:
                x = decode_image(os.fsdecode(self.paths[i]))
            except OSError as error:
                errors.append(" ".join(str(error).split()))
                continue
            if seed is None:
                side = max(1, round(self.part * min(x.shape[1:])))
                views = resize(center_crop(x, [side, side]), size, antialias=True)
            else:
                torch.default_generator.manual_seed(seed)  # the CPU's alone: far quicker
                draw = torchvision.transforms.RandomResizedCrop.get_params
                views = torch.stack([
                    resized_crop(x, *draw(x, self.crop, [3 / 4, 4 / 3]), size, antialias=True)
                    for _ in (0, 1)])
            return views, i, "\n".join(errors)
        pair = () if seed is None else (2,)
        return torch.zeros(*pair, 3, *size, dtype=torch.uint8), -1, "\n".join(errors)


def ignore_signals(worker):
    """For a DataLoader's workers: the training process stops, and then stops them."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


def fetch(images, batches, device):
    """Yield images, uint8 on the device, and their index (n,), for (index, seeds) in batches.

    seeds (n,) or None: with them a Folder gives pairs of random crops, (n, 2, 3, S, S). Its workers
    read ahead; an index changes where an image is unreadable. Ends the program where those are more
    than --max-unreadable.
    """
    if isinstance(images, torch.Tensor):
        for index, _ in batches:
            yield images[index].to(device, non_blocking=True), index
        return
    items = ([*zip(index.tolist(), itertools.repeat(None) if seeds is None else seeds.tolist())]
             for index, seeds in batches)
    loader = torch.utils.data.DataLoader(
        images, batch_sampler=items, num_workers=images.workers, worker_init_fn=ignore_signals,
        pin_memory=device.type == "cuda")
    for batch, index, errors in loader:
        for error in sorted(set("\n".join(errors).split("\n")) - images.unreadable - {""}):
            images.unreadable.add(error)
            count = f"{len(images.unreadable)} of at most {images.limit}, --max-unreadable"
            if len(images.unreadable) > images.limit:
                fail(f"{error} ({count})")
            print(f"skipped: {error} ({count})", file=sys.stderr)
        if index.min() < 0:
            fail(f"no image near it is readable either: {min(images.unreadable)}")
        yield batch.to(device, non_blocking=True), index


def decode_image(path):
    """Read an image file as uint8 RGB (3, H, W), turned as its EXIF says; OSError that names it.

    Transparency is dropped; of 16-bit gray the high byte counts; deeper pixels are refused.
    """
    try:
        with torchvision.datasets.folder.Image.open(path) as image:  # Pillow, torchvision's own
            if image.mode[0] in "IF":  # Pillow's RGB would cut them off at 255
                x = pil_to_tensor(image.convert("I"))
                if image.mode == "F" or x.min() < 0 or x.max() > 65535:
                    raise ValueError("its pixels have more than 16 bits")
                x = (x >> 8).to(torch.uint8).expand(3, -1, -1)
            else:
                x = pil_to_tensor(image if image.mode == "RGB" else image.convert("RGB"))
            turn = image.getexif().get(0x0112, 1)
    except Exception as error:  # a damaged file can raise nearly anything
        raise OSError(f"the image {path} is unreadable: {error}") from error
    x = x.mT if turn in (5, 6, 7, 8) else x
    flips = [d for d, turns in ((1, (3, 4, 7, 8)), (2, (2, 3, 6, 7))) if turn in turns]
    return x.flip(flips) if flips else x


def box(u, v, a, b):
    """Signed distance, negative inside, from (u, v) to the rectangle of half sides a and b."""
    return torch.maximum(u.abs() - a, v.abs() - b)


SHAPES = {  # ten kinds, as signed distances
    "disc": lambda u, v: torch.hypot(u, v) - 0.8,
    "ring": lambda u, v: (torch.hypot(u, v) - 0.7).abs() - 0.2,
    "square": lambda u, v: box(u, v, 0.75, 0.75),
    "frame": lambda u, v: box(u, v, 0.65, 0.65).abs() - 0.17,
    "triangle": lambda u, v: torch.maximum(0.87 * u.abs() + 0.5 * v - 0.45, -v - 0.6),
    "cross": lambda u, v: torch.minimum(box(u, v, 0.95, 0.25), box(u, v, 0.25, 0.95)),
    "bar": lambda u, v: box(u, v, 1.0, 0.25),
    "pair": lambda u, v: torch.hypot(u.abs() - 0.6, v) - 0.38,
    "angle": lambda u, v: torch.minimum(box(u + 0.5, v, 0.25, 0.8), box(u, v - 0.55, 0.75, 0.25)),
    "moon": lambda u, v: torch.maximum(torch.hypot(u, v) - 0.9, 0.7 - torch.hypot(u - 0.45, v)),
}


def draw_shapes(n, seed, size=32):
    """Draw n images (n, 3, size, size) uint8 and their labels (n,), the kind of the shape.

    An image shows nine shapes of one kind, each in a colour and at a place and angle of its own, so
    that the kind is what two crops share. Half the images are negatives; the contrast varies.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    labels = torch.arange(n) % len(SHAPES)
    y, x = torch.meshgrid(*[(torch.arange(size) + 0.5) * 2 / size - 1] * 2, indexing="ij")
    images = uniform(0.1, 0.3, 1, 1, 1).expand(n, 3, size, size)
    for cell in range(9):
        left = x - (cell % 3 - 1) * 2 / 3 - uniform(-0.12, 0.12, 1, 1)
        down = y - (cell // 3 - 1) * 2 / 3 - uniform(-0.12, 0.12, 1, 1)
        angle, scale = uniform(0, 2 * math.pi, 1, 1), uniform(0.23, 0.32, 1, 1)
        u = (torch.cos(angle) * left + torch.sin(angle) * down) / scale
        v = (torch.cos(angle) * down - torch.sin(angle) * left) / scale
        distance = torch.empty(n, size, size)
        for kind, shape in enumerate(SHAPES.values()):
            distance[kind :: len(SHAPES)] = shape(u[kind :: len(SHAPES)], v[kind :: len(SHAPES)])
        ink = (0.5 - distance * scale * size / 2).clamp(0, 1)[:, None]  # edges one pixel wide
        images = images + (uniform(0.4, 1, 3, 1, 1) - images) * ink
    images = 0.5 + (images - 0.5) * uniform(0.3, 1, 1, 1, 1)
    images = torch.where(uniform(0, 1, 1, 1, 1) < 0.5, images, 1 - images)
    return (images * 255).round().to(torch.uint8), labels


# ==== 4. Augmentation [shared] ====================================================================
# All images of a batch at once, each with parameters of its own, equal to torchvision's functional
# transforms on floats in [0, 1] when given the same parameters. Parameters are (N,) tensors.
DRAWS = 36  # uniform random numbers that one view of one image takes


def augment(images, draws, view, args, cropped=False):
    """One view of every image: uint8 (N, 3, S, S) -> float32 (N, 3, S, S) in [0, 1].

    draws (N, DRAWS) holds uniform random numbers in [0, 1), the only source of chance; view (0 or
    1) picks the strengths. Order and distributions are torchvision's: RandomResizedCrop,
    RandomHorizontalFlip, ColorJitter at --jitter-prob, RandomGrayscale, blur, RandomSolarize.
    """
    tries, corner, flip, jittered, strength, order, gray, blurred, sigma, solarized = (
        draws.split([20, 2, 1, 1, 4, 4, 1, 1, 1, 1], dim=1)
    )
    x = images.float() / 255
    if cropped:  # by a Folder
        x = where(flip[:, 0] < args.flip, x.flip(3), x)
    else:
        box = draw_crops(tries, corner, x.shape[-1], *args.crop)
        x = crop_resize_flip(x, *box, flip[:, 0] < args.flip)
    if args.jitter_prob:
        factors = draw_jitter(strength, args.jitter)
        x = where(jittered[:, 0] < args.jitter_prob, color_jitter(x, factors, order.argsort(1)), x)
    if args.gray:
        x = where(gray[:, 0] < args.gray, grayscale(x).expand_as(x), x)
    if args.blur[view]:
        x = where(blurred[:, 0] < args.blur[view], gaussian_blur(x, 0.1 + 1.9 * sigma[:, 0]), x)
    if args.solarize[view]:
        x = where(solarized[:, 0] < args.solarize[view], solarize(x), x)
    return x


def where(chosen, yes, no):
    """torch.where with one condition an image: chosen (N,), yes and no (N, C, H, W)."""
    return torch.where(chosen[:, None, None, None], yes, no)


def draw_crops(tries, corner, size, low, high):
    """RandomResizedCrop's boxes in square images: top, left, height, width, each (N,) whole.

    Of ten tries (N, 20) with area in [low, high] of the image and log-uniform aspect ratio in
    [3/4, 4/3] the first that fits is taken, the whole image where none does.
    """
    area, ratio = tries.chunk(2, dim=1)
    area = size**2 * (low + (high - low) * area)
    ratio = torch.exp(math.log(4 / 3) * (2 * ratio - 1))
    height, width = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (height.clamp(1, size) == height) & (width.clamp(1, size) == width)
    first = fits.float().argmax(1, keepdim=True)
    height, width = (torch.where(fits, s, size).gather(1, first)[:, 0] for s in (height, width))
    top, left = (corner[:, 0] * (size - height + 1)), (corner[:, 1] * (size - width + 1))
    return top.floor(), left.floor(), height, width


def crop_resize_flip(x, top, left, height, width, flip):
    """Crop (top, left, height, width), resize to x's own size with antialiasing, flip where asked.

    Bilinear resizing is separable: two matrix products with weights of each image's own.
    """
    rows = resize_weights(top, height, x.shape[2], torch.zeros_like(flip))
    columns = resize_weights(left, width, x.shape[3], flip)
    return rows[:, None] @ (x @ columns[:, None].mT)


def resize_weights(start, length, size, flip):
    """Weights (N, size, size) that take pixels start..start + length to size pixels.

    A triangle as wide as one output pixel, at least one input pixel, cut off at the crop's edges.
    """
    pixel = torch.arange(size, device=start.device)
    out = torch.where(flip[:, None], size - 1 - pixel, pixel) + 0.5
    start, length = start[:, None, None], length[:, None, None]
    centre = start + out[:, :, None] * length / size
    distance = (pixel + 0.5 - centre).abs() / (length / size).clamp(min=1)
    inside = (pixel >= start) & (pixel < start + length)
    weights = (1 - distance).clamp(min=0) * inside
    return weights / weights.sum(2, keepdim=True)


def draw_jitter(draws, strengths):
    """ColorJitter's factors (N, 4): brightness, contrast, saturation about 1, hue about 0."""
    low = [max(0, 1 - s) for s in strengths[:3]] + [-strengths[3]]
    high = [1 + s for s in strengths[:3]] + [strengths[3]]
    return torch.stack([a + (b - a) * u for a, b, u in zip(low, high, draws.unbind(1))], dim=1)


def color_jitter(x, factors, order):
    """Brightness, contrast, saturation, hue (0 to 3) by factors (N, 4), each in its order (N, 4).

    The first three blend the image with black, its mean gray or its gray version.
    """
    for step in order.unbind(1):
        gray = grayscale(x)
        mean = gray.mean((2, 3), keepdim=True)
        other = where(step == 2, gray, where(step == 1, mean, 0.0))
        factor = factors.gather(1, step[:, None])[:, :, None, None]
        blended = (factor * x + (1 - factor) * other).clamp(0, 1)
        x = where(step == 3, shift_hue(x, factors[:, 3]), blended)
    return x


def shift_hue(x, shift):
    """Turn the hue of x (N, 3, H, W) by shift (N,) turns, through HSV without building it."""
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)
    r, g, b = x.unbind(1)
    hue = torch.where(value == r, g - b, torch.where(value == g, b - r, r - g))
    hue = hue / chroma.clamp(min=1e-8) + torch.where(value == r, 0, torch.where(value == g, 2, 4))
    hue = hue + 6 * shift[:, None, None]
    k = torch.stack([hue + 5, hue + 3, hue + 1], dim=1) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def grayscale(x):
    """Luma (N, 1, H, W) of x (N, 3, H, W), ITU-R 601."""
    return 0.2989 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]


def gaussian_blur(x, sigma):
    """Blur each image with its own sigma (N,) in pixels; odd kernel of about S/10, edges reflected.

    Separable too: a row of weights holds the kernel, its overhang folded back at the edges.
    """
    size = x.shape[-1]
    radius = max(1, size // 20)
    offset = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    source = (torch.arange(size, device=x.device)[:, None] + offset).abs()  # reflects at 0
    source = size - 1 - (size - 1 - source).abs()  # and at the far edge
    weights = torch.einsum("no,soj->nsj", kernel, torch.eye(size, device=x.device)[source])[:, None]
    return weights @ x @ weights.mT


def solarize(x):
    """Invert the pixels from one half up."""
    return torch.where(x >= 0.5, 1 - x, x)


# ==== 5. Backbone and heads [shared] ==============================================================
class Residual(nn.Module):
    """x + BN(conv(x)), rectified: the identity skip of equal width that DirectCLR leans on."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(x + self.bn(self.conv(x)))


class ConvNet(nn.Sequential):
    """Four stages of 32 to 256 channels for CPUs: (N, 3, H, W) -> (N, 256)."""

    def __init__(self):
        layers, width = [], 3
        for out, stride in ((32, 2), (64, 1), (128, 2), (256, 2)):
            conv = nn.Conv2d(width, out, 3, stride=stride, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(out), nn.ReLU()]
            width = out
        super().__init__(*layers, Residual(256), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def build_backbone(arch, size):
    """Return the backbone (N, 3, size, size) -> (N, F) and F.

    Up to 64 pixels the ResNets get the CIFAR stem: a 3x3 convolution of stride 1, no max-pool.
    """
    if arch == "convnet":
        return ConvNet(), 256
    backbone = getattr(torchvision.models, arch)(weights=None)
    num_features = backbone.fc.in_features
    backbone.fc = nn.Identity()
    if size <= 64:
        backbone.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
        backbone.maxpool = nn.Identity()
    return backbone, num_features


class Model(nn.Module):
    """Backbone f, head g and the online probe, which learns from labels and teaches no one."""

    def __init__(self, args, size, classes):
        super().__init__()
        self.backbone, num_features = build_backbone(args.arch, size)
        self.head = build_head(num_features, args)
        self.probe = nn.Sequential(
            nn.BatchNorm1d(num_features, affine=False), nn.Linear(num_features, classes)
        )

    def forward(self, view1, view2):
        """Two views (N, 3, S, S) -> embeddings z1, z2 (N, D) and the probe's logits of view 1."""
        h1, h2 = self.backbone(view1), self.backbone(view2)
        return self.head(h1), self.head(h2), self.probe(h1.detach())


# ==== 6. Evaluation [shared] ======================================================================
@torch.no_grad()
def extract_features(backbone, batches, n):
    """Representations (n, F) float32, in eval mode, of n uint8 images in batches (N, 3, S, S)."""
    training, features, done = backbone.training, None, 0
    backbone.eval()
    for batch in batches:
        h = backbone((batch.float() / 255).contiguous(memory_format=torch.channels_last))
        if features is None:  # whole at once: parts that stay would fragment the memory
            features = h.new_empty(n, h.shape[1], dtype=torch.float32)
        features[done : done + len(h)] = h
        done += len(h)
    backbone.train(training)
    return features


@torch.no_grad()
def knn_accuracy(train_x, train_y, test_x, test_y, k=10):
    """Accuracy in percent of the vote of the k nearest by cosine; ties go to the lower class."""
    train_x, hits = F.normalize(train_x, dim=1), 0
    k, classes = min(k, len(train_x)), int(train_y.max()) + 1
    rows = max(1, min(1000, 2**26 // len(train_x)))  # a quarter GiB of similarities at once
    for x, y in zip(F.normalize(test_x, dim=1).split(rows), test_y.split(rows)):
        nearest = train_y[(x @ train_x.T).topk(k, dim=1).indices]  # (rows, k)
        hits += (F.one_hot(nearest, classes).sum(1).argmax(1) == y).sum()
    return 100 * int(hits) / len(test_y)


def linear_probe(train_x, train_y, test_x, test_y, steps=400):
    """Accuracy in percent of multinomial logistic regression on standardised features.

    scikit-learn's LogisticRegression with C = 1, the weight's penalty included: L-BFGS, at most
    `steps` iterations, no learning rate, nothing random.
    """
    mean, std = train_x.mean(0), train_x.std(0, correction=0).clamp(min=1e-6)
    train_x, test_x = (train_x - mean) / std, (test_x - mean) / std
    classes = int(train_y.max()) + 1
    weight = train_x.new_zeros(train_x.shape[1], classes, requires_grad=True)
    bias = train_x.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(train_x @ weight + bias, train_y)
        loss = loss + 0.5 * weight.square().sum() / len(train_y)
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        hits = ((test_x @ weight + bias).argmax(1) == test_y).sum()
    return 100 * int(hits) / len(test_y)


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


# ==== 7. Measures [own] ===========================================================================
# Of embeddings z (n, D), one row an image, or of representations. Float32 in, float64 inside.
def row_norms(z):
    """Norms (n,) of the rows of z (n, m), and their inverses, 0 for a row of zeros."""
    norms = torch.cat([part.double().norm(dim=1) for part in z.split(1000)])
    return norms, torch.where(norms > 0, 1 / norms, 0)


def spectrum(z, normalize=True):
    """Singular values (D,) of the covariance matrix of z (n, D), falling; normalize: rows first.

    Normalised rows and 1 / (n - 1) are those of DirectCLR's official spectrum.py; its paper has
    1 / n. Where n < D the centred rows' Gram matrix is taken, whose singular values are the same.
    Values below float64's rounding are 0.
    """
    n, dim = z.shape
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
    return F.pad(values.where(values > rounding, 0), (0, dim - len(values)))


def participation_ratio(values):
    """(sum of values)^2 / sum of values^2 of a spectrum (D,): 1 to D, D where all are equal."""
    return (values.sum() ** 2 / values.double().square().sum().clamp(min=1e-300)).item()


def collapsed(values, threshold=1e-6):
    """How many values of a spectrum (D,) are at most threshold times the largest."""
    return int((values <= threshold * values.max()).sum())


def pair_sums(z, functions):
    """Sum over all i != j of f(products, cosines), for each f, of the rows i and j of z (n, m).

    Each f takes two (k,) float64 tensors, inner products and cosines of k pairs, and returns their
    sum, of any shape. The (n, n) matrix is made block by block.
    """
    n, m = z.shape
    norms, inverse = row_norms(z)
    size = max(1, min(1000, 2**25 // m))
    totals = [0.0] * len(functions)
    for i in range(0, n, size):
        a = z[i : i + size].double()
        for j in range(i, n, size):
            products = a @ (a if i == j else z[j : j + size].double()).T
            cosines = products * inverse[i : i + size, None] * inverse[j : j + size]
            off = torch.ones_like(products, dtype=torch.bool)
            if i == j:
                off.fill_diagonal_(False)
            weight = 1 if i == j else 2  # the block (j, i) holds the same
            pairs = products[off], cosines[off]
            totals = [t + weight * f(*pairs) for t, f in zip(totals, functions)]
    return totals


def criterion(z):
    """The criterion over pairs of rows of z (n, m), and what surrounds it; a dict.

    criterion: L_c for embeddings, L_nc for their transpose, of z as it is (Garrido et al. 2023,
    Definition 3.2). fourth: sum of the rows' norms to the fourth. dominance: mean |z_i|^2 over mean
    |<z_i, z_j>|. unit: the same criterion with rows of norm 1; dual, the other one then; lower and
    upper, its bounds by dual (Corollary 3.4.1); to_lower: how many times its least value the sum
    that makes them is, 1 where the lower bound holds. Cosines: mean, std, histogram in [-1, 1];
    uniformity, log mean exp(-2 |z_i - z_j|^2) (Wang and Isola 2020). Rows of zeros count as none.
    """
    n, m = z.shape
    norms, inverse = row_norms(z)
    absolute, squares, total, unit, spread, counts = pair_sums(z, [
        lambda p, c: p.abs().sum(), lambda p, c: p.square().sum(), lambda p, c: c.sum(),
        lambda p, c: c.square().sum(), lambda p, c: torch.exp(4 * c - 4).sum(),
        lambda p, c: torch.histc(c.clamp(-1, 1).float(), 200, -1, 1).double()])
    columns = sum((part.double() * inverse[i * 1000 : (i + 1) * 1000, None]).square().sum(dim=0)
                  for i, part in enumerate(z.split(1000)))  # squared norms (m,), rows of norm 1
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


def alignment(z1, z2):
    """Mean squared distance of the unit vectors of z1, z2 (n, D), two views (Wang, Isola 2020)."""
    z1, z2 = (F.normalize(z.double(), dim=1) for z in (z1, z2))
    return (z1 - z2).square().sum(dim=1).mean().item()


# ==== 8. Runs [own] ===============================================================================
# final: the log's last line, where the run was finished
Run = collections.namedtuple("Run", "name args model data final")


def find_runs(paths):
    """The run folders among paths, and those within the others: {name: folder}, names unlike."""
    folders = []
    for path in map(Path, paths):
        inside = sorted((p.parent for p in path.glob("*/last.pt")), key=lambda folder: (
            PATH.index(folder.name) if folder.name in PATH else len(PATH), folder.name))
        found = [path] if (path / "last.pt").is_file() else inside
        if not path.is_dir():
            fail(f"{path}: no such folder; give run folders of {', '.join(HEADS)}")
        if not found:
            fail(f"{path}: no run there: neither last.pt nor folders that hold one")
        folders += [folder for folder in found if folder not in folders]
    full = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, full)) + 1):  # as much of the path as tells them apart
        names = ["/".join(parts[-length:]) for parts in full]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, folders))


def load_run(name, folder, options, cache):
    """Return the Run in a folder: its network in eval mode, its data; ends where it cannot.

    cache keeps the last data set, which runs have in common.
    """
    try:
        checkpoint = torch.load(folder / "last.pt", map_location="cpu", weights_only=True,
                                mmap=True)
        script, version = checkpoint["method"], checkpoint["format"]
        args = argparse.Namespace(**checkpoint["args"], script=script)
        n, size, classes = checkpoint["data"]
        weights = {part: checkpoint[part] for part in ("backbone", "head", "probe")}
    except Exception as error:  # a damaged or hostile file can raise nearly anything
        fail(f"{folder}: last.pt is damaged or no checkpoint of ours ({type(error).__name__})")
    if version != 2 or script not in HEADS or args.head not in HEADS[script]:
        fail(f"{folder}: a run of {script}.py, format {version}, head {args.head}; this version "
             f"knows format 2 and the heads of {', '.join(HEADS)}")
    for key in ("data", "data_dir"):
        if getattr(options, key):
            setattr(args, key, getattr(options, key))
    key = (args.data, args.data_dir, args.image_size, args.holdout, args.stream,
           args.max_unreadable, tuple(args.crop))
    if key not in cache:
        cache.clear()
        cache[key] = load_data(args)
    data = cache[key]
    found = [len(data.train_images), data.train_images.shape[-1], data.classes]
    if found != [n, size, classes]:
        fail(f"{folder}: trained on {n} images of {size} px, but --data {args.data} holds "
             f"{found[0]} of {found[1]} px; or the classes differ")
    try:
        model = Model(args, size, len(classes))
        for part, state in weights.items():
            getattr(model, part).load_state_dict(state)
    except Exception as error:  # whatever an edited file can bring about
        fail(f"{folder}: last.pt does not fit the network that it names: {error}")
    return Run(name, args, model.eval().to(options.device), data, read_final(folder))


def read_final(folder):
    """The final figures in a run's log.jsonl as a dict, empty where it was not finished."""
    try:
        records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        fail(f"{folder}: log.jsonl cannot be read: {error}")
    return next((record for record in reversed(records) if record.get("final")), {})


@torch.no_grad()
def embed(run, images, device):
    """h (n, F) and z (n, D), float32 on the CPU, of images (n, 3, S, S), uint8 or float, and their
    index (n,): the next readable image takes the place of an unreadable one."""
    out, done, where = None, 0, []
    for x, index in fetch(images, whole_batches(len(images)), device):
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        h = run.model.backbone(x.contiguous(memory_format=torch.channels_last))
        pair = h, run.model.head(h)
        if out is None:  # whole at once: joining the parts would take their memory twice
            out = [torch.empty(len(images), part.shape[1]) for part in pair]
        for whole, part in zip(out, pair):
            whole[done : done + len(x)] = part
        done += len(x)
        where.append(index)
    return *out, torch.cat(where)


def spread(n, k):
    """At most k of n indices, evenly spread: a folder's images are sorted by class."""
    return torch.linspace(0, n - 1, min(k or n, n)).long()


def whole_batches(n):
    """For fetch(): all of n images in batches, not cropped."""
    return ((index, None) for index in torch.arange(n).split(500))


def take(images, index):
    """The images (k, 3, S, S), uint8 on the CPU, that index, a list, names."""
    return next(fetch(images, [(torch.tensor(index), None)], torch.device("cpu")))[0]


def views(run, images, device):
    """The two views (2, n, 3, S, S) that training draws of images, by seed 0."""
    draws = torch.rand(2, len(images), DRAWS, generator=torch.Generator().manual_seed(0))
    index = torch.arange(len(images))
    x, _ = next(fetch(images, [(index, index)], device))  # a Folder crops, image i by seed i
    cropped = x.ndim == 5
    return [augment(x[:, i] if cropped else x, draws[i].to(device), i, run.args, cropped)
            for i in (0, 1)]


def examine(run, wanted, options):
    """Measure one run as the commands in wanted ask; a dict of numbers and lists for JSON."""
    index = spread(len(run.data.test_images), options.limit)
    images, labels = run.data.test_images[index], run.data.test_labels[index]
    final = {name: run.final.get(name) for name in ("knn", "linear", "online", "rank", "seconds")}
    result = {"script": run.args.script, "method": getattr(run.args, "method", run.args.script),
              "head": run.args.head, "data": run.args.data, "images": len(images), "final": final}
    h, z, where = embed(run, images, options.device)
    spaces = {"representation": h, "embedding": z}
    if "nearest" in wanted:
        result["nearest"] = nearest(h, labels[where], options.queries, options.neighbours)
    pairs = []
    if wanted & {"duality", "compare"}:
        few = images[spread(len(images), 1000)]
        pairs = zip(*[embed(run, view, options.device)[:2]
                      for view in views(run, few, options.device)])
    for (space, z), pair in zip(spaces.items(), [*pairs] or [None, None]):
        if not z.isfinite().all():
            fail(f"{run.name}: the {space} of the test images is not finite")
        if options.center:
            z -= z.mean(dim=0)
        mine = result[space] = {"dimensions": z.shape[1], "effective_rank": effective_rank(z)}
        if wanted & {"spectrum", "compare"}:
            values = spectrum(z, not options.raw)
            mine |= {"collapsed": collapsed(values, options.threshold),
                     "participation_ratio": participation_ratio(values),
                     "singular_values": values.tolist()}
        if pair:
            mine |= {"duality": duality(z), "alignment": alignment(*pair)}
    return result


def nearest(h, labels, queries, k):
    """The k nearest of h (n, F) by cosine, itself left out, of `queries` images; a dict of lists.

    The queries are spread over the n images. same: percent of neighbours of their class.
    """
    index = spread(len(h), queries)
    h = F.normalize(h, dim=1)
    similarity = h[index] @ h.T
    similarity[torch.arange(len(index)), index] = -torch.inf
    found = similarity.topk(min(k, len(h) - 1), dim=1).indices
    hits = labels[found] == labels[index][:, None]
    return {"queries": index.tolist(), "neighbours": found.tolist(), "hits": hits.tolist(),
            "same": 100 * hits.float().mean().item()}


def picture(run, found, n, device):
    """Images (queries, 3 + k, 3, S, S) in [0, 1]: each query, its two views, its neighbours.

    found is nearest()'s of n of the test images, or of all.
    """
    images, near = run.data.test_images, found["neighbours"]
    images = images[spread(len(images), n)]
    pair = [view.cpu() for view in views(run, images[found["queries"]], device)]
    shown = [take(images, found["queries"])[:, None], take(images, sum(near, []))]
    queries, rest = (x.float() / 255 for x in shown)
    return torch.cat([queries, torch.stack(pair, dim=1), rest.unflatten(0, (len(near), -1))], dim=1)


# ==== 9. Toy experiments [own] ====================================================================
# DirectCLR's sections 4 and 5: x ~ N(0, I_16), z = W_L ... W_1 x, plain SGD, no normalisation.
# Several settings, R, train at once: weights (R, 16, 16), embeddings (R, N, 16).
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
    own = toy_logits(z1, z2, loss).log_softmax(dim=2).diagonal(dim1=1, dim2=2)
    return -own.mean(dim=1)


def toy_forward(x, weights, relu=False):
    """z (R, N, 16) of x (N, 16) or (R, N, 16); relu (R, 1, 1): which networks rectify between."""
    for i, weight in enumerate(weights):
        x = x if i == 0 else torch.where(torch.as_tensor(relu), F.relu(x), x)
        x = x @ weight.mT
    return x


def toy_init(kind, layers, generator):
    """Weights [(16, 16)] * layers, float64.

    uniform: within 1/4, PyTorch's default. decaying: U diag(exp(-.35 k)) V, the official code's.
    aligned: decaying, each layer's V the U of the one below, as Theorem 3 supposes.
    """
    if kind == "uniform":
        return [torch.rand(WIDTH, WIDTH, generator=generator, dtype=torch.float64) / 2 - 1 / 4
                for _ in range(layers)]
    scale, below, weights = torch.exp(-0.35 * torch.arange(WIDTH, dtype=torch.float64)), None, []
    for _ in range(layers):
        u, v = (torch.linalg.svd(torch.rand(WIDTH, WIDTH, generator=generator,
                                            dtype=torch.float64))[0] for _ in range(2))
        weights.append(u * scale @ (below.T if kind == "aligned" and below is not None else v))
        below = u
    return weights


def toy_train(weights, noise, loss, lr, steps, relu=False, every=100, seed=0):
    """Train weights [(R, 16, 16)] * L in place; yield (step, x, x') before each `every` steps, and
    last.

    noise (R, 16): deviation of the augmentation, on x' for the paper's loss, on both views for the
    code's. Batches of 128 of 10,000 fixed samples; x and x' (R, 128, 16) are the step's batch.
    """
    generator = torch.Generator().manual_seed(seed)
    kind = weights[0].dtype
    samples = torch.randn(10000, WIDTH, generator=generator, dtype=kind)
    for step in range(steps + 1):
        x = samples[torch.randint(10000, (128,), generator=generator)].expand(len(noise), -1, -1)
        e = torch.randn(2, 128, WIDTH, generator=generator, dtype=kind)
        x2 = x + noise[:, None] * e[0]
        if loss == "code":
            x = x + noise[:, None] * e[1]
        if step % every == 0 or step == steps:
            yield step, x, x2
        if step < steps:
            for weight in weights:
                weight.requires_grad_()
            z = toy_forward(torch.cat([x, x2], dim=1), weights, relu)
            total = toy_loss(*z.chunk(2, dim=1), loss).sum()
            gradients = torch.autograd.grad(total, weights)
            with torch.no_grad():
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


def toy_augmentation(steps, seed):
    """Figure 3: one layer, noise on the last eight inputs; strong noise kills as many dimensions.

    Returns rows {loss, noise, singular_values, lemma2}; lemma2 is |G + W X| / |G|.
    """
    deviations, rows = [0.01, 0.5, 1.0, 1.5, 2.0, 3.0], []
    noise = torch.zeros(len(deviations), WIDTH)
    noise[:, WIDTH // 2 :] = torch.tensor(deviations)[:, None]
    for loss, lr in (("paper", 1e-2), ("code", 1e-3)):
        first = toy_init("uniform", 1, torch.Generator().manual_seed(seed))
        weights = [first[0].float().repeat(len(deviations), 1, 1)]
        for _, x1, x2 in toy_train(weights, noise, loss, lr, steps, every=steps, seed=seed):
            pass
        w, x1, x2 = weights[0].double().requires_grad_(), x1.double(), x2.double()
        total = toy_loss(x1 @ w.mT, x2 @ w.mT, "paper").sum()
        gradient = torch.autograd.grad(total, w)[0]
        w = w.detach()
        off = (gradient + w @ toy_x([w], x1, x2)).flatten(1).norm(dim=1)
        off = off / gradient.flatten(1).norm(dim=1)
        for i, deviation in enumerate(deviations):
            rows.append({"loss": loss, "noise": deviation, "lemma2": off[i].item(),
                         "singular_values": torch.linalg.svdvals(w[i]).tolist()})
    return rows


def toy_layers(steps, seed):
    """Figures 5 and 6: two layers, hardly any noise; the singular values over time.

    Returns rows {loss, init, steps, w1, embedding, alignment, balance, grown, grown_alignment}:
    W1's singular values and the logs of the embedding covariance's over time; at the end
    |V2^T U1|, |W1 W1^T - W2^T W2| / |W1 W1^T|, how many of W1's values are above a quarter of the
    largest, and the mean of their |V2^T U1|_kk. For equation 2 besides law, W1's singular values
    as Theorem 3 has aligned layers grow, d s1 = s1 s2^2 (v1^T X v1) dt, added up along the way that
    the weights took; off_law, the largest relative deviation from it at the end.
    """
    inits, rows = ("decaying", "uniform", "aligned"), []
    noise = torch.full((len(inits), WIDTH), 1e-3, dtype=torch.float64)
    for loss, lr in (("paper", 0.1), ("code", 0.01)):
        generator = torch.Generator().manual_seed(seed)
        both = zip(*[toy_init(kind, 2, generator) for kind in inits])
        weights, history = [torch.stack(layer) for layer in both], []
        law = torch.linalg.svdvals(weights[0])
        every = 1 if loss == "paper" else 10
        for step, x1, x2 in toy_train(weights, noise, loss, lr, steps, every=every, seed=seed):
            if step % 100 == 0 or step in (10, 20, 50, steps):
                history.append((step, torch.linalg.svdvals(weights[0]), log_spectrum(weights), law))
            if loss == "paper":
                v1, s2 = torch.linalg.svd(weights[0])[2], torch.linalg.svdvals(weights[1])
                growth = s2**2 * ((v1 @ toy_x(weights, x1, x2)) * v1).sum(dim=2)
                law = law * (1 + lr * growth)
        (u1, s1, _), v2 = torch.linalg.svd(weights[0]), torch.linalg.svd(weights[1])[2]
        first, second = weights[0] @ weights[0].mT, weights[1].mT @ weights[1]
        balance = (first - second).flatten(1).norm(dim=1) / first.flatten(1).norm(dim=1)
        alignment, grown = (v2 @ u1).abs(), s1 > s1[:, :1] / 4
        for i, init in enumerate(inits):
            over = [torch.stack([record[k][i] for record in history]) for k in (1, 2, 3)]
            rows.append({"loss": loss, "init": init, "steps": [record[0] for record in history],
                         "w1": over[0].tolist(), "embedding": over[1].tolist(),
                         "alignment": alignment[i].tolist(), "balance": balance[i].item(),
                         "grown": int(grown[i].sum()),
                         "grown_alignment": alignment[i].diagonal()[grown[i]].mean().item()})
            if loss == "paper":
                off = (over[2][-1] / over[0][-1] - 1).abs().max().item()
                rows[-1] |= {"law": over[2].tolist(), "off_law": off}
    return rows


def toy_depth(steps, seed):
    """Figure 11: one to four layers, linear or with ReLU between; deeper ones collapse further.

    Returns rows {loss, layers, relu, init, log_spectrum, collapsed}: logs of the embedding
    covariance's singular values, and how many are below -8. Each loss has a process of its own.
    """
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, spawn) as pool:
        rows = pool.map(toy_depth_of, ("paper", "code"), (0.1, 0.01), [steps] * 2, [seed] * 2)
        return sum(rows, [])


def toy_depth_of(loss, lr, steps, seed):
    """The rows of toy_depth() of one loss."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    rows = []
    for layers in (1, 2, 3, 4):
        settings = [(relu, init) for relu in (False, True) for init in ("decaying", "uniform")]
        relu = torch.tensor([setting[0] for setting in settings])[:, None, None]
        both = zip(*[toy_init(init, layers, torch.Generator().manual_seed(seed))
                     for _, init in settings])
        weights = [torch.stack(layer).float() for layer in both]
        noise = torch.full((len(settings), WIDTH), 1e-3)
        for _ in toy_train(weights, noise, loss, lr, steps, relu, every=steps, seed=seed):
            pass
        for (rectified, init), values in zip(settings, log_spectrum(weights, relu)):
            rows.append({"loss": loss, "layers": layers, "relu": rectified, "init": init,
                         "log_spectrum": values.tolist(), "collapsed": int((values < -8).sum())})
    return rows


# ==== 10. Commands [own] ==========================================================================
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe, Ito
LINES = ("-", "--", ":", "-.")
SPACES = ("representation", "embedding")


def style(i):
    """The i-th line's colour and dashes, distinct without colour too."""
    return {"color": COLORS[i % len(COLORS)], "linestyle": LINES[i // len(COLORS) % len(LINES)]}


def draw(name, options, rows, columns, size, paint):
    """Draw a figure with paint(axes), axes (rows, columns), into OUT/NAME, if matplotlib is here.
    """
    try:
        import matplotlib
    except ImportError:
        print(f"no figure {name}: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 9, "svg.hashsalt": "0", "axes.spines.top": False,
                            "axes.spines.right": False, "legend.frameon": False}):
        figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False,
                                       layout="constrained")
        paint(axes)
        path = options.out / f"{name}.{options.figure}"
        figure.savefig(path, dpi=150, metadata={"Date": None} if options.figure == "svg" else None)
        pyplot.close(figure)
    print(f"wrote {path}")


def legend_below(axes, columns):
    """One legend for all axes, of all that the first row's show, below the figure."""
    entries = {text: line for axis in axes[0]
               for line, text in zip(*axis.get_legend_handles_labels())}
    axes[0, 0].figure.legend(entries.values(), entries.keys(), loc="outside lower center",
                             ncols=columns, fontsize=7)


def write_json(name, options, results):
    """Write results with what made them to OUT/NAME.json."""
    path = options.out / f"{name}.json"
    record = {"argv": sys.argv, "torch": torch.__version__, "results": results}
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record))
    except OSError as error:
        fail(f"cannot write {path}: {error}")
    print(f"wrote {path}")


def print_table(columns, rows):
    """Print rows, lists of text and numbers, under columns; numbers to the right."""
    cells = [columns, *[[cell(value) for value in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        print("  ".join(text.ljust(width) if i == 0 else text.rjust(width)
                        for i, (text, width) in enumerate(zip(row, widths))))


def cell(value):
    """A table's text for a value: four digits, nothing for None."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def report_spectrum(results, options):
    """Table and figure of the covariance spectra: DirectCLR's Figures 2, 7 and 9."""
    print_table(
        ["run", "space", "dimensions", "effective rank", "participation", "collapsed", "log s_1",
         "log s_last"],
        [[name, space, r[space]["dimensions"], r[space]["effective_rank"],
          r[space]["participation_ratio"], r[space]["collapsed"],
          *[math.log(max(r[space]["singular_values"][i], 1e-300)) for i in (0, -1)]]
         for name, r in results.items() for space in SPACES])

    def paint(axes):
        for axis, space in zip(axes[0], SPACES):
            for i, (name, r) in enumerate(results.items()):
                values = np.maximum(r[space]["singular_values"], 1e-18)
                axis.plot(np.arange(1, len(values) + 1), np.log(values), label=name, **style(i))
            axis.set(title=space, xlabel="index k of the singular value", xscale="log",
                     ylabel=r"$\log \sigma_k$ of the covariance matrix (natural)")
        axes[0, 0].legend(loc="lower left")

    draw("spectrum", options, 1, 2, (8, 3.6), paint)


def report_duality(results, options):
    """Table and figure of both criteria, their bounds, and the cosines that they are made of."""
    rows = []
    for name, r in results.items():
        for space in SPACES:
            d, dim = r[space]["duality"], r[space]["dimensions"]
            samples, dimensions = d["samples"], d["dimensions"]
            rows.append([name, space, dim, d["residual"], samples["unit"], samples["dual"],
                         samples["to_lower"], dimensions["to_lower"],
                         samples["std"] * math.sqrt(dim), samples["dominance"],
                         dimensions["dominance"], r[space]["alignment"], samples["uniformity"]])
    print_table(["run", "space", "D", "residual", "L_c", "L_nc", "to lower", "dual", "std sqrt(D)",
                 "Gram", "covariance", "alignment", "uniformity"], rows)
    print("L_c, L_nc: rows of norm 1. to lower: sum_j |z_.j|^4 over its least value n^2 / D; dual: "
          "sum_i |z_i|^4\nover D^2 / n, columns of norm 1. std: of the cosines of pairs. Gram, "
          "covariance: mean |diagonal| / mean |rest|.")

    def paint(axes):
        x = np.linspace(-0.995, 0.995, 200)
        for row, space in zip(axes, SPACES):
            sides = (("samples", "cosine of two images", r"$\mathcal{N}(0, 1/D)$"),
                     ("dimensions", "cosine of two dimensions", None))
            for axis, (side, label, reference) in zip(row, sides):
                for i, (name, r) in enumerate(results.items()):
                    counts = np.asarray(r[space]["duality"][side]["histogram"])
                    axis.plot(x, counts / max(counts.sum(), 1) / 0.01, label=name, **style(i))
                dims = sorted({r[space]["dimensions"] for r in results.values()})
                for dim, dashes in zip(dims if reference else [], LINES):
                    axis.plot(x, np.exp(-x**2 * dim / 2) * math.sqrt(dim / 2 / math.pi), dashes,
                              color="0.6", linewidth=2, zorder=0, label=f"{reference}, D = {dim}")
                axis.set(title=space, xlabel=label, ylabel="density", yscale="log",
                         ylim=(1e-3, 50))
        legend_below(axes, 4)

    draw("duality", options, 2, 2, (8, 6), paint)


def report_compare(results, options):
    """One table of all runs, as text, Markdown and CSV, and their accuracies as a figure."""
    columns = ["run", "method", "head", "kNN", "linear", "online", "seconds", "rank h", "rank z",
               "collapsed h", "collapsed z", "L_c", "L_nc"]
    rows = []
    for name, r in results.items():
        h, z, final = r["representation"], r["embedding"], r["final"]
        rows.append([name, r["method"], r["head"], final["knn"], final["linear"], final["online"],
                     final["seconds"], h["effective_rank"], z["effective_rank"], h["collapsed"],
                     z["collapsed"], z["duality"]["samples"]["unit"],
                     z["duality"]["samples"]["dual"]])
    print_table(columns, rows)
    lines = [columns, ["---"] * len(columns), *[[cell(value) for value in row] for row in rows]]
    markdown = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    (options.out / "compare.md").write_text(markdown)
    with open(options.out / "compare.csv", "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    print(f"wrote {options.out / 'compare.md'}, {options.out / 'compare.csv'}")

    def paint(axes):
        axis, y = axes[0, 0], np.arange(len(results))[::-1]
        for i, (name, marker) in enumerate((("knn", "o"), ("linear", "s"), ("online", "^"))):
            x = [np.nan if r["final"][name] is None else r["final"][name] for r in results.values()]
            axis.plot(x, y, marker, color=COLORS[i], label=name.replace("knn", "kNN"))
        axis.set(xlabel="accuracy on the test images (%)", ylim=(-0.6, len(results) - 0.4))
        axis.set_yticks(y, list(results))
        axis.grid(axis="y", color="0.9")
        axis.legend(loc="upper center", ncols=3, bbox_to_anchor=(0.5, 1.12))

    draw("compare", options, 1, 1, (6, 1.2 + 0.28 * len(results)), paint)


def report_nearest(results, options, pictures):
    """The share of neighbours of the same class, and a picture of them.

    pictures: {run: images (queries, 3 + k, 3, S, S) in [0, 1]}: image, two views, neighbours.
    """
    print_table(["run", "neighbours", "of the same class (%)"],
                [[name, len(r["nearest"]["neighbours"][0]), r["nearest"]["same"]]
                 for name, r in results.items()])

    def paint(axes):
        for axis, (name, grid), r in zip(axes.flat, pictures.items(), results.values()):
            queries, columns, _, size, _ = grid.shape
            cells = F.pad(grid, (1, 1, 1, 1), value=1.0)  # a white frame
            axis.imshow(cells.permute(0, 3, 1, 4, 2).reshape(queries * (size + 2),
                                                             columns * (size + 2), 3).numpy())
            for row, flags in enumerate(r["nearest"]["hits"]):
                for column, hit in enumerate(flags):
                    if not hit:  # another class: a bar below the image
                        left = (column + 3) * (size + 2)
                        axis.plot([left + 2, left + size - 2], [(row + 1) * (size + 2) - 1.5] * 2,
                                  color=COLORS[1], linewidth=2)
            centers = (np.arange(columns) + 0.5) * (size + 2)
            axis.set_xticks(centers, ["image", "view", "view", *map(str, range(1, columns - 2))])
            axis.set(title=f"{name}: nearest; a bar: another class", yticks=[])
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)

    shape = next(iter(pictures.values())).shape
    draw("nearest", options, len(pictures), 1,
         (0.5 * shape[1] + 0.3, len(pictures) * (0.5 * shape[0] + 0.5)), paint)


def report_toy(options):
    """Run the toy experiments that were asked for; their tables and figures."""
    torch.set_flush_denormal(True)
    for name in options.experiments or TOYS:
        print(f"toy {name}: {options.steps:,} steps, seed {options.seed}", flush=True)
        rows = TOYS[name](options.steps, options.seed)
        write_json(f"toy-{name}", options, rows)
        if name == "augmentation":
            print_table(["loss", "noise", "quiet half", "noisy half", "|G + W X| / |G|"], [
                [r["loss"], r["noise"], *[f"{max(half):.3g} to {min(half):.3g}" for half in
                                          (r["singular_values"][:8], r["singular_values"][8:])],
                 r["lemma2"]] for r in rows])
        elif name == "layers":
            print_table(["loss", "init", "grown", "log s_1", "log s_16", "alignment", "balance",
                         "off the law"], [
                [r["loss"], r["init"], r["grown"], r["embedding"][-1][0], r["embedding"][-1][-1],
                 r["grown_alignment"], r["balance"], r.get("off_law")] for r in rows])
        else:
            print_table(["loss", "layers", "between", "init", "below -8", "log s_1", "log s_16"], [
                [r["loss"], r["layers"], "ReLU" if r["relu"] else "nothing", r["init"],
                 r["collapsed"], r["log_spectrum"][0], r["log_spectrum"][-1]] for r in rows])
        draw(f"toy-{name}", options, *PAINTERS[name][0], lambda axes: PAINTERS[name][1](axes, rows))


def paint_augmentation(axes, rows):
    """Figure 3: W's singular values for each strength of the noise, one panel a loss."""
    for axis, loss in zip(axes[0], ("paper", "code")):
        for i, r in enumerate(r for r in rows if r["loss"] == loss):
            values = np.maximum(r["singular_values"], 1e-9)
            axis.plot(range(1, WIDTH + 1), np.log(values), marker=".", label=r["noise"], **style(i))
        axis.set(xlabel="index k of the singular value", ylabel=r"$\log \sigma_k$ of W (natural)",
                 xticks=(1, 4, 8, 12, 16),
                 title={"paper": "equation 2", "code": "official code's loss"}[loss])
    axes[0, 0].legend(title="noise, std", loc="lower left", fontsize=7)


def paint_layers(axes, rows):
    """Figures 5 and 6: singular values of W1 and of the embedding over time, and |V2^T U1|."""
    for row, r in zip(axes, rows):
        title = f"{'equation 2' if r['loss'] == 'paper' else 'official code'}, {r['init']}"
        steps = np.maximum(r["steps"], 5)  # step 0 at the left edge of the logarithmic axis
        for k in range(WIDTH):
            color = {"color": str(0.7 * k / WIDTH)}
            row[0].plot(steps, np.log(np.array(r["w1"])[:, k]), linewidth=1, **color)
            row[1].plot(steps, np.array(r["embedding"])[:, k], linewidth=1, **color)
            if "law" in r and r["init"] == "aligned":
                row[0].plot(steps, np.log(np.array(r["law"])[:, k]), linestyle="--", linewidth=1,
                            color=COLORS[1], label="Theorem 3" if k == 0 else None)
                row[0].legend(loc="upper left", fontsize=7, frameon=True, edgecolor="none")
        row[0].set(title=title, ylabel=r"$\log \sigma_k$ of $W_1$", xlabel="step", xscale="log")
        row[1].set(ylabel=r"$\log \sigma_k$ of the embedding", xlabel="step", xscale="log")
        shown = row[2].imshow(r["alignment"], vmin=0, vmax=1, cmap="cividis",
                              extent=(0.5, WIDTH + 0.5, WIDTH + 0.5, 0.5))
        row[2].set(title=r"$|V_2^T U_1|$ at the end", xlabel="k", ylabel="k'")
        row[2].figure.colorbar(shown, ax=row[2])


def paint_depth(axes, rows):
    """Figure 11: the embedding's spectrum for one to four layers."""
    for line, loss in zip(axes, ("paper", "code")):
        for axis, relu in zip(line, (False, True)):
            for r in (r for r in rows if (r["loss"], r["relu"]) == (loss, relu)):
                dashes = "-" if r["init"] == "uniform" else ":"
                axis.plot(range(1, WIDTH + 1), r["log_spectrum"], dashes, marker=".",
                          color=COLORS[r["layers"] - 1], label=f"L = {r['layers']}, {r['init']}")
            axis.set(title=f"{'equation 2' if loss == 'paper' else 'official code'}, "
                           f"{'ReLU' if relu else 'linear'}", xlabel="index k",
                     xticks=(1, 4, 8, 12, 16),
                     ylabel=r"$\log \sigma_k$ (natural)")
    legend_below(axes, 4)


TOYS = {"augmentation": toy_augmentation, "layers": toy_layers, "depth": toy_depth}
PAINTERS = {"augmentation": ((1, 2, (8, 3.4)), paint_augmentation),
            "layers": ((6, 3, (9, 14)), paint_layers), "depth": ((2, 2, (8, 6)), paint_depth)}
REPORTS = {"spectrum": report_spectrum, "duality": report_duality, "compare": report_compare}
COMMANDS = ("all", "spectrum", "duality", "compare", "nearest", "toy")


def whole(text):
    """An argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def parse_args(argv=None):
    """Parse the command line; without a command it is all, on runs."""
    argv = sys.argv[1:] if argv is None else [*argv]
    if argv and argv[0] not in COMMANDS and argv[0] not in ("-h", "--help"):
        argv = ["all", *argv]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in zip(COMMANDS, ("the next four; also without a command", "singular values",
                                     "both criteria of the duality", "one table of many runs",
                                     "nearest neighbours and views", "the toy experiments")):
        command = commands.add_parser(
            name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.error, add = fail, command.add_argument
        if name == "toy":
            add("experiments", nargs="*", metavar="EXPERIMENT", default=[*TOYS],
                help=f"{', '.join(TOYS)}; without one, all")
            add("--steps", type=whole, default=10000, help="of SGD; 10,000 are the official code's")
            add("--seed", type=int, default=0, help="decides every random choice")
        else:
            add("runs", nargs="+", metavar="RUN", help="a run folder, or a folder of run folders")
            add("--data", help="where the runs' data are now; default: where they were")
            add("--data-dir", help="the same for downloaded data sets")
            add("--device", default="cpu", help="for the networks; sums are on the CPU")
            add("--limit", type=whole, help="so many test images, evenly spread")
            add("--center", action="store_true", help="subtract the mean over the images first")
            add("--raw", action="store_true", help="spectra of h and z as they are, not of norm 1")
            add("--threshold", type=float, default=1e-6,
                help="a singular value below this fraction of the largest counts as collapsed")
            add("--queries", type=whole, default=6, help="images whose neighbours are drawn")
            add("--neighbours", type=whole, default=8, help="of each image")
        add("--out", type=Path, default=Path("runs/analysis"), help="folder for what is written")
        add("--figure", choices=("svg", "png"), default="svg", help="format of the figures")
    options = parser.parse_args(argv)
    unknown = set(getattr(options, "experiments", ())) - TOYS.keys()
    if unknown:
        fail(f"toy: no experiment {', '.join(sorted(unknown))}; there are {', '.join(TOYS)}")
    return options


def main(argv=None):
    """Do what the command line asks; the results as written to JSON, {run: numbers}."""
    options = parse_args(argv)
    if options.command == "toy":
        return report_toy(options)
    wanted = set(COMMANDS[1:5]) if options.command == "all" else {options.command}
    try:
        options.device = torch.device(options.device)
        torch.zeros(1, device=options.device).cpu()
    except Exception as error:  # each backend has exceptions of its own
        fail(f"--device {options.device}: cannot be used ({str(error).splitlines()[0]})")
    folders, cache, results, pictures = find_runs(options.runs), {}, {}, {}
    for i, (name, folder) in enumerate(folders.items()):
        print(f"[{i + 1}/{len(folders)}] {name}", flush=True)
        run = load_run(name, folder, options, cache)
        results[name] = examine(run, wanted, options)
        if "nearest" in wanted:
            pictures[name] = picture(
                run, results[name]["nearest"], options.limit, options.device)
    for name in COMMANDS[1:5]:
        if name in wanted:
            print(f"\n{name}, {next(iter(results.values()))['images']:,} test images")
            write_json(name, options, results)
            if name == "nearest":
                report_nearest(results, options, pictures)
            else:
                REPORTS[name](results, options)
    return results


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
