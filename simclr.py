"""SimCLR in one file: NT-Xent, the sample-contrastive end of the duality.

Two augmented views of an image are positives, all other 2N - 2 views in the batch negatives.
The representation h = f(x) is what is used later; the loss acts on the embedding z = g(h):

    loss = mean over the 2N views i of  -s_ip / t + log sum_{k != i} exp(s_ik / t)
    s the cosine similarity, p the other view of i's image, t the temperature

Chen et al., A simple framework for contrastive learning of visual representations, ICML 2020;
Garrido et al., On the duality between contrastive and non-contrastive self-supervised learning,
ICLR 2023: reaches VICReg's accuracy with --head expander --temperature 0.15. The default projector
has no BatchNorm; defaults are for CIFAR-10, the papers' are flags.

Run     python simclr.py --data shapes (drawn images, a minute on a CPU); without it CIFAR-10
Shapes  N images in the batch (n: of a process), S x S pixels; features h (N, F), embeddings (N, D)
"""

# ==== 1. Imports [shared] =========================================================================
import argparse
import contextlib
import glob
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torchvision.transforms.v2.functional import pil_to_tensor, resized_crop, rgb_to_grayscale

# ==== 2. Method [method] ==========================================================================
METHOD = RUN_NAME = "simclr"
SHAPES = {"arch": "convnet", "epochs": 6, "batch_size": 128, "lr": 0.12}  # with --data shapes

def add_method_args(add):
    """Add the flags in which the methods differ."""
    add("--dim", type=int, default=128, help="D, the dimension that the loss acts on")
    add("--hidden", type=int, default=0, help="width of hidden layers; 0: --dim, at least 1024")
    add("--head", choices=("mlp", "expander"), default="mlp",
        help="mlp: two layers; expander: VICReg's three with BatchNorm")
    add("--temperature", type=float, default=0.5, help="t, divides the cosine similarities")
    add("--lr", type=float, default=0.06, help="learning rate, times --batch-size / 256")

