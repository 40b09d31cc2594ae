"""DirectCLR in one file: contrastive learning on a slice of the representation, no projector.

Contrastive learning without a projector collapses: the representation spans few dimensions. The
paper finds that a linear projector prevents it by being low-rank and diagonal, and that nothing of
it needs to be learned: the loss acts on the first d0 features of h = f(x), the other features are
reached through the backbone's last residual block.

    z = h[:, :d0] / |h[:, :d0]|
    loss = mean over i of  -log [exp(z_i z'_i / t) / sum_j exp(z_i z'_j / t)]
           averaged with the same, the views z and z' swapped

    Jing, Vincent, LeCun, Tian, Understanding dimensional collapse in contrastive self-supervised
        learning, ICLR 2022; --head gives every row of its Tables 1 and 2

Run     python directclr.py --data shapes                drawn images, a few minutes on a CPU
        python directclr.py --epochs 100                 CIFAR-10, ResNet-18
        python directclr.py --head linear                a row of the paper's tables
        python directclr.py --resume RUN                 go on after a stop
Copy    info_nce(z1, z2, temperature)
Shapes  N images in the batch (of all processes), V views, C H W image, F features of the backbone,
        D dims of the embedding; h (N, F) representation, z1 z2 (N, D) embeddings
Leaves  runs/NAME/log.jsonl, last.pt (everything to go on), backbone.pt (torchvision's names)

Differs from the paper: its printed loss leaves out the temperature, the minus sign and the other
view; here as in the official code, negatives from the other view only. CIFAR-10 recipe: SGD instead
of LARS, grayscale .1 instead of .2, no blur, no solarisation, all of it flags.
"""

# ==== 1. Imports [shared] =========================================================================
import argparse
import collections
import contextlib
import copy
import datetime
import itertools
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize, resized_crop


# ==== 2. Method [method] ==========================================================================
METHOD = "directclr"
VARIANT, VARIANTS = "head", {  # the rows of the paper's tables, with its ImageNet accuracies
    "slice": "the first d0 features (DirectCLR, 62.7)",
    "none": "all features (51.5)",
    "linear": "a trainable matrix (61.1)",
    "mlp": "two layers with BatchNorm (SimCLR, 66.5)",
    "diagonal": "a trainable factor for each feature (60.2)",
    "orthogonal": "a trainable orthogonal matrix (52.2)",
    "lowrank": "a fixed matrix of d0 singular values one, the others zero (62.3)",
    "random": "d0 features drawn anew at each step (43.0)",
    "group": "random groups of d0 features, drawn anew at each step, their losses summed",
}


def add_method_args(parser):
    """Add the flags, and the defaults of flags, in which the methods differ."""
    parser.add_argument("--dim", type=number(int, 1), default=128,
                        help="d0, features that the loss acts on; the output of linear and mlp; "
                             "all features for none, diagonal, orthogonal")
    parser.add_argument("--head", choices=(*VARIANTS, "all"), default="slice",
                        help="; ".join(map(": ".join, VARIANTS.items())) + "; all: each in turn")
    parser.add_argument("--temperature", type=number(float, 0, above=True), default=0.1,
                        help="t, divides the cosine similarities")
    parser.add_argument("--lr", type=number(float, 0, above=True), default=0.06,
                        help="learning rate for a batch of 256; scales with --batch-size")


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


def build_head(num_features, args):
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


def info_nce(z1, z2, temperature=0.1):
    """Symmetric InfoNCE of the embeddings z1, z2 (N, D) of two views; a scalar.

    Each embedding's positive is the image's other view, its N - 1 negatives the other view's other
    images (official code; the paper prints no temperature and one direction). Half precision is
    raised to float32; call it outside autocast.
    """
    z1, z2 = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (z1, z2))
    similarity = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).T / temperature  # (N, N)
    positive = torch.arange(len(z1), device=z1.device)
    return (F.cross_entropy(similarity, positive) + F.cross_entropy(similarity.T, positive)) / 2


def loss_fn(z1, z2, args):
    """Return the loss of the global batch, z1 z2 (N, D), and its parts as a dict of scalars."""
    if args.head not in ("random", "group"):
        return info_nce(z1, z2, args.temperature), {}
    groups = torch.randperm(z1.shape[1], device=z1.device).split(args.dim)
    groups = groups[:1] if args.head == "random" else groups
    return sum(info_nce(z1[:, g], z2[:, g], args.temperature) for g in groups), {}


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


