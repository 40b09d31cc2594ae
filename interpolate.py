"""The path from VICReg to SimCLR in one file: from dimension- to sample-contrastive, by steps.

VICReg decorrelates the dimensions of the embedding, SimCLR pushes images apart. With Z the centred
embeddings, one is about the covariance matrix Z^T Z, the other about the Gram matrix Z Z^T, and
|Z^T Z| = |Z Z^T|. --method walks from one to the other in steps, which --list names:

    vicreg       25 mse + 25 v + sum_{i != j} C_ij^2 / D,  C the covariance matrix, v the hinge
    vicreg-exp   squares -> log-sum-exp: 25 mse + 25 v + c mean_i log sum_{j != i} exp(C_ij / t)
    vicreg-ctr   the same v and log-sum-exp of the transpose: C is a Gram matrix, (N, N)
    simclr       unit norms, negatives from both views; -abs and -sq: |s|, s^2 instead of s
    dcl          the positive left out of the sum; -abs, -sq
    spectral, barlow, tcr   the neighbours: squares of s, their transpose, a log-determinant

    Garrido, Chen, Bardes, Najman, LeCun, On the duality between contrastive and non-contrastive
        self-supervised learning, ICLR 2023

Run     python interpolate.py --list                        the path as a table
        python interpolate.py --data shapes --method vicreg-ctr
        python interpolate.py --data shapes --method all    each in turn, and their table
        python interpolate.py --method vicreg --blend simclr --alpha 0.5
Copy    vicreg_loss, nt_xent, spectral_loss, barlow_loss, tcr_loss, with the functions they call
Shapes  N images in the batch (of all processes), V views, C H W image, F features of the backbone,
        D dims of the embedding; h (N, F) representation, z1 z2 (N, D) embeddings
Leaves  runs/NAME/log.jsonl, last.pt (everything to go on), backbone.pt (torchvision's names)

Chosen where the paper's text leaves it open. exp and ctr: with t = .5 and c = 1 public attempts
collapsed; c = 25 t gives the log-sum-exp SimCLR's weight against the invariance, for embeddings
of unit deviation have mse = 2 (1 - cosine). ctr: dimensions are centred over the batch, then v and
C are literally those of the transpose, which centre each embedding too. abs and sq: of all
similarities, the positive's too. --normalize: each view by itself.
Differs from the official codes: the losses of spectral, Barlow Twins and TCR are scaled for SGD;
barlow's w (.0051) and tcr's e (.2) are for other N and D and failed here, or nearly so.
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
METHOD = "interpolate"
VARIANT, VARIANTS = "method", {  # what changes against the line above; formula; the duality's kind
    "vicreg": ("start: covariance C of the dimensions, squared",
               "a mse + b v + c sum_{i!=j} C_ij^2 / D", "dimension"),
    "vicreg-exp": ("log-sum-exp instead of squares",
                   "a mse + b v + c mean_i log sum_{j!=i} exp(C_ij / t)", "dimension"),
    "vicreg-ctr": ("v and C of the transpose: C is a Gram matrix",
                   "the same, z transposed", "sample"),
    "simclr": ("unit norms, no centring (--normalize A centres); the sum over both views",
               "-s_ii' / t + log sum_{j!=i} exp(s_ij / t)", "sample, if spread"),
    "simclr-abs": ("absolute cosines", "simclr with |s|", "sample"),
    "simclr-sq": ("squared cosines", "simclr with s^2", "sample"),
    "dcl": ("the positive not in simclr's sum",
            "-s_ii' / t + log sum_{j!=i,i'} exp(s_ij / t)", "sample, if spread"),
    "dcl-abs": ("absolute cosines", "dcl with |s|", "sample"),
    "dcl-sq": ("squared cosines", "dcl with s^2", "sample"),
    "spectral": ("squares instead of log-sum-exp; norms at most sqrt(mu)",
                 "(-2 mean_i s_ii' + mean_{i!=j} s_ij'^2) / mu", "sample"),
    "barlow": ("spectral's squares on the transpose, standardised",
               "sum_i (1 - C_ii)^2 + w sum_{i!=j} C_ij^2", "dimension"),
    "tcr": ("log-determinant instead of squares; unit norms",
            "a (1 - s_ii') - log det(I + D / (N e) Z^T Z) / (2 N)", "dimension"),
}


def add_method_args(parser):
    """Add the flags, and the defaults of flags, in which the methods differ."""
    parser.add_argument("--method", choices=(*VARIANTS, "all"), default="vicreg",
                        help="a step of the path, see --list; all: each in turn")
    parser.add_argument("--list", action=ListMethods, nargs=0, default=argparse.SUPPRESS,
                        help="print the path as a table and exit")
    parser.add_argument("--blend", choices=VARIANTS, metavar="OTHER",
                        help="train on (1 - A) of the method's loss and A of OTHER's")
    parser.add_argument("--alpha", type=number(float, 0, 1), metavar="A", help="for --blend")
    parser.add_argument("--normalize", choices=("classical", "A", "B"), default="classical",
                        help="embeddings of simclr and dcl; classical: unit norm; A: dimensions "
                             "centred, then unit norm; B: dimensions centred, of norm sqrt(N / D)")
    parser.add_argument("--dim", type=number(int, 1), default=1024,
                        help="D, the dimension that the loss acts on; --head none: the backbone's")
    parser.add_argument("--hidden", type=number(int, 1),
                        help="width of the head's hidden layers; default: --dim, at least 1024")
    parser.add_argument("--head", choices=("expander", "mlp", "linear", "none"), default="expander",
                        help="mlp: Linear-ReLU-Linear, SimCLR's projector; linear; none; expander: "
                             "three layers with BatchNorm, VICReg's")
    parser.add_argument("--temperature", type=number(float, 0, above=True), default=0.1,
                        help="t of vicreg-exp, vicreg-ctr, simclr and dcl")
    parser.add_argument("--sim-coeff", type=number(float, 0), default=25.0,
                        help="a of vicreg, vicreg-exp, vicreg-ctr")
    parser.add_argument("--std-coeff", type=number(float, 0), default=25.0,
                        help="b of vicreg, vicreg-exp, vicreg-ctr")
    parser.add_argument("--cov-coeff", type=number(float, 0),
                        help="c; default: 1 for vicreg, --sim-coeff times --temperature for "
                             "vicreg-exp, vicreg-ctr")
    parser.add_argument("--mu", type=number(float, 0, above=True), default=1.0,
                        help="spectral: the largest squared norm of an embedding")
    parser.add_argument("--off-diagonal", type=number(float, 0), default=0.002,
                        help="w of barlow")
    parser.add_argument("--eps", type=number(float, 0, above=True), default=1.6,
                        help="e of tcr, the squared distortion")
    parser.add_argument("--tcr-coeff", type=number(float, 0), default=1.0, help="a of tcr")
    parser.add_argument("--lr", type=number(float, 0, above=True), default=0.06,
                        help="learning rate for a batch of 256; scales with --batch-size")


class ListMethods(argparse.Action):
    """--list: print the path, one line a method, and exit."""

    def __call__(self, parser, namespace, values, option_string=None):
        rows = [("method", "what changes", "loss", "contrastive over"),
                *((name, *row) for name, row in VARIANTS.items())]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0])))
        parser.exit()


def build_head(num_features, args):
    """Return the projector g: (N, F) -> (N, D); the expander's last layer is bare.

    SGD's largest stable learning rate falls with the width: beyond 1024 the expander gets less.
    """
    check_flags(args)
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


def check_flags(args):
    """End the program where flags do not go together."""
    if (args.blend is None) != (args.alpha is None):
        fail("--blend OTHER and --alpha A, between 0 and 1, need each other")
    methods = {args.method, args.blend} - {None}
    if args.normalize != "classical" and not any(m.startswith(("simclr", "dcl")) for m in methods):
        fail(f"--normalize {args.normalize} is for simclr and dcl, not for {args.method}")
    if args.dim == 1 and methods & {"vicreg-exp", "vicreg-ctr"}:
        fail("--dim 1 leaves vicreg-exp and vicreg-ctr nothing to contrast; at least 2")


def raise_half(*tensors):
    """The tensors in float32 at least; call the losses outside autocast."""
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def variance(z):
    """v(z) of embeddings (N, D): how far the dimensions' deviations lie below 1, a mean."""
    return F.relu(1 - torch.sqrt(z.var(dim=0) + 1e-4)).mean()