def build_head(num_features, args):
    """Return the projector g: (N, F) -> (N, D); the expander ends without BatchNorm or ReLU."""
    hidden = args.hidden or max(1024, args.dim)
    if args.head == "mlp":
        return nn.Sequential(
            nn.Linear(num_features, hidden), nn.ReLU(), nn.Linear(hidden, args.dim))
    head = nn.Sequential(
        nn.Linear(num_features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
        nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
        nn.Linear(hidden, args.dim, bias=False))
    head.rate = min(1, 1024 / hidden)  # of --lr; at more SGD diverges
    return head

def nt_xent(z1, z2, temperature=0.5):
    """NT-Xent of the embeddings z1, z2 (N, D) of two views; a scalar. Every
    one of the 2N embeddings is an anchor with one positive and 2N - 2 negatives (Chen et al. 2020,
    equation 1). Half precision is raised to float32; call it outside autocast."""
    z = torch.cat([z1, z2]).to(torch.promote_types(z1.dtype, torch.float32))
    z = F.normalize(z, dim=1)  # (2N, D)
    similarity = z @ z.T / temperature  # (2N, 2N)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = torch.arange(len(z), device=z.device).roll(len(z1))
    return F.cross_entropy(similarity.masked_fill(itself, -torch.inf), positive)

def loss_fn(z1, z2, args):
    """Return the loss of the global batch, z1 z2 (N, D), and a dict of parts, detached scalars."""
    return nt_xent(z1, z2, args.temperature), {}

# ==== 3. Data [shared] ============================================================================
def load_data(args):
    """Return what --data names: classes, images and labels to train on, the same to test on. Images
    are uint8 (n, 3, S, S), a tensor or a Folder, labels int64 (n,), -1 where there is none."""
    if args.data == "shapes":
        classes, parts = [*"abcdefghij"], [*draw_shapes(5000, seed=1), *draw_shapes(1000, seed=2)]
    elif args.data in ("cifar10", "cifar100", "stl10"):
        classes, parts = download(args.data, args.data_dir)
    else:
        classes, parts = find_images(Path(args.data))
    known = torch.where(parts[1] >= parts[1].max().clamp(max=0))[0]  # labelled, or all
    if n := args.holdout or (len(parts) == 2) * (1 + len(known) // 10):  # a tenth
        n < len(known) or fail(f"{n} of {len(known)} images held out to test on leave none")
        order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))
        taken = torch.isin(torch.arange(len(parts[1])), known[order[-n:]]).numpy()
        parts = [part[which] for which in (~taken, taken) for part in parts[:2]]
    if isinstance(parts[0], np.ndarray):  # files' names
        sides = [min(open_image(f).size) for f in parts[0][:: 1 + len(parts[0]) // 100]]
        size = max(8, args.image_size or min(224, int(np.median(sides))))
        parts[::2] = [Folder(files, size, args) for files in parts[::2]]
    return classes, *parts

def download(name, root):
    """CIFAR-10, CIFAR-100 or STL-10, downloaded to root on first use, as load_data returns it."""
    dataset, stl10, parts = getattr(torchvision.datasets, name.upper()), name == "stl10", []
    try:
        for split in ("train+unlabeled", "test") if stl10 else (True, False):
            part = dataset(root, split, download=True)
            x = torch.from_numpy(part.data if stl10 else part.data.transpose(0, 3, 1, 2))
            parts += [x.contiguous(), torch.tensor(part.labels if stl10 else part.targets).long()]
    except (OSError, RuntimeError) as error:
        fail(f"{name} is not in {root}, no download ({error}); try --data shapes or --data DIR")
    return part.classes, parts

def find_images(root):
    """The same of ROOT/train/CLASS/* and, if there, ROOT/val|test/CLASS/*: files' names, none
    hidden, no trash, each once. Without ROOT/train, or with one class alone, no label is known."""
    endings = (*torchvision.datasets.folder.IMG_EXTENSIONS, ".gif", ".jfif", ".jp2", ".avif")
    trash = "/@eaDir/", "/@Recycle", "/#recycle/", "/$RECYCLE.BIN/", "/__MACOSX/", "/neighbours.png"
    found = [file for file in sorted(glob.glob("**", root_dir=root, recursive=True))
             if not any(t in f"/{file}" for t in trash)]
    files = [file for file in found if file.lower().endswith(endings)]
    places = [[*os.path.dirname(file).split(os.sep), ""][:2] for file in files]  # split and class
    sets = [[i for i, p in enumerate(places) if p[0] == s] for s in ("train", "val", "test")]
    sets[0] or files and not os.path.lexists(root / "train") or fail(
        f"--data {root}: no folder with images (in train/), nor a data set (shapes, cifar10, ...)")
    sets = [rows for rows in sets if rows][:2] if sets[0] else [range(len(files))]
    home = [root / os.path.dirname(file) for file in files]  # a link's name is the last choice
    sets = [sorted({(os.stat(home[i])[1:3], os.path.basename(files[i])): i for i in sorted(
        rows, key=lambda i: (not home[i].is_symlink(), -len(files[i])))}.values()) for rows in sets]
    classes = sorted({places[i][1] for i in sets[0] if places[i][0] == "train"} - {""})
    unknown = sorted({places[i][1] or "." for rows in sets[1:] for i in rows} - {*classes})
    unknown and classes[1:] and fail(f"--data {root}: test images in no class of train/: {unknown}")
    number = {name: i for i, name in enumerate(classes)} if len(classes) > 1 else {}
    print(f"{sum(map(len, sets))} images, of {len(found)} files and folders in {root}")
    return classes, [part for rows in sets for part in (
        np.array([os.fsencode(root / files[i]) for i in rows]),  # one block for all workers
        torch.tensor([number.get(places[i][1], -1) for i in rows]))]

class Folder(torch.utils.data.Dataset):
    """Image files as uint8 (n, 3, S, S), read one at a time: item (None, i) is the central square
    (3, S, S), item (epoch, i) two random crops (2, 3, S, S), drawn by (seed, epoch, i)."""
    def __init__(self, files, size, args):
        self.files, self.shape, self.args = files, (len(files), 3, size, size), args
    def __getitem__(self, item):
        (epoch, i), size = item, self.shape[2:]
        image = open_image(self.files[i])
        if epoch is None:  # of large images the middle 7/8, as Resize(256), CenterCrop(224)
            return pil_to_tensor(ImageOps.fit(image, size, Image.BILINEAR, (size[0] > 64) / 16))
        torch.default_generator.manual_seed(derive_seed(self.args.seed, 3, epoch, i))
        x, draw = pil_to_tensor(image), torchvision.transforms.RandomResizedCrop.get_params
        boxes = [draw(x, self.args.crop, [3 / 4, 4 / 3]) for _ in range(2)]
        return torch.stack([resized_crop(x, *box, size) for box in boxes])  # faster than Pillow's
    def ignore_signals(self, worker):  # the training process stops, and then ends its workers
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)

def open_image(file):
    """An image file (bytes) as Pillow's, RGB, turned as its EXIF says; OSError that names it."""
    try:
        with Image.open(os.fsdecode(file)) as image:
            if image.mode[0] in "IF" or any(m in str(image.tile) for m in ("B;16", "A;16", "K;16")):
                raise ValueError("more than 8 bits a channel, convert it to 8")
            image = image.convert("RGB")
            with contextlib.suppress(Exception):  # damaged EXIF turns nothing
                image = ImageOps.exif_transpose(image)
            return image
    except Exception as error:  # a damaged file can raise nearly anything
        raise OSError(f"mend, shrink or remove the image {os.fsdecode(file)!r}: {error}") from error

def fetch(images, batches, device):
    """Yield images[index], uint8 on the device, for (epoch, index) in batches; of a Folder, whose
    workers read ahead, pairs of random crops (n, 2, 3, S, S) unless epoch is None."""
    loader = (images[index] for _, index in batches)
    if isinstance(images, Folder):
        items = ([(epoch, i) for i in index.tolist()] for epoch, index in batches)
        loader = torch.utils.data.DataLoader(
            images, batch_sampler=items, num_workers=images.args.workers,
            worker_init_fn=images.ignore_signals, pin_memory=device.type == "cuda")
    yield from (batch.to(device, non_blocking=True) for batch in loader)

def draw_shapes(n, seed, size=32):
    """Draw n images uint8 (n, 3, size, size) and labels (n,): each of nine superellipses of one
    kind, |u|^p + |v / a|^p = 1, filled or hollow; the kind is what two crops share."""
    generator, labels = torch.Generator().manual_seed(seed), torch.arange(n) % 10
    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, 1, 1, generator=generator)
    p, a = torch.tensor([[0.5, 1, 2, 8, 2], [1, 1, 1, 0.3, 0.4]])[:, labels % 5, None, None]
    y, x = torch.meshgrid(*[(torch.arange(size) + 0.5) * 2 / size - 1] * 2, indexing="ij")
    images = uniform(0.1, 0.3, 1).expand(n, 3, size, size)
    for cell in range(9):
        left = x - (cell % 3 - 1) * 2 / 3 - uniform(-0.12, 0.12)
        down = y - (cell // 3 - 1) * 2 / 3 - uniform(-0.12, 0.12)
        angle, scale = uniform(0, 2 * math.pi), uniform(0.2, 0.34)
        u = (torch.cos(angle) * left + torch.sin(angle) * down).abs() / scale
        v = (torch.cos(angle) * down - torch.sin(angle) * left).abs() / (scale * a)
        level = (u**p + v**p) ** (1 / p)
        level = torch.where(labels[:, None, None] < 5, level - 1, (level - 0.75).abs() - 0.25)
        ink = (0.5 - level * scale * a * size / 2).clamp(0, 1)[:, None]  # edges a pixel wide
        images = images + (uniform(0.4, 1, 3) - images) * ink
    images = 0.5 + (images - 0.5) * uniform(0.3, 1, 1) * uniform(-1, 1, 1).sign()
    return (images * 255).round().to(torch.uint8), labels

# ==== 4. Augmentation [shared] ====================================================================
# A whole batch, each image by parameters of its own, equal to torchvision's transforms of floats.
DRAWS = 36  # uniform random numbers that one view of one image takes

def augment(images, draws, view, args, dtype=torch.float32):
    """One view of every image: uint8 (N, 3, S, S), or a Folder's pairs of crops (N, 2, 3, S, S) ->
    dtype (N, 3, S, S) in [0, 1]. draws (DRAWS, N, 1, 1, 1), uniform in [0, 1), are the only source
    of chance; view (0 or 1) picks the strengths."""
    crop, jitter, order, (flip, jittered, gray, blurred, sigma, solar) = draws.split([22, 4, 4, 6])
    x = (images[:, view] if images.ndim == 5 else images).float() / 255
    x = random_crop(x, crop, *args.crop) if images.ndim == 4 else x
    x = torch.where(flip < 0.5, x.flip(3), x)
    if any(args.jitter):
        factors = [strength * (2 * u - 1) for strength, u in zip(args.jitter, jitter)]
        x = torch.where(jittered < 0.8, color_jitter(x, factors, order.argsort(0)), x)
    x = torch.where(gray < args.gray, rgb_to_grayscale(x), x)
    if args.blur[view]:
        x = torch.where(blurred < args.blur[view], gaussian_blur(x, 0.1 + 1.9 * sigma), x)
    x = torch.where((solar < args.solarize[view]) & (x >= 0.5), 1 - x, x)
    return x.to(dtype, memory_format=torch.channels_last)

def random_crop(x, draws, low, high):
    """RandomResizedCrop of x (N, 3, S, S) to S. Bilinear resizing is separable: two products with
    weights (S, S), triangles that fall to 0 a pixel away, cut off at the crop's edges."""
    size, pixel = x.shape[-1], torch.arange(x.shape[-1], device=x.device)
    area, ratio, (down, right) = draws.split([10, 10, 2])  # ten tries
    area = size**2 * (low + (high - low) * area)
    ratio = torch.exp(math.log(4 / 3) * (2 * ratio - 1))  # log-uniform in [3/4, 4/3]
    height, width = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (height.clamp(1, size) == height) & (width.clamp(1, size) == width)
    first = fits.float().argmax(0, keepdim=True)  # the first that fits, or the whole image
    height, width = (torch.where(fits, s, size).gather(0, first)[0] for s in (height, width))
    def weights(length, draw):
        start = (draw * (size - length + 1)).floor()
        centre = start + (pixel[:, None] + 0.5) * length / size
        triangle = (1 - (pixel + 0.5 - centre).abs()).clamp(min=0)
        triangle = triangle * ((pixel >= start) & (pixel < start + length))
        return triangle / triangle.sum(3, keepdim=True)
    return weights(height, down) @ x @ weights(width, right).mT

def color_jitter(x, factors, order):
    """Steps 0 to 3, brightness, contrast, saturation (1 + factor of x, -factor of black, mean gray
    or gray x) and hue, in each image's order (4, N, 1, 1, 1); factors alike, 0 changes nothing."""
    brightness, contrast, saturation, hue = factors
    for step in order:
        gray = rgb_to_grayscale(x)
        other = torch.where(step == 1, gray.mean((2, 3), keepdim=True), gray * (step == 2))
        factor = torch.where(step == 1, contrast, torch.where(step == 2, saturation, brightness))
        blended = (x + factor * (x - other)).clamp(0, 1)
        x = torch.where(step == 3, shift_hue(x, hue), blended)
    return x

def shift_hue(x, shift):
    """Turn the hue of x (N, 3, H, W) by shift (N, 1, 1, 1) turns, by HSV's formulas without HSV."""
    value, (r, g, b) = x.amax(1, keepdim=True), x.split(1, dim=1)
    chroma = value - x.amin(1, keepdim=True)
    hue = torch.where(value == r, g - b, torch.where(value == g, b - r, r - g))
    hue = hue / chroma.clamp(min=1e-8) + torch.where(value == r, 0, torch.where(value == g, 2, 4))
    k = (torch.cat([hue + 5, hue + 3, hue + 1], dim=1) + 6 * shift) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)