# ==== 7. Optimiser, schedule [shared] =============================================================
class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled, a weight at a time, to eta |w| / |gradient|.

    You et al. 2017, as in VICReg's official code: weight decay enters the gradient first, tensors
    of one dimension (biases, BatchNorm) and groups with eta 0 get neither decay nor scaling.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, eta=0.001):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, eta=eta))

    @torch.no_grad()
    def step(self):
        """Update every parameter that has a gradient; grouped kernels, no synchronisation."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            update = [p.grad for p in params]
            scaled = [i for i, p in enumerate(params) if p.ndim > 1 and group["eta"]]
            if scaled:
                weights, gradients = [params[i] for i in scaled], [update[i] for i in scaled]
                steps = torch._foreach_add(gradients, weights, alpha=group["weight_decay"])
                w, u = (torch.stack(torch._foreach_norm(t)) for t in (weights, steps))
                ratio = torch.where((w > 0) & (u > 0), group["eta"] * w / u, 1.0)
                torch._foreach_mul_(steps, list(ratio.unbind()))
                for i, step in zip(scaled, steps):
                    update[i] = step
            for p in params:
                if p not in self.state:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum"] for p in params]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, update)
            torch._foreach_add_(params, momenta, alpha=-group["lr"])


def build_optimizer(model, args):
    """SGD or LARS for backbone and head; for the online probe plain SGD at a rate of its own."""
    lr = args.lr * args.batch_size / 256
    groups = [{"params": [*model.backbone.parameters()], "lr": lr},
              {"params": [*model.head.parameters()], "lr": lr * (args.head_lr or 1)},
              {"params": model.probe.parameters(), "lr": 0.1, "weight_decay": 0.0, "eta": 0.0}]
    groups = [group for group in groups if group["params"]]  # a head may have no parameters
    kind = torch.optim.SGD if args.optimizer == "sgd" else LARS
    optimizer = kind(groups, lr, momentum=args.momentum, weight_decay=args.weight_decay)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def set_learning_rate(optimizer, step, steps, warmup):
    """Linear warm-up over the first warmup steps, then a cosine to zero at the last."""
    if step < warmup:
        factor = (step + 1) / warmup
    else:
        factor = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


# ==== 8. Runtime [shared] =========================================================================
DIVERGED = 3  # exit code where the loss or a weight is not finite


def fail(message, code=2):
    """End the program with one line on what was wrong and an exit code."""
    print(f"{METHOD}.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(code)


def choose_device(args):
    """Return the device and the autocast dtype, None for float32, that args ask for.

    Float32 on a GPU keeps PyTorch's defaults: convolutions in TF32, matrix products in full. Of
    several processes on a machine each takes the GPU of its local rank.
    """
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True, warn_only=True)
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        fail("--device cuda: PyTorch sees no CUDA device here; leave the flag out or say cpu")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except Exception as error:  # each backend has exceptions of its own
        fail(f"--device {name}: cannot be used here ({str(error).splitlines()[0]})")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    precision = args.precision
    if precision == "auto":
        level = capability(device)
        precision = "bf16" if level >= 8 else "fp16" if level >= 7 else "fp32"
    if precision == "fp16" and device.type == "cpu":
        fail("--precision fp16 needs a GPU; on a CPU say bf16 or fp32")
    return device, {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]


def capability(device):
    """Major compute capability of a CUDA device, 0 for others; 7 has tensor cores and Triton."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def join_processes(args):
    """Join the processes that torchrun started along with this one, if it did; as processes()."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % world or args.batch_size < 2 * world:
        fail(f"--batch-size {args.batch_size} is for all processes: a multiple of their number, "
             f"{world}, and two images each")
    if world > 1 and not dist.is_initialized():  # NCCL for GPUs, gloo for CPUs
        dist.init_process_group(timeout=datetime.timedelta(hours=3))
    return processes()


def processes():
    """The rank of this process and the number of processes: 0 and 1 without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(x):
    """x (n, ...) of all processes, (N, ...); its gradient reaches this process's own part alone."""
    rank, world = processes()
    if world == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(parts, x.detach().contiguous())
    parts[rank] = x
    return torch.cat(parts)