def covariance(z):
    """c(z) of embeddings (N, D): squared covariances of all pairs of dimensions, summed, over D.

    The Gram matrix of the centred embeddings has the covariance matrix's norm, |Z Z^T| = |Z^T Z|,
    so the smaller of the two is built (Garrido et al. 2023, Theorem 3.3).
    """
    n, dim = z.shape
    z = z - z.mean(dim=0)
    small = (z.T @ z if dim <= n else z @ z.T) / (n - 1)  # (D, D) or (N, N)
    diagonal = z.square().sum(dim=0) / (n - 1)  # (D,) of the covariance matrix
    return (small.square().sum() - diagonal.square().sum()) / dim


def log_sum_exp(matrix):
    """Mean over the rows of a square matrix of log sum exp, the diagonal left out; a scalar."""
    itself = torch.eye(len(matrix), dtype=torch.bool, device=matrix.device)
    return matrix.masked_fill(itself, -torch.inf).logsumexp(dim=1).mean()


def covariance_exp(z, temperature):
    """c_exp(z) of embeddings (N, D), equation 12: covariance()'s squares become a log-sum-exp.

    Here the matrix itself is needed, (D, D).
    """
    z = z - z.mean(dim=0)
    return log_sum_exp(z.T @ z / (len(z) - 1) / temperature)