def gaussian_blur(x, sigma):
    """Blur each image with its own sigma (N, 1, 1, 1) in pixels; odd kernel of about S/10."""
    size, radius, groups = x.shape[-1], max(1, x.shape[-1] // 20), x.shape[0] * x.shape[1]
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=x.device) / sigma) ** 2)
    kernel = (kernel / kernel.sum(3, keepdim=True)).repeat_interleave(x.shape[1], dim=0)
    y = F.pad(x, [radius] * 4, mode="reflect").view(1, groups, *[size + 2 * radius] * 2)
    y = F.conv2d(y, kernel, groups=groups)  # along rows, then columns
    return F.conv2d(y, kernel.mT, groups=groups).view(x.shape)

# ==== 5. Backbone and heads [shared] ==============================================================
def build_backbone(arch, size):
    """Return the backbone (N, 3, size, size) -> (N, F) and F; up to 64 pixels ResNets get the CIFAR
    stem. convnet, for CPUs, ends like them with an identity skip, on which DirectCLR relies."""
    if arch == "convnet":
        stages = ((3, 32, 2), (32, 64, 1), (64, 128, 2), (128, 256, 2))
        layers = [torchvision.ops.Conv2dNormActivation(a, b, 3, stride) for a, b, stride in stages]
        block = torchvision.models.resnet.Bottleneck(256, 64)
        return nn.Sequential(*layers, block, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 256
    backbone = getattr(torchvision.models, arch)(weights=None)
    num_features, backbone.fc = backbone.fc.in_features, nn.Identity()
    if size <= 64:
        backbone.conv1, backbone.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
    return backbone, num_features

class Model(nn.Module):
    """Backbone f, head g and the online probe, which learns from labels; its gradient ends at h."""
    def __init__(self, args, size, classes):
        super().__init__()
        self.backbone, num_features = build_backbone(args.arch, size)
        self.head = build_head(num_features, args)
        self.probe = nn.Sequential(
            nn.BatchNorm1d(num_features, affine=False), nn.Linear(num_features, classes))
    def forward(self, view1, view2):
        """Two views (N, 3, S, S) -> embeddings z1, z2 (N, D) and the probe's logits of view 1."""
        h1, h2 = self.backbone(view1), self.backbone(view2)
        return self.head(h1), self.head(h2), self.probe(h1.detach())

# ==== 6. Evaluation [shared] ======================================================================
def knn_accuracy(train_x, train_y, test_x, test_y, k=10):
    """Accuracy in percent of the vote of the k nearest by cosine; ties go to the lower class."""
    k, classes, hits = min(k, len(train_x)), int(train_y.max()) + 1, 0
    inverse = 1 / train_x.norm(dim=1).clamp(min=1e-12)  # a query's own norm changes no order
    rows = max(1, min(1000, 2**26 // len(train_x)))  # a quarter GiB of similarities at once
    for x, y in zip(test_x.split(rows), test_y.split(rows)):
        nearest = train_y[(x @ train_x.T).mul_(inverse).topk(k, dim=1).indices]  # (rows, k)
        hits += (F.one_hot(nearest, classes).sum(1).argmax(1) == y).sum()
    return 100 * int(hits) / len(test_y)

def linear_probe(train_x, train_y, test_x, test_y, steps=400):
    """Accuracy in percent of multinomial logistic regression on standardised features, equal to
    scikit-learn's with C = 1 (of two classes C = 2, as both classes' weights are penalised)."""
    mean, std = train_x.mean(0), train_x.std(0, correction=0).clamp(min=1e-6)
    x, classes = (train_x - mean).div_(std), int(train_y.max()) + 1
    weight, bias = x.new_zeros(x.shape[1], classes), x.new_zeros(classes)
    optimizer = torch.optim.LBFGS([weight.requires_grad_(), bias.requires_grad_()],
                                  max_iter=steps, line_search_fn="strong_wolfe")
    def closure():
        optimizer.zero_grad()
        total = 0.5 * weight.square().sum() / len(x)
        total.backward()
        for part, y in zip(x.split(2**16), train_y.split(2**16)):  # bounds the logits' memory
            loss = F.cross_entropy(part @ weight + bias, y, reduction="sum") / len(x)
            loss.backward()
            total = total.detach() + loss.detach()
        return total
    optimizer.step(closure)
    return 100 * (((test_x - mean) / std @ weight + bias).argmax(1) == test_y).float().mean().item()

@torch.no_grad()
def evaluate(model, data, args, linear=True, folder=None):
    """Measure the frozen representation: accuracies in percent, knn, linear and online (the probe
    trained alongside); its effective rank. Into folder go embeddings.pt and neighbours.png."""
    for buffer in model.buffers() if WORLD > 1 else ():
        dist.broadcast(buffer, 0)  # on CPUs each process has BatchNorm's statistics of its own
    _, images, labels, test_images, test_labels = data
    device, size = model.eval().probe[1].weight.device, max(1, args.batch_size // WORLD)
    def represent(images, index):  # every process sees to a share
        share = math.ceil(len(index) / WORLD)
        mine = index[torch.arange(RANK * share, (RANK + 1) * share) % len(index)].split(size)
        h = [model.backbone((x / 255).contiguous(memory_format=torch.channels_last))
             for x in fetch(images, ((None, part) for part in mine), device)]
        return gather(torch.cat(h))[: len(index)]
    known, test_y = torch.where(labels.cpu() >= 0)[0], test_labels.to(device)
    h = represent(test_images, torch.arange(len(test_y)))
    p = torch.linalg.eigvalsh(h.cpu().double().T @ h.cpu().double()).clamp(min=0).sqrt()
    p = p / p.sum().clamp(min=1e-12)  # normalised singular values; exp of their entropy: RankMe
    metrics = {"rank": torch.special.entr(p).sum().exp().item()}
    if len(known):
        sets = represent(images, known), labels.to(device)[known], h, test_y
        probe = {"linear": linear_probe(*sets)} if linear else {}
        online = 100 * (model.probe(h).argmax(1) == test_y).float().mean().item()
        metrics = {"knn": knn_accuracy(*sets), **probe, "online": online, **metrics}
    if folder:
        pick = torch.randperm(len(h), generator=torch.Generator().manual_seed(0))[:10000].sort()[0]
        h, y = h[pick.to(device)], test_y.cpu()[pick]
        z = torch.cat([model.head(part) for part in h.split(1000)])
        paths = [os.fsdecode(test_images.files[i]) for i in pick if hasattr(test_images, "files")]
        save({"h": h.cpu(), "z": z.cpu(), "labels": y, "paths": paths}, folder / "embeddings.pt")
        h, rows = F.normalize(h, dim=1), torch.linspace(0, len(h) - 1, 8).long()
        nearest = pick[(h[rows] @ h.T).topk(min(10, len(h))).indices.cpu()]  # (8, 10), itself first
        x = next(fetch(test_images, [(None, nearest.flatten())], torch.device("cpu"))) / 255
        torchvision.utils.save_image(x, folder / "neighbours.png", nrow=nearest.shape[1])
    model.train()
    return {name: round(value, 2) for name, value in metrics.items()}

# ==== 7. Optimiser [shared] =======================================================================
class LARS(torch.optim.SGD):
    """SGD whose gradients get the norm eta |w| (You et al. 2017, as in VICReg's official code):
    decay enters before; biases and BatchNorm (one dimension) get neither decay nor scaling."""
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in [p for p in group["params"] if p.ndim > 1 and group["eta"]]:
                p.grad.add_(p, alpha=group["decay"])
                ratio = group["eta"] * p.norm() / p.grad.norm()
                p.grad.mul_(ratio.where(ratio.isfinite() & (ratio > 0), 1.0))
        super().step()

def build_optimizer(model, args, fused=False):
    """SGD or LARS. SGD slows the head by head.rate; the probe has plain SGD at 0.1 and no decay."""
    lr, sgd = args.lr * args.batch_size / 256, args.optimizer == "sgd"
    slower = getattr(model.head, "rate", 1.0) if sgd else 1.0
    rates = (model.backbone, lr), (model.head, lr * slower), (model.probe, 0.1)
    groups = [{"params": [p for p in part.parameters() if p.requires_grad], "lr": rate,
               "peak_lr": rate, "eta": 0.001, "decay": args.weight_decay,  # LARS's
               "weight_decay": args.weight_decay * sgd} for part, rate in rates]
    groups[-1].update(weight_decay=0.0, eta=0.0)  # the probe's
    return (torch.optim.SGD if sgd else LARS)(groups, momentum=0.9, fused=sgd and fused or None)

# ==== 8. Runtime [shared] =========================================================================
RANK, WORLD, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in (
    ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
DIVERGED, SAVE_EVERY = 3, 60.0  # exit code where training is not finite; seconds between saves
FREE = ("data", "data_dir", "device", "compile", "deterministic", "workers")  # --resume may change
POSITIVE = ("dim", "temperature", "lr", "epochs", "mu", "eps")  # flags that must not be 0

def fail(message, code=2):
    """End the program with one line on what was wrong and an exit code."""
    print(f"{METHOD}.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(code)

def derive_seed(*keys):
    """A seed from (--seed, what, when), none saved; what: 0 weights, 1 order, 2 draws, 3 crops."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0])

def choose_device(args):
    """Return the device and the autocast dtype; float32 keeps PyTorch's defaults."""
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = not args.deterministic
    name, best = args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu"), "fp32"
    try:
        device = torch.device(f"cuda:{LOCAL_RANK}" if name == "cuda" else name)
        device.type == "cuda" and torch.cuda.set_device(device)
        check = torch.compile(torch.square) if args.compile else torch.square
        check(torch.zeros(1, device=device)).cpu()
    except Exception as error:  # each backend has exceptions of its own
        fail(f"--device {name}{' --compile' * args.compile}: cannot be used here ({error})")
    if device.type == "cuda":
        best = "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    return device, {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[
        args.precision.replace("auto", best)]

def gather(x):
    """x (n, ...) of all processes, (N, ...); its gradient reaches this process's own part alone."""
    if WORLD == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(WORLD)]
    dist.all_gather(parts, x.detach().contiguous())
    parts[RANK] = x
    return torch.cat(parts)

def agree(number=0):
    """The largest of all processes' numbers, such as signals; waits for all of them."""
    number = torch.tensor(number)
    WORLD == 1 or dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()

def open_run(args, log_bytes):
    """Return the run folder, --resume, --out or runs/NAME-DATA, numbered where it is taken, and its
    log, without what came after the checkpoint."""
    name = f"runs/{RUN_NAME.format(**vars(args))}-{Path(args.data).resolve().name}"
    names = (name + f"-{i}" * (i > 1) for i in range(1, 10**6))
    folder = Path(args.resume or args.out or next(n for n in names if not Path(n).exists()))
    folder.mkdir(parents=True, exist_ok=True)
    log = open(folder / "log.jsonl", "a" if args.resume or args.out else "x", buffering=1)
    log.seek(log.truncate(min(log_bytes, os.path.getsize(log.name))))
    return folder, log

def save(value, path):
    """torch.save under a temporary name, then rename: a crash leaves the old file or the new."""
    try:
        with open(f"{path}.tmp", "wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
    except (OSError, RuntimeError) as error:
        Path(f"{path}.tmp").unlink(missing_ok=True)
        fail(f"cannot write {path}: {error}; what was saved before is still there")

def load_checkpoint(run):
    """Read RUN/last.pt, tensors and numbers only: no code in it can run. Fails with one line."""
    try:
        state = torch.load(Path(run, "last.pt"), map_location="cpu", weights_only=True, mmap=True)
        method, _ = state["method"], {**state["args"]}
    except Exception as error:  # a damaged or hostile file can raise nearly anything
        fail(f"--resume {run}: last.pt is missing, damaged or not ours ({type(error).__name__})")
    method == METHOD or fail(f"--resume {run}: a run of {method}.py, not of {METHOD}.py")
    return state

# ==== 9. Training [shared] ========================================================================
def parse_args(argv=None):
    """Parse the command line; with --resume the run's own arguments, of which few may change."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error, add = fail, parser.add_argument
    add_method_args(add)
    add("--data", default="cifar10", help="cifar10, cifar100, stl10, shapes or a folder of images")
    add("--data-dir", default="data", help="where downloaded data sets are kept")
    add("--image-size", type=int, default=0, help="of a folder; 0: its files' median, at most 224")
    add("--workers", type=int, default=min(16, os.cpu_count() or 1), help="that read a folder")
    add("--holdout", type=int, default=0, help="test on this many training images, held out")
    add("--arch", choices=("convnet", "resnet18", "resnet34", "resnet50"), default="resnet18")
    add("--crop", type=float, nargs=2, default=[0.2, 1.0], help="smallest and largest area")
    add("--jitter", type=float, nargs=4, default=[0.4, 0.4, 0.4, 0.1], help="strengths, hue last")
    add("--gray", type=float, default=0.1, help="probability of grayscale")
    add("--blur", type=float, nargs=2, default=[0.0, 0.0], help="probability for each view")
    add("--solarize", type=float, nargs=2, default=[0.0, 0.0], help="probability for each view")
    add("--epochs", type=int, default=100, help="passes over the training images")
    add("--steps", type=int, default=0, help="stop after this many in all, for a dry run; 0: never")
    add("--batch-size", type=int, default=512, help="images, of all processes together")
    add("--weights", metavar="FILE", help="start from a backbone.pt or torchvision's state dict")
    add("--optimizer", choices=("sgd", "lars"), default="sgd", help="LARS is the ImageNet recipes'")
    add("--weight-decay", type=float, default=5e-4, help="L2 penalty")
    add("--warmup", type=float, default=0.1, help="part of the training in which the rate rises")
    add("--seed", type=int, default=0, help="decides every random choice")
    add("--out", help="run folder; by default runs/NAME-DATA, numbered where it is taken")
    add("--resume", metavar="RUN", help="go on with the run in this folder")
    add("--device", default="auto", help="cuda, cpu, ...; auto: cuda where there is one")
    add("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto",
        help="auto: on a GPU bf16 or fp16, whichever it does well, on a CPU fp32")
    add("--compile", action="store_true", help="torch.compile; a minute or two at the start")
    add("--deterministic", action="store_true", help="repeat a run bit for bit on a GPU too")
    args = parser.parse_args(argv)
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and not args.resume and args.out
    run = again if again and Path(again, "last.pt").exists() else args.resume  # torchrun's restart
    saved = {} if run is None else load_checkpoint(run)["args"]
    parser.set_defaults(**saved if args.resume else SHAPES if args.data == "shapes" else {})
    args = parser.parse_args(argv, argparse.Namespace(resume=run))
    typed = [k for k, v in saved.items() if k not in FREE and getattr(args, k) != v]
    shares = (args.gray, *args.blur, *args.solarize, *args.jitter, 2 * args.jitter[3], args.warmup)
    for rule, holds in {
            f"--resume takes the run's own flags, not another {', '.join(typed)}": not typed,
            **{f"{name} {value}: a number {'above' if name in POSITIVE else 'of at least'} 0":
               0 <= value < math.inf and (value > 0 or name not in POSITIVE)
               for name, value in vars(args).items() if isinstance(value, (int, float))},
            "0 <= --gray, --blur, --solarize, --jitter, --warmup <= 1, the hue's <= 0.5": all(
                0 <= x <= 1 for x in shares),
            "several processes start by torchrun, not by srun": "RANK" in os.environ or all(
                os.environ.get(n, "1") == "1" for n in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")),
            "0 < --crop LOW <= HIGH <= 1": 0 < args.crop[0] <= args.crop[1] <= 1,
            f"--batch-size {args.batch_size} is for all processes, a multiple of their number, "
            f"{WORLD}, and two each": args.batch_size % WORLD == 0 and args.batch_size >= 2 * WORLD,
            f"--out {args.out} holds a run; take --resume {args.out} or another": not args.out or
                args.resume or again or not Path(args.out, "log.jsonl").exists()}.items():
        holds or fail(rule)
    return args

def plan(n, args, steps, device):
    """Yield epoch and index (n,) of this process's part of the batch, for a range of steps."""
    for step in steps:
        epoch, position = divmod(step, n // args.batch_size)
        if position == 0 or step == steps[0]:
            generator = torch.Generator().manual_seed(derive_seed(args.seed, 1, epoch))
            order = torch.randperm(n, generator=generator).to(device)
        yield epoch, order[position * args.batch_size :][: args.batch_size].chunk(WORLD)[RANK]

def train_step(network, optimizer, scaler, view_fn, criterion, images, labels, draws, args, dtype):
    """One update on this process's images, uint8 (n, 3, S, S) or pairs of crops (n, 2, 3, S, S),
    with labels (n,) and draws (2, DRAWS, n, 1, 1, 1); loss and parts of the global batch."""
    views = [view_fn(images, draws[i], i, args, dtype) for i in (0, 1)]
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        outputs = network(*views)
    z1, z2, logits = (gather(output.float()) for output in outputs)  # (N, ...), of all processes
    loss, parts = criterion(z1, z2, args)
    online = F.cross_entropy(logits, gather(labels), ignore_index=-1).nan_to_num()  # no label: 0
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(WORLD * (loss + online)).backward()  # DistributedDataParallel takes the mean
    scaler.step(optimizer)
    scaler.update()
    return {"loss": loss.detach(), **parts, "probe": online.detach()}

def train(model, optimizer, scaler, data, args, dtype, state, report, save_all):
    """Train from state["step"] to the end, updating state; return the signal received, or 0."""
    device, (_, images, labels, *_) = model.probe[1].weight.device, data
    epoch_steps, network = len(labels) // args.batch_size, model
    steps, warmup = args.epochs * epoch_steps, args.warmup * args.epochs * epoch_steps
    span = range(state["step"], min(steps, args.steps or steps))
    view_fn, criterion = (torch.compile(f) if args.compile else f for f in (augment, loss_fn))
    args.compile and print("the first step compiles, which takes a minute or two", flush=True)
    args.compile and WORLD == 1 and model.compile()  # SyncBatchNorm would break it to pieces
    if WORLD > 1:
        network = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    plans = [plan(len(labels), args, span, labels.device) for _ in (0, 1)]
    start, saved, before, caught = time.time(), time.time(), state["seconds"], [0]
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ValueError):  # only the main thread can save when asked to leave
            for signum in (signal.SIGINT, signal.SIGTERM):
                handler = signal.signal(signum, lambda signum, frame: caught.append(signum))
                stack.callback(signal.signal, signum, handler)
        for step, (epoch, index), batch in zip(span, plans[0], fetch(images, plans[1], device)):
            rate = min((step + 1) / max(warmup, 1), 0.5 + 0.5 * math.cos(
                math.pi * max(0, step - warmup) / max(1, steps - warmup)))  # up, then a cosine to 0
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * rate
            torch.manual_seed(derive_seed(args.seed, 2, step))  # on the CPU: alike for all GPUs
            draws = torch.rand(2, DRAWS, args.batch_size, 1, 1, 1, pin_memory=device.type == "cuda")
            mine = labels[index], draws.chunk(WORLD, dim=2)[RANK]
            parts = train_step(network, optimizer, scaler, view_fn, criterion, batch,
                               *(x.to(device, non_blocking=True) for x in mine), args, dtype)
            position, sums = step % epoch_steps + 1, torch.stack([*parts.values()])
            state["sums"] = sums if position == 1 else state["sums"].to(device) + sums
            state["step"], ends, stop = step + 1, position == epoch_steps, agree(caught[-1])
            due = stop or step + 1 == span.stop or time.time() - saved >= SAVE_EVERY
            if not (ends or due):
                continue
            # only here does the loop wait for the device
            record = dict(zip(parts, (state["sums"] / position).tolist()))
            finite = all(t.isfinite().all() for t in (*model.state_dict().values(), state["sums"]))
            finite and scaler.get_scale() >= 2**-10 or fail(  # fp16: each bad step halves it
                f"training is not finite after step {step + 1}: {record}; the last checkpoint "
                "stays; try a smaller --lr or --precision fp32", DIVERGED)
            pace = (time.time() - start) / (step + 1 - span.start)
            state["seconds"] = round(before + time.time() - start, 1)
            if ends and step + 1 < span.stop and (epoch + 1) % math.ceil(args.epochs / 10) == 0:
                record |= evaluate(model, data, args, linear=False)
            report({"epoch": epoch + ends, "step": step + 1, **record, "seconds": state["seconds"],
                    "lr": optimizer.param_groups[0]["lr"], "images_per_second": round(
                        args.batch_size / pace), "left": round(pace * (span.stop - step - 1))},
                   logged=ends)
            if due:
                save_all()
                saved = time.time()
            if stop:
                break
        return agree(caught[-1])  # waits until process 0 has saved: torchrun ends all with one

def main(argv=None):
    """Train and evaluate; return the final metrics, those of the log's last line."""
    args = parse_args(argv)
    sys.stdout = open(os.devnull, "w", errors="replace") if RANK else sys.stdout
    device, dtype = choose_device(args)
    cuda = device.type == "cuda"
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    data = load_data(args) if LOCAL_RANK == 0 else None  # one process of a machine downloads
    agree()
    classes, images, labels, *_ = data = data or load_data(args)
    n, size = len(labels), images.shape[-1]
    n >= args.batch_size or fail(f"--batch-size {args.batch_size}: only {n} images to train on")
    if cuda and torch.is_tensor(images) and images.nbytes < torch.cuda.mem_get_info()[1] / 4:
        data = classes, *(part.to(device) for part in data[1:])
    torch.manual_seed(derive_seed(args.seed, 0))
    model = Model(args, size, max(1, len(classes))).to(device, memory_format=torch.channels_last)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model) if cuda and WORLD > 1 else model
    fused = cuda and dtype != torch.float16  # fp16's skipped first steps leave garbage as momentum
    optimizer = build_optimizer(model, args, fused)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    live = {**dict(model.named_children()), "optimizer": optimizer, "scaler": scaler}
    state = {"data": [n, len(data[4]), size, classes], "step": 0, "seconds": 0.0, "untrained": {},
             "sums": torch.zeros(0), "log_bytes": 0}
    try:
        if args.resume is not None:
            checkpoint = load_checkpoint(args.resume)
            checkpoint["data"] == state["data"] or fail(f"{args.data} is not the run's data")
            for name in [name for name in live if checkpoint[name]]:  # no scaler without fp16
                live[name].load_state_dict(checkpoint[name])
            state = {name: type(old)(checkpoint[name]) for name, old in state.items()}
        elif args.weights is not None:
            own = model.backbone.state_dict()  # keeps a stem of another size, has no fc
            weights = torch.load(args.weights, map_location="cpu", weights_only=True).items()
            model.backbone.load_state_dict({
                k: own[k] if k == "conv1.weight" and own[k].shape != w.shape else w
                for k, w in weights if not k.startswith("fc.")})
    except Exception as error:  # whatever an edited file can bring about
        fail(f"{args.resume or args.weights} does not fit: {error}")
    folder, log = (None, None) if RANK else open_run(args, state["log_bytes"])
    def report(record, logged=True):
        RANK or log.tell() == os.path.getsize(log.name) or fail(f"another run writes to {log.name}")
        RANK or not logged or log.write(json.dumps(record) + "\n")
        print(*(f"{k} {v:.4g} " if isinstance(v, float) else f"{k} {v} " for k, v in record.items()
                if not isinstance(v, (dict, list))), flush=True)
    def save_all():
        kept = {k: v for k, v in vars(args).items() if k not in ("out", "resume", "steps")}
        own = {"method": METHOD, "args": kept, "log_bytes": RANK or os.path.getsize(log.name)}
        parts = {name: thing.state_dict() for name, thing in live.items()}
        RANK or save({**state, **own, **parts}, folder / "last.pt")
    if args.resume is None:
        git = f"git -C '{Path(__file__).resolve().parent}' describe --always --dirty --abbrev=40"
        report({"method": METHOD, "args": vars(args), "argv": sys.argv, "images": n, "pixels": size,
                "test_images": len(data[4]), "threads": torch.get_num_threads(), "processes": WORLD,
                "device": torch.cuda.get_device_name() if cuda else str(device), "out": str(folder),
                "torch": torch.__version__, "parameters": sum(map(torch.numel, model.parameters())),
                "precision": str(dtype), "commit": os.popen(f"{git} 2>/dev/null").read().strip()})
        state["untrained"] = {f"{k}_untrained": v for k, v in evaluate(model, data, args).items()}
        report({"epoch": 0, "step": 0, **state["untrained"]})
        save_all()
    if signum := train(model, optimizer, scaler, data, args, dtype, state, report, save_all):
        print(f"stopped after step {state['step']}, saved; python {METHOD}.py --resume {folder}")
        raise SystemExit(128 + signum)
    final = evaluate(model, data, args, folder=folder) | state["untrained"]
    final |= {name: state[name] for name in ("step", "seconds")}
    RANK or save(model.backbone.cpu().state_dict(), folder / "backbone.pt")
    report({"final": True, **final})
    return final

if __name__ == "__main__":
    hasattr(sys.stdout, "reconfigure") and sys.stdout.reconfigure(errors="replace")  # odd paths
    try:
        main()
    except OSError as error:  # an unreadable image, a full disk; of a worker's traceback the end
        fail(str(error).strip().splitlines()[-1].removeprefix("OSError: "))
    finally:  # workers ignore SIGTERM, and Python would wait for them for ever
        signal.signal(getattr(signal, "SIGCHLD", signal.SIGINT), signal.SIG_DFL)
        for worker in torch.multiprocessing.active_children():
            worker.kill()