def agree(caught):
    """The first signal that any process caught, or None; waits for all processes."""
    signum = torch.tensor(caught[0] if caught else 0)
    if dist.is_initialized():
        dist.all_reduce(signum, dist.ReduceOp.MAX)
    return signum.item() or None


def make_run_folder(args):
    """Create and return --out, or runs/METHOD-VARIANT-DATA, numbered where it is taken."""
    variant = getattr(args, VARIANT)
    names = [METHOD, *([] if variant == next(iter(VARIANTS)) else [variant])]
    name = args.out or f"runs/{'-'.join([*names, Path(args.data).resolve().name])}"
    for number in itertools.count(1):
        out = Path(name if number == 1 else f"{name}-{number}")
        try:
            out.mkdir(parents=True, exist_ok=bool(args.out))
            return out
        except FileExistsError as error:
            if args.out or not out.is_dir():
                fail(f"cannot make the run folder {out}: {error}")
        except OSError as error:
            fail(f"cannot make the run folder {out}: {error}")


def save(value, path):
    """torch.save under a temporary name, then rename: a crash leaves the old file or the new."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        fail(f"cannot write {path}: {error}; what was saved before is still there")


CHECKPOINT = {  # what last.pt holds; data: number of images, their size, the classes
    "format": int, "method": str, "args": dict, "data": list, "step": int, "seconds": float,
    "history": list, "untrained": dict, "log_bytes": int, "backbone": dict, "head": dict,
    "probe": dict, "optimizer": dict, "scaler": dict}


def load_checkpoint(run):
    """Read RUN/last.pt, tensors and numbers only: no code in it can run. Ends where it cannot."""
    path = Path(run) / "last.pt"
    if not path.is_file():
        fail(f"--resume {run}: no last.pt there")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        method, version = checkpoint["method"], checkpoint["format"]
        if not all(isinstance(checkpoint[name], kind) for name, kind in CHECKPOINT.items()):
            raise TypeError("an entry of the wrong kind")
    except Exception as error:  # a damaged or hostile file can raise nearly anything
        fail(f"--resume {run}: last.pt is damaged or no checkpoint of ours "
             f"({type(error).__name__})")
    if (method, version) != (METHOD, 2):
        fail(f"--resume {run}: a run of {method}.py (format {version}), not of {METHOD}.py (2)")
    return checkpoint


def save_checkpoint(model, optimizer, scaler, run, state):
    """Write last.pt, everything to go on with, from process 0."""
    if processes()[0]:
        return
    save({"format": 2, "method": METHOD, **state,
          "log_bytes": run.file.tell(), "backbone": model.backbone.state_dict(),
          "head": model.head.state_dict(), "probe": model.probe.state_dict(),
          "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()},
         run.folder / "last.pt")


def restore(checkpoint, model, optimizer, scaler, state):
    """Put a checkpoint back into the objects that save_checkpoint took it from."""
    if checkpoint["data"] != state["data"]:
        fail("--data holds {} images of {} px, the run's {} of {} px; or the classes differ".format(
            *state["data"][:2], *checkpoint["data"][:2]))
    try:
        for name in ("backbone", "head", "probe"):
            getattr(model, name).load_state_dict(checkpoint[name])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:  # empty where the run had none, on another device
            scaler.load_state_dict(checkpoint["scaler"])
        state.update({name: checkpoint[name] for name in state})
        device = next(model.parameters()).device
        state["history"] = [row.to(device) for row in state["history"]]
    except Exception as error:  # whatever an edited file can bring about
        fail(f"last.pt does not fit this run: {error}")


def derive_seed(*keys):
    """One 64-bit seed from whole numbers.

    Every draw is a function of (seed, stream, epoch or step): no generator's state needs saving,
    and a resumed run draws what it would have drawn.
    """
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0])


def environment(device):
    """What a log needs to be understood later: command, versions, machine, commit."""
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True,
            text=True, cwd=Path(__file__).resolve().parent).stdout.strip() or None
    except OSError:
        commit = None
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"argv": sys.argv, "python": platform.python_version(), "torch": torch.__version__,
            "torchvision": torchvision.__version__, "numpy": np.__version__, "gpu": gpu,
            "cpu": platform.machine(), "threads": torch.get_num_threads(), "commit": commit}


class Run:
    """A run folder being written: log.jsonl, last.pt; and what the console shows meanwhile.

    Of several processes only the first writes and prints; the others' folder is None.
    """

    def __init__(self, folder, log_bytes=None):
        self.folder, self.live = folder, 0
        path = folder / "log.jsonl" if folder else Path(os.devnull)
        if log_bytes and path.is_file():  # what was logged after the checkpoint comes again
            os.truncate(path, min(log_bytes, path.stat().st_size))
        self.file = open(path, "a" if log_bytes else "w", buffering=1)

    def log(self, record):
        self.file.write(json.dumps(record) + "\n")

    def print(self, text, live=False):
        """Print a line; a live one shows on a terminal only, and the next one replaces it."""
        if self.folder is None or (live and not sys.stdout.isatty()):
            return
        if live:
            text = text[: shutil.get_terminal_size().columns - 1]
        print("\r" * bool(self.live) + text.ljust(self.live), end="" if live else "\n", flush=True)
        self.live = len(text) if live else 0


@contextlib.contextmanager
def catch_signals(run):
    """Collect SIGINT and SIGTERM in a list, to stop between two steps; a second one ends a single
    process at once, while torchrun passes on what the others had too."""
    caught, before = [], {}

    def handle(signum, frame):
        caught.append(signum)
        if not dist.is_initialized():
            signal.signal(signum, before[signum])
        run.print("stopping after this step; once more to stop at once")

    for signum in (signal.SIGINT, signal.SIGTERM):
        before[signum] = signal.signal(signum, handle)
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


# ==== 9. Training [shared] ========================================================================
FREE = ("data", "data_dir", "device", "compile", "deterministic", "eval_every", "save_every",
        "workers", "max_unreadable")


def number(kind, low, high=math.inf, above=False):
    """An argparse type: a finite int or float from low to high; above: greater than low."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or not value <= high or value == math.inf:
            name = "a whole number" if kind is int else "a number"
            bound = f"above {low}" if above else f"of at least {low}"
            bound += f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} {bound}")
        return value

    return parse


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Names each default after its help, but for those that the help itself tells."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def parse_args(argv=None):
    """Parse the command line; with --resume the run's own arguments, which must not be gainsaid."""
    fraction = number(float, 0, 1)
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=Help)
    parser.error = fail
    add_method_args(parser.add_argument_group("method"))
    add = parser.add_argument_group("data and backbone").add_argument
    add("--data", default="cifar10", help="cifar10, cifar100, stl10, shapes or a folder of images")
    add("--data-dir", default="data", help="where downloaded data sets are kept")
    add("--image-size", type=number(int, 8), help="pixels, for folders; default: the first image's")
    add("--stream", action=argparse.BooleanOptionalAction,
        help="read a folder's images when they are needed; default: where they take over 4 GiB")
    add("--max-unreadable", type=number(int, 0), default=0,
        help="unreadable images of a folder that are named and skipped, by each process")
    add("--holdout", type=number(int, 0), default=0,
        help="evaluate on this many training images, held out, instead of the test set")
    add("--arch", choices=("convnet", "resnet18", "resnet34", "resnet50"),
        help="default: convnet for shapes, else resnet18")
    add = parser.add_argument_group("augmentation (two values: one for each view)").add_argument
    add("--crop", type=fraction, nargs=2, default=[0.2, 1.0], help="smallest and largest area")
    add("--flip", type=fraction, default=0.5, help="probability")
    add("--jitter", type=number(float, 0), nargs=4, default=[0.4, 0.4, 0.4, 0.1],
        help="strength for brightness, contrast, saturation, hue")
    add("--jitter-prob", type=fraction, default=0.8, help="probability")
    add("--gray", type=fraction, default=0.1, help="probability of grayscale")
    add("--blur", type=fraction, nargs="+", default=[0.0], help="probability of Gaussian blur")
    add("--solarize", type=fraction, nargs="+", default=[0.0], help="probability of solarisation")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=number(int, 1), help="default: 15 for shapes, else 100")
    add("--steps", type=number(int, 1), help="stop after this many steps in all, as in a dry run")
    add("--batch-size", type=number(int, 2),
        help="images, of all processes; default: 128 for shapes, else 512")
    add("--optimizer", choices=("sgd", "lars"), default="sgd", help="LARS is the ImageNet recipes'")
    add("--head-lr", type=number(float, 0, above=True),
        help="learning rate of the head over the backbone's; default: 1, less for wide expanders")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="momentum")
    add("--weight-decay", type=number(float, 0), default=5e-4, help="weight decay")
    add("--warmup", type=number(float, 0), help="epochs of linear warm-up; default: a tenth of all")
    add("--seed", type=number(int, 0), default=0, help="decides every random choice")
    add = parser.add_argument_group("run").add_argument
    add("--out", help="run folder; default: runs/METHOD-VARIANT-DATA, numbered where it is taken")
    add("--resume", metavar="RUN", help="go on with the run in this folder")
    add("--device", help="cuda, cpu, ...; default: cuda where there is one")
    add("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto",
        help="auto: bf16 or fp16 on a GPU, whichever it does well, fp32 on a CPU")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on a GPU")
    add("--deterministic", action=argparse.BooleanOptionalAction, default=False,
        help="repeat a run bit for bit on a GPU too: slower kernels, nothing compiled by default")
    add("--eval-every", type=number(int, 1), help="epochs between kNN; default: a tenth of all")
    add("--save-every", type=number(float, 0), default=60.0, help="seconds between checkpoints")
    add("--workers", type=number(int, 1), help="processes that read a folder for each that trains",
        default=min(16, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) or 1))
    args = complete(parser.parse_args(argv))
    if args.resume is None and args.out and (Path(args.out) / "last.pt").exists():
        fail(f"--out {args.out} holds a run; choose another, or --resume {args.out} to go on")
    if args.resume is not None:
        saved = load_checkpoint(args.resume)["args"]
        try:
            typed = complete(parser.parse_args(argv, argparse.Namespace(**saved)))
            known = saved.keys() | {"resume", "steps"} == vars(args).keys()
        except (AttributeError, TypeError):  # an edited file: arguments missing, or of another kind
            known = False
        if not known:
            fail(f"--resume {args.resume}: last.pt holds other arguments than this script's")
        wrong = [f"--{k.replace('_', '-')} {getattr(typed, k)} (the run's: {v})"
                 for k, v in saved.items() if k not in FREE and getattr(typed, k) != v]
        if wrong:
            fail(f"--resume {args.resume} takes the run's own flags; remove {', '.join(wrong)}")
        args = typed
    return args