def vicreg_loss(z1, z2, sim_coeff=25.0, std_coeff=25.0, cov_coeff=1.0, criterion=covariance,
                transpose=False):
    """VICReg's loss of the embeddings z1, z2 (N, D) of two views, and its terms; scalars.

    criterion is c: covariance, or covariance_exp for VICReg-exp. With transpose both regularisers
    act on the transposed embeddings, after the dimensions were centred over the batch: VICReg-ctr.
    """
    z1, z2 = raise_half(z1, z2)
    sim = F.mse_loss(z1, z2)
    if transpose:  # v now keeps each embedding's norm at sqrt(D), c is of the Gram matrix
        z1, z2 = (z1 - z1.mean(dim=0)).T, (z2 - z2.mean(dim=0)).T
    std = (variance(z1) + variance(z2)) / 2
    cov = criterion(z1) + criterion(z2)
    loss = sim_coeff * sim + std_coeff * std + cov_coeff * cov
    return loss, {"sim": sim.detach(), "std": std.detach(), "cov": cov.detach()}


def normalize(z1, z2, kind="classical"):
    """Embeddings z1, z2 (N, D) of two views as one (2N, D), Table 1 of the paper, "SimCLR".

    classical: each embedding of norm 1. A: dimensions centred over the batch before. B: dimensions
    centred and of norm sqrt(N / D), equation 14, so that embeddings have norm 1 in the mean square.
    Each view by itself, as in VICReg.
    """
    if kind != "classical":
        z1, z2 = z1 - z1.mean(dim=0), z2 - z2.mean(dim=0)
    if kind == "B":
        z1, z2 = F.normalize(z1, dim=0), F.normalize(z2, dim=0)
        return torch.cat([z1, z2]) * (z1.shape[0] / z1.shape[1]) ** 0.5
    return F.normalize(torch.cat([z1, z2]), dim=1)


def nt_xent(z1, z2, temperature=0.5, of=None, decoupled=False, kind="classical"):
    """NT-Xent of the embeddings z1, z2 (N, D) of two views, and its variants; a scalar.

    of is applied to all similarities, the positive's too: torch.abs for SimCLR-abs, torch.square
    for SimCLR-sq. decoupled leaves the positive out of the sum over the others: DCL (Yeh et al.
    2022), which then has 2N - 2 terms. kind is normalize()'s.
    """
    z = normalize(*raise_half(z1, z2), kind)  # (2N, D)
    similarity = (z @ z.T if of is None else of(z @ z.T)) / temperature  # (2N, 2N)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = torch.arange(len(z), device=z.device).roll(len(z1))
    if not decoupled:
        return F.cross_entropy(similarity.masked_fill(itself, -torch.inf), positive)
    attraction = similarity.gather(1, positive[:, None]).mean()
    return log_sum_exp(similarity.scatter(1, positive[:, None], -torch.inf)) - attraction