def complete(args):
    """Fill in the defaults that depend on --data; check what one flag's type cannot."""
    small = args.data == "shapes"
    args.arch = args.arch or ("convnet" if small else "resnet18")
    args.epochs = args.epochs or (15 if small else 100)
    args.batch_size = args.batch_size or (128 if small else 512)
    args.eval_every = args.eval_every or math.ceil(args.epochs / 10)
    args.warmup = args.epochs / 10 if args.warmup is None else args.warmup
    for name in ("blur", "solarize"):
        if len(getattr(args, name)) > 2:
            fail(f"--{name} takes one value, or two: one for each view")
        setattr(args, name, (getattr(args, name) * 2)[:2])
    if not 0 < args.crop[0] <= args.crop[1]:
        fail(f"--crop {args.crop[0]} {args.crop[1]}: two areas above 0, the smaller one first")
    if args.jitter[3] > 0.5:
        fail(f"--jitter: a hue of {args.jitter[3]} is more than half a turn; at most 0.5")
    return args


def represent(backbone, images, labels, index, device):
    """Representations (n, F) and labels (n,) of images[index]; every process sees to a share."""
    rank, world = processes()
    share, found = math.ceil(len(index) / world), []
    mine = index[torch.arange(rank * share, (rank + 1) * share) % len(index)]

    def batches():
        for batch, where in fetch(images, ((part, None) for part in mine.split(500)), device):
            found.append(labels[where].to(device))
            yield batch

    features = extract_features(backbone, batches(), share)
    return gather(features)[: len(index)], gather(torch.cat(found))[: len(index)]


def evaluate(model, data, device, linear):
    """Measure the frozen representation on the test images; a dict of accuracies in percent.

    knn; online, the probe trained along; rank, the effective rank; linear, if asked. Parameters and
    the first process's buffers stay as they are.
    """
    for buffer in model.buffers() if dist.is_initialized() else ():
        dist.broadcast(buffer, 0)  # on CPUs each process has BatchNorm's statistics of its own
    known = torch.where(data.train_labels >= 0)[0]
    every = torch.arange(len(data.test_labels))
    train = represent(model.backbone, data.train_images, data.train_labels, known, device)
    test = represent(model.backbone, data.test_images, data.test_labels, every, device)
    metrics = {"knn": knn_accuracy(*train, *test)}
    model.probe.eval()
    with torch.no_grad():
        hits = model.probe(test[0]).argmax(1) == test[1]
        metrics["online"] = 100 * hits.float().mean().item()
    model.probe.train()
    metrics["rank"] = effective_rank(test[0])
    if linear:
        metrics["linear"] = linear_probe(*train, *test)
    return {name: round(value, 2) for name, value in metrics.items()}


def schedule(images, args, first, last):
    """For each step from first to last: index (n,) of this process's images, and seeds (n,) for
    their crops, which a Folder needs."""
    rank, world = processes()
    size, generator = args.batch_size // world, torch.Generator()
    for step in range(first, last):
        epoch, position = divmod(step, len(images) // args.batch_size)
        if position == 0 or step == first:
            generator.manual_seed(derive_seed(args.seed, 1, epoch))
            order = torch.randperm(len(images), generator=generator).to(images.device)
        generator.manual_seed(derive_seed(args.seed, 3, step))
        seeds = torch.randint(2**63 - 1, (args.batch_size,), generator=generator)
        start = position * args.batch_size + rank * size
        yield order[start : start + size], seeds[rank * size : (rank + 1) * size]


def train_step(model, optimizer, scaler, view, images, labels, args, dtype):
    """One update on this process's images, uint8 (n, 3, S, S), or a Folder's pairs of crops
    (n, 2, 3, S, S), and labels (n,); returns loss and parts of the global batch, not waiting."""
    (rank, world), n, cropped = processes(), len(images), images.ndim == 5
    draws = torch.rand(2, world * n, DRAWS, device=images.device)[:, rank * n : (rank + 1) * n]
    views = [view(images[:, i] if cropped else images, draws[i], i, args, cropped)
             .contiguous(memory_format=torch.channels_last) for i in (0, 1)]
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        outputs = model(*views)
    z1, z2, logits = (gather(output.float()) for output in outputs)  # (N, ..)
    labels = gather(labels)
    loss, parts = loss_fn(z1, z2, args)
    online = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-1)
    online = online / (labels >= 0).sum().clamp(min=1)
    optimizer.zero_grad(set_to_none=True)
    # each process has the gradient of its own images; DistributedDataParallel takes the mean
    scaler.scale(world * (loss + online)).backward()
    scaler.step(optimizer)
    scaler.update()
    return {"loss": loss.detach(), **parts, "probe": online.detach()}