def product_square(a, b):
    """|A B^T|^2, the squared inner products of all rows of a (n, m) with all rows of b, summed.

    Equal to <A^T A, B^T B>: the smaller of the two sides is built, (n, n) or (m, m).
    """
    if len(a) <= a.shape[1]:
        return (a @ b.T).square().sum()
    return ((a.T @ a) * (b.T @ b)).sum()


def spectral_loss(z1, z2, mu=1.0):
    """The spectral contrastive loss of z1, z2 (N, D), over mu; a scalar (HaoChen et al. 2021).

    Embeddings longer than sqrt(mu) are scaled to that norm; negatives are the other view's.
    """
    z1, z2 = (z / (z.norm(dim=1, keepdim=True) / mu**0.5).clamp(min=1)
              for z in raise_half(z1, z2))
    n, positive = len(z1), (z1 * z2).sum(dim=1)
    negative = (product_square(z1, z2) - positive.square().sum()) / (n * (n - 1))
    return (negative - 2 * positive.mean()) / mu


def barlow_loss(z1, z2, off_diagonal=0.002):
    """Barlow Twins' loss of z1, z2 (N, D); a scalar (Zbontar et al. 2021, equation 1).

    C is the cross-correlation matrix of the two views, every dimension standardised over the batch.
    """
    z1, z2 = (F.batch_norm(z, None, None, training=True) for z in raise_half(z1, z2))
    diagonal = (z1 * z2).mean(dim=0)  # (D,) of the cross-correlation matrix
    others = product_square(z1.T, z2.T) / len(z1) ** 2 - diagonal.square().sum()
    return (1 - diagonal).square().sum() + off_diagonal * others


def coding_rate(z, eps=1.6):
    """log det(I + D / (N eps) Z^T Z) / 2 of embeddings (N, D), made unit vectors; a scalar.

    I + Z Z^T has the same determinant: the smaller of the two is built (Yu et al. 2020).
    """
    z = F.normalize(z, dim=1)
    n, dim = z.shape
    small = (z.T @ z if dim <= n else z @ z.T) * (dim / (n * eps))
    small = small + torch.eye(len(small), dtype=z.dtype, device=z.device)
    factor, failed = torch.linalg.cholesky_ex(small)  # failed stays on the device; then NaN
    return factor.diagonal().log().sum().masked_fill(failed > 0, torch.nan)


def tcr_loss(z1, z2, coeff=1.0, eps=1.6):
    """Total coding rate of z1, z2 (N, D), to be large, and cosine invariance; a scalar."""
    z1, z2 = raise_half(z1, z2)
    rate = (coding_rate(z1, eps) + coding_rate(z2, eps)) / 2
    return coeff * (1 - F.cosine_similarity(z1, z2).mean()) - rate / len(z1)


def method_loss(method, z1, z2, args):
    """Return the named method's loss of z1, z2 (N, D) and its parts.

    The last three are scaled so that the others' learning rate serves them too.
    """
    name, _, variant = method.partition("-")
    if name in ("simclr", "dcl"):
        of = {"": None, "abs": torch.abs, "sq": torch.square}[variant]
        return nt_xent(z1, z2, args.temperature, of, name == "dcl", args.normalize), {}
    if name == "spectral":
        return 5 * spectral_loss(z1, z2, args.mu), {}
    if name == "barlow":
        return 3 / z1.shape[1] * barlow_loss(z1, z2, args.off_diagonal), {}
    if name == "tcr":
        return 30 * tcr_loss(z1, z2, args.tcr_coeff, args.eps), {}

    def criterion(z):
        return covariance_exp(z, args.temperature) if variant else covariance(z)

    default = args.sim_coeff * args.temperature if variant else 1.0
    cov_coeff = default if args.cov_coeff is None else args.cov_coeff
    coefficients = args.sim_coeff, args.std_coeff, cov_coeff
    return vicreg_loss(z1, z2, *coefficients, criterion, variant == "ctr")


def loss_fn(z1, z2, args):
    """Return the loss of the global batch, z1 z2 (N, D), and its parts as a dict of scalars."""
    loss, parts = method_loss(args.method, z1, z2, args)
    if args.blend:
        other, _ = method_loss(args.blend, z1, z2, args)
        parts |= {args.method: loss.detach(), args.blend: other.detach()}
        loss = (1 - args.alpha) * loss + args.alpha * other
    return loss, parts


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