def train(model, optimizer, scaler, data, args, dtype, run, state):
    """Train from state["step"] to the end, keeping state; None, or the signal that stopped it."""
    images, labels, device = data.train_images, data.train_labels, next(model.parameters()).device
    epoch_steps = len(images) // args.batch_size
    steps = args.epochs * epoch_steps
    first, last = state["step"], min(steps, args.steps or steps)
    view, network = augment, model
    compiles = capability(device) >= 7 and not args.deterministic
    if args.compile or (args.compile is None and compiles):
        view = torch.compile(augment)
        if args.compile or not dist.is_initialized():  # SyncBatchNorm would break it to pieces
            model.compile()
    if dist.is_initialized():
        network = nn.parallel.DistributedDataParallel(model)
    start = shown = saved = epoch_start = time.time()
    before, epoch_first = state["seconds"], first % epoch_steps
    batches = fetch(images, schedule(images, args, first, last), device)
    with catch_signals(run) as caught:
        for step, (batch, index) in zip(range(first, last), batches):
            epoch, position = divmod(step, epoch_steps)
            if position == 0:
                state["history"], epoch_start, epoch_first = [], time.time(), 0
            set_learning_rate(optimizer, step, steps, round(args.warmup * epoch_steps))
            torch.manual_seed(derive_seed(args.seed, 2, step))
            parts = train_step(network, optimizer, scaler, view, batch,
                               labels[index].to(device, non_blocking=True), args, dtype)
            state["history"].append(torch.stack([*parts.values()]))
            state["step"], now = step + 1, time.time()
            ends, final = position + 1 == epoch_steps, step + 1 == last
            due, stop = now - saved >= args.save_every, agree(caught)
            if not (ends or final or due or stop or now - shown >= 0.5):
                continue
            # only here does the loop wait for the device
            record = dict(zip(parts, mean_history(state["history"], parts, epoch, epoch_steps)))
            now = shown = time.time()
            state["seconds"] = before + now - start
            speed = args.batch_size * (position + 1 - epoch_first) / (now - epoch_start)
            left = (now - start) / (step + 1 - first) * (last - step - 1)
            left = f"{datetime.timedelta(seconds=round(left))} left"
            text = "  ".join(f"{name} {value:.4g}" for name, value in record.items())
            epoch_text = f"epoch {epoch + 1:3d}/{args.epochs}"
            if not (ends or final):  # what matters first: a narrow terminal cuts the rest
                run.print(f"{epoch_text}  step {position + 1}/{epoch_steps}  {left}  {text}", True)
            if ends or final or due or stop:
                check_weights(model, state)
            if ends and (epoch + 1) % args.eval_every == 0 and not final:
                record |= evaluate(model, data, device, linear=False)
                text += f"  kNN {record['knn']:.1f}  online {record['online']:.1f}"
            if ends or final:
                run.print(f"{epoch_text}  {text}  {speed:,.0f} images/s  {left}")
            if ends:
                run.log({"epoch": epoch + 1, "step": step + 1, **record,
                         "lr": optimizer.param_groups[0]["lr"], "images_per_second": round(speed),
                         "seconds": round(state["seconds"], 1)})
            if final or due or stop:
                save_checkpoint(model, optimizer, scaler, run, state)
                saved = time.time()
            if stop:
                break
        stop = agree(caught)  # a process that ends before the first has saved would end that too
    return stop


def check_weights(model, state):
    """End the program where a weight or a buffer is not finite: such a state is never saved."""
    tensors = [t for t in model.state_dict().values() if t.is_floating_point()]
    if not torch.stack(torch._foreach_norm(tensors)).isfinite().all():
        fail(f"weights are not finite after step {state['step']}; the last checkpoint stays; "
             "try a smaller --lr or --precision fp32", DIVERGED)


def mean_history(history, names, epoch, epoch_steps):
    """Means over this epoch's steps of the loss and its parts; ends where one is not finite."""
    values = torch.stack(history).cpu()  # (steps, parts)
    bad = torch.where(~values.isfinite().all(1))[0]
    if len(bad):
        parts = ", ".join(f"{name} {value:.4g}" for name, value in zip(names, values[bad[0]]))
        fail(f"the loss is not finite in epoch {epoch + 1}, step {int(bad[0]) + 1} of {epoch_steps}"
             f": {parts}; the last checkpoint stays; try a smaller --lr or --precision fp32",
             DIVERGED)
    return values.mean(0).tolist()


def summary(name, metrics):
    """One line of a table with the accuracies in percent and the effective rank."""
    return "{:10s} kNN {knn:5.1f}  linear {linear:5.1f}  rank {rank:6.1f}".format(name, **metrics)


def run_all(args, argv):
    """Train every variant in turn, each in a folder of its own; print their table and return it.

    What is there is not trained again: after a stop, the same command goes on.
    """
    folder = Path(args.out or f"runs/{METHOD}-all-{Path(args.data).resolve().name}")
    table = {}
    for variant in VARIANTS:
        out = folder / variant
        row = [*(sys.argv[1:] if argv is None else argv), f"--{VARIANT}", variant]
        asked = vars(parse_args(row))
        if (out / "last.pt").exists():
            begun = load_checkpoint(out)["args"]
            wrong = [f"--{k.replace('_', '-')} {v}" for k, v in begun.items()
                     if k not in (*FREE, "out") and asked.get(k) != v]
            if wrong:
                fail(f"{out} was begun with {', '.join(wrong)}; say so, or choose another --out")
            row += ["--out", begun["out"] or str(out), "--resume", str(out)]
        else:
            row += ["--out", str(out)]
        try:
            table[variant] = main(row)
        except SystemExit as stop:  # one that diverges does not end the others
            if stop.code != DIVERGED or dist.is_initialized():
                raise
            table[variant] = {}
    columns = ("knn", "linear", "online", "rank", "seconds")
    print("\n{:12s}".format(VARIANT) + "".join(f"{name:>9s}" for name in columns))
    for variant, metrics in table.items():
        cells = "".join(f"{metrics[name]:9.1f}" for name in columns) if metrics else "   failed"
        print(f"{variant:12s}{cells}")
    if not all(table.values()):
        raise SystemExit(DIVERGED)
    return table


def main(argv=None):
    """Train and evaluate; the final metrics, accuracies in percent, as in the log's last line."""
    args = parse_args(argv)
    if getattr(args, VARIANT) == "all":
        return run_all(args, argv)
    device, dtype = choose_device(args)
    rank, world = join_processes(args)
    checkpoint = load_checkpoint(args.resume) if args.resume is not None else None
    waits = args.data in DOWNLOADS and os.environ.get("LOCAL_RANK", "0") != "0"
    data = None if waits else load_data(args)
    agree([])  # one process on each machine has downloaded
    data = data or load_data(args)
    n, size = len(data.train_images), data.train_images.shape[-1]
    if n < args.batch_size:
        fail(f"--batch-size {args.batch_size} is more than the {n} training images")
    if device.type == "cuda" and data.train_images.nbytes < torch.cuda.mem_get_info()[0] / 2:
        data = Data(*(part.to(device) for part in data[:4]), data.classes)
    torch.manual_seed(derive_seed(args.seed, 0))
    asked = {k: v for k, v in vars(args).items() if k not in ("resume", "steps")}
    model = Model(args, size, len(data.classes)).to(device, memory_format=torch.channels_last)
    if world > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = build_optimizer(model, args)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    state = {"step": 0, "seconds": 0.0, "history": [], "untrained": {},
             "data": [n, size, data.classes]}
    if checkpoint:
        restore(checkpoint, model, optimizer, scaler, state)
    state["args"] = asked  # as they were before build_head filled in what was left to it
    folder = None if rank else Path(args.resume) if checkpoint else make_run_folder(args)
    run = Run(folder, checkpoint and checkpoint["log_bytes"])
    sizes = [sum(p.numel() for p in part.parameters()) for part in (model.backbone, model.head)]
    precision = str(dtype or torch.float32).removeprefix("torch.")
    header = {"method": METHOD, "args": vars(args), **environment(device), "processes": world,
              "precision": precision, "parameters": dict(zip(("backbone", "head"), sizes)),
              "images": n, "test_images": len(data.test_images), "image_size": size,
              "classes": len(data.classes), "steps_per_epoch": n // args.batch_size,
              "learning_rate": optimizer.param_groups[0]["peak_lr"]}
    run.print(f"{METHOD} ({getattr(args, VARIANT)}) on {args.data}: {n:,} images of {size} px to "
              f"train on, {len(data.test_images):,} to test on, {len(data.classes)} classes")
    run.print(f"{args.arch} ({sizes[0] / 1e6:.1f} M parameters), head ({sizes[1] / 1e6:.1f} M), "
              f"{args.optimizer} at {header['learning_rate']:.4g}, batches of {args.batch_size}")
    run.print(f"{header['gpu'] or device} x {world}, {precision}, in {run.folder}")
    if not checkpoint:
        run.log(header)
        metrics = evaluate(model, data, device, linear=True)
        state["untrained"] = {f"{k}_untrained": metrics[k] for k in ("knn", "linear", "rank")}
        run.log({"epoch": 0, "step": 0, **state["untrained"]})
        run.print(summary("untrained", metrics))
        save_checkpoint(model, optimizer, scaler, run, state)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    signum = train(model, optimizer, scaler, data, args, dtype, run, state)
    if signum:
        run.print(f"stopped after step {state['step']}, saved; go on with: "
                  f"python {METHOD}.py --resume {run.folder}")
        raise SystemExit(128 + signum)
    if rank == 0:
        weights = {name: value.cpu() for name, value in model.backbone.state_dict().items()}
        save(weights, run.folder / "backbone.pt")
    metrics = evaluate(model, data, device, linear=True)
    metrics |= {**state["untrained"], "step": state["step"], "seconds": round(state["seconds"], 1)}
    if device.type == "cuda":
        metrics["peak_mib"] = torch.cuda.max_memory_allocated(device) >> 20
    run.log({"final": True, **metrics})
    run.print(summary("trained", metrics) + f"  online {metrics['online']:.1f}")
    return metrics


if __name__ == "__main__":
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except OSError as error:  # a full disk, say
        fail(error)
    except KeyboardInterrupt:
        print("\nstopped; a run folder that holds last.pt goes on with --resume", file=sys.stderr)
        sys.exit(130)
