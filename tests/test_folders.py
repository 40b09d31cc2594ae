"""Data: folders of images, crops as torchvision's, odd and damaged files; sets; drawn shapes."""

import os
import shutil
import signal
import struct
import subprocess
import sys
import urllib.error
import zlib

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, write_folder
from PIL import Image, ImageOps
from test_processes import finish, start
from test_runs import (
    CPU, EACH, SCRIPTS, TINY, equal_weights, finished, in_an_empty_folder, load, records, refused,
    train, wait_for)
from torchvision.transforms.v2.functional import pil_to_tensor, resized_crop, to_pil_image

import simclr

__all__ = ["finished", "in_an_empty_folder"]

def photograph(height, width, seed=0):
    coarse = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    x = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
    return to_pil_image((x.clamp(0, 1) * 255).round().to(torch.uint8))

def load_data(script, root, *flags):
    return script.load_data(script.parse_args(["--data", str(root), "--workers", "0", *flags]))

def one_by_one(script, folder, index, epoch=None):
    return next(script.fetch(folder, [(epoch, torch.tensor(index))], CPU))

@pytest.fixture
def photographs(tmp_path):
    """A folder of six PNG files of various sizes, and the pictures, in its order."""
    sizes = ((40, 60), (60, 40), (33, 33), (24, 90), (9, 8), (50, 51))
    images = [photograph(*size, seed) for seed, size in enumerate(sizes)]
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        for i, image in enumerate(images):
            image.save(tmp_path / split / "a" / f"{i}.png")
    return tmp_path, images

# ---- reading -------------------------------------------------------------------------------------

@pytest.mark.parametrize("workers", ["0", "2"])
def test_crops_are_torchvisions(workers, photographs):
    """Two of each image as it is on disk, drawn by seed, epoch and image, in the order asked."""
    script, (root, images) = SCRIPTS["directclr"], photographs
    flags = ("--image-size", "24", "--crop", "0.1", "0.9", "--seed", "7", "--workers", workers)
    folder = load_data(script, root, *flags)[1]
    batches = [(0, torch.tensor([3, 0, 5, 1])), (2, torch.tensor([2, 4]))]
    found = [*script.fetch(folder, batches, CPU)]
    assert [tuple(x.shape) for x in found] == [(4, 2, 3, 24, 24), (2, 2, 3, 24, 24)]
    for (epoch, index), pairs in zip(batches, found):
        for i, pair in zip(index.tolist(), pairs):
            torch.manual_seed(script.derive_seed(7, 3, epoch, i))
            for view in pair:
                box = torchvision.transforms.RandomResizedCrop.get_params(
                    images[i], [0.1, 0.9], [3 / 4, 4 / 3])
                assert torch.equal(view, pil_to_tensor(resized_crop(images[i], *box, [24, 24])))

@pytest.mark.parametrize("size, side", [(28, 96), (64, 96), (72, 84)])
def test_central_squares(size, side, tmp_path):
    """Whole up to 64 pixels; above the middle 7/8, as Resize(256), CenterCrop(224)."""
    image = photograph(96, 120)
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        image.save(tmp_path / split / "a" / "0.png")
    data = load_data(SCRIPTS["vicreg"], tmp_path, "--image-size", str(size))
    left, top = (120 - side) / 2, (96 - side) / 2
    expected = image.resize((size, size), Image.Resampling.BILINEAR,
                            (left, top, left + side, top + side))
    found = one_by_one(SCRIPTS["vicreg"], data[3], [0])[0]
    assert (found.int() - pil_to_tensor(expected)).abs().max() <= 1

def test_folder_is_its_images(tmp_path):
    """Of their own size unchanged, in order, with their labels; val/ may lack classes of train/;
    a size asked for is had, else the median of the shorter sides, at least 8 and at most 224."""
    images, labels = simclr.draw_shapes(30, 5, size=24)
    write_folder(tmp_path / "train", images, labels)
    write_folder(tmp_path / "val", images[3:5], labels[3:5])
    classes, found, y, test, test_y = load_data(simclr, tmp_path)
    order = labels.argsort(stable=True)
    assert classes == [*"abcdefghij"] and torch.equal(y, labels[order])
    assert torch.equal(one_by_one(simclr, found, [*range(30)]), images[order])
    assert torch.equal(one_by_one(simclr, test, [0, 1]), images[3:5]) and test_y.tolist() == [3, 4]
    for size, expected in ((6, 8), (300, 224), (40, 40)):
        for file in [*(tmp_path / "train").rglob("*.png")][:16]:
            photograph(size, size + 9).save(file)
        assert load_data(simclr, tmp_path)[1].shape == (30, 3, expected, expected)
    assert load_data(simclr, tmp_path, "--image-size", "16")[3].shape == (2, 3, 16, 16)

def test_holdout(image_folder):
    """Of the asked size, disjoint, nothing lost, with the labels, the same each time."""
    script = SCRIPTS["interpolate"]
    _, whole, y, *_ = load_data(script, image_folder)
    _, kept, kept_y, held, held_y = load_data(script, image_folder, "--holdout", "20")
    assert kept.shape == (60, 3, 16, 16) and held.shape == (20, 3, 16, 16)
    assert sorted([*kept.files, *held.files]) == sorted(whole.files)
    label = dict(zip(whole.files, y.tolist()))
    assert [label[file] for file in (*kept.files, *held.files)] == [*kept_y.tolist(),
                                                                    *held_y.tolist()]
    again = load_data(script, image_folder, "--holdout", "20", "--seed", "1")[3]
    assert [*again.files] == [*held.files] and len(set(held_y.tolist())) > 4

def test_workers_and_stops_do_not_matter(finished, image_folder):
    """Crops are drawn by seed, epoch and image; a run goes on with the same permutation."""
    out, flags, *_ = finished(simclr)
    for steps, workers in (("3", "2"), ("4", "1"), ("0", "0")):
        run = ("--resume", "run") if steps != "3" else (*flags, "--out", "run")
        train(simclr, *run, "--workers", workers, "--steps", steps)
    assert equal_weights(out, "run")

def test_plan_visits_every_image(monkeypatch):
    """An epoch has each image once at most, in another order than the next, from any step on; of
    two processes each has one half of every batch."""
    args = simclr.parse_args(["--batch-size", "12"])
    whole = [*simclr.plan(40, args, range(6), CPU)]
    assert [epoch for epoch, _ in whole] == [0, 0, 0, 1, 1, 1]
    epochs = [torch.cat([index for _, index in whole[i : i + 3]]) for i in (0, 3)]
    assert all(len(epoch.unique()) == 36 for epoch in epochs) and not torch.equal(*epochs)
    halves = []
    monkeypatch.setattr(simclr, "WORLD", 2)
    for rank in (0, 1):
        monkeypatch.setattr(simclr, "RANK", rank)
        halves.append([*simclr.plan(40, args, range(1, 6), CPU)])
    for (epoch, index), (_, one), (also, two) in zip(whole[1:], *halves):
        assert epoch == also and torch.equal(index, torch.cat([one, two])) and len(one) == 6

def test_images_keep_their_labels(image_folder, monkeypatch):
    """What a training step sees are images, whole where a crop is, and labels of the same files."""
    _, folder, y, *_ = load_data(simclr, image_folder)
    pixels = one_by_one(simclr, folder, [*range(80)])
    hits, step = [], simclr.train_step
    def looks(network, optimizer, scaler, view, images, labels, *args):
        for pair, label in zip(images, labels):
            same = (pixels == pair[0]).flatten(1).all(1).nonzero()
            hits.extend(y[same[0]] == label for _ in same[:1])
        return step(network, optimizer, scaler, view, images, labels, *args)
    monkeypatch.setattr(simclr, "train_step", looks)
    train(simclr, "--data", image_folder, *TINY, "--crop", "1", "1", "--steps", "4")
    assert len(hits) >= 20 and all(hits)

def own_group(script):
    os.setpgrp()

def test_signal_to_a_group_with_workers(finished, tmp_path):
    """A terminal and a scheduler signal the workers too: they stay until training has saved."""
    out, flags, *_ = finished(simclr)
    process, = start(simclr, *flags, "--workers", "2", "--out", "run", prepare=own_group)
    wait_for(lambda: len(records("run")) >= 3)
    os.killpg(process.pid, signal.SIGTERM)
    assert finish([process]) == [128 + signal.SIGTERM] and 1 <= load("run")["step"] < 12
    train(simclr, "--resume", "run")
    assert equal_weights(out, "run")

# ---- odd and damaged images ----------------------------------------------------------------------

def gray(image):
    return Image.fromarray(np.asarray(image.convert("L")))

ODD = {  # file name: what makes it of an RGB image, and the image that is expected
    "gray.png": lambda image: (gray(image), gray(image)),
    "bilevel.png": lambda image: (image.convert("1"), image.convert("1")),
    "palette.png": lambda image: (image.quantize(7), image.quantize(7)),
    "palette.gif.png": lambda image: (image.convert("P"), image.convert("P")),
    "alpha.png": lambda image: (image.convert("RGBA"), image),
    "gray-alpha.png": lambda image: (gray(image).convert("LA"), gray(image)),
    "cmyk.tif": lambda image: (image.convert("CMYK"), image.convert("CMYK")),
    "plain.bmp": lambda image: (image, image), "plain.webp": lambda image: (image, image)}

@pytest.mark.parametrize("name", ODD)
def test_odd_images_load(name, tmp_path):
    made, expected = ODD[name](photograph(30, 40))
    made.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    found = simclr.open_image(os.fsencode(tmp_path / name))
    assert torch.equal(pil_to_tensor(found), pil_to_tensor(expected.convert("RGB")))

@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_rotation(turn, tmp_path):
    image = photograph(24, 40)
    exif = image.getexif()
    exif[0x0112] = turn
    image.save(tmp_path / "turned.png", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "turned.png"))
    found = simclr.open_image(os.fsencode(tmp_path / "turned.png"))
    assert torch.equal(pil_to_tensor(found), pil_to_tensor(expected))
    assert found.size == ((40, 24) if turn < 5 else (24, 40))

@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 2)], ids=str)
def test_tiny_and_very_long_images(size, tmp_path):
    """They become squares and crops like any other."""
    photograph(*size).save(tmp_path / "a.png")
    args = simclr.parse_args(["--workers", "0"])
    folder = simclr.Folder([os.fsencode(tmp_path / "a.png")], 24, args)
    assert one_by_one(simclr, folder, [0]).shape == (1, 3, 24, 24)
    assert one_by_one(simclr, folder, [0] * 5, epoch=1).shape == (5, 2, 3, 24, 24)

def deep_png(kind, channels):
    """A PNG of 16 bits a channel, which Pillow reads but does not write; 2 x 2 pixels."""
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(
            ">I", zlib.crc32(name + content))
    rows = b"".join(b"\0" + bytes(range(4 * channels)) for _ in range(2))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, kind, 0, 0, 0)) \
        + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")

@pytest.mark.parametrize("name, content", [
    ("gray.png", deep_png(0, 1)), ("gray-alpha.png", deep_png(4, 2)), ("rgb.png", deep_png(2, 3)),
    ("rgba.png", deep_png(6, 4)), ("float.tif", np.float32([[0.5, 2]])),
    ("int.tif", np.int32([[1, 70000]])), ("gray.tif", np.uint16([[1, 70]]))], ids=str)
def test_deep_images_are_refused_by_name(name, content, tmp_path):
    """Pillow would cut the values off, or leave eight bits of them out."""
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        Image.fromarray(content).save(tmp_path / name)
    assert np.asarray(Image.open(tmp_path / name)).size > 1  # the file is sound
    with pytest.raises(OSError, match=f"/{name}' cannot be used: more than 8 bits a channel"):
        simclr.open_image(os.fsencode(tmp_path / name))

@pytest.mark.parametrize("workers", ["0", "2"])
def test_damaged_image_stops_a_run(workers, image_folder, tmp_path):
    """One line with its name from the program itself; main() leaves it to others to catch."""
    folder = shutil.copytree(image_folder, tmp_path / "images")
    file = sorted((folder / "train").rglob("*.png"))[40 + 1]  # not among those that tell the size
    file.write_bytes(file.read_bytes()[:90])
    flags = ("--data", folder, *TINY, "--workers", workers)
    if workers == "0":
        with pytest.raises(OSError, match=str(file)):
            train(SCRIPTS["vicreg"], *flags)
    done = subprocess.run([sys.executable, ROOT / "vicreg.py", *flags], capture_output=True,
                          text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"vicreg.py: error: the image '{file}' cannot be used: ")

def test_bad_folders(capsys, image_folder, tmp_path):
    """What the script finds is one line at once; what torchvision finds an OSError."""
    script, folder = SCRIPTS["vicreg"], shutil.copytree(image_folder, tmp_path / "images")
    shutil.copytree(folder / "test" / "a", folder / "test" / "sun")
    line = refused(capsys, script, "--data", folder)
    assert "test/ has classes that train/ lacks: ['sun']" in line
    (folder / "train" / "empty").mkdir()
    with pytest.raises(OSError, match="empty"):
        train(script, "--data", folder)
    shutil.rmtree(folder / "train")
    assert "train/CLASS/*" in refused(capsys, script, "--data", folder)
    (folder / "train").mkdir()
    with pytest.raises(OSError, match="class folder"):
        train(script, "--data", folder)
    shutil.rmtree(folder / "test")
    assert "val|test/CLASS/*" in refused(capsys, script, "--data", folder)
    assert not os.path.exists("runs")

# ---- sets of images ------------------------------------------------------------------------------

@EACH
def test_no_network(script, capsys, monkeypatch, tmp_path):
    def download(self):
        raise urllib.error.URLError("no route to host")
    for name in ("cifar10", "cifar100", "stl10"):
        monkeypatch.setattr(getattr(torchvision.datasets, name.upper()), "download", download)
        line = refused(capsys, script, "--data", name, "--data-dir", tmp_path)
        assert "no route to host" in line and "--data shapes" in line and "--data DIR" in line

class CIFAR:
    classes = ["a", "b"]
    def __init__(self, root, train, download):
        rng = np.random.default_rng(int(train))
        self.data = rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
        self.targets = [0, 1, 0, 1, 1, int(train)]

class STL:
    classes = ["a", "b"]
    def __init__(self, root, split, download):
        self.data = np.arange(6, dtype=np.uint8).repeat(3 * 96 * 96).reshape(6, 3, 96, 96)
        self.labels = np.array([0, 1, 0, 1, -1, -1] if split == "train+unlabeled" else [0] * 6)

def test_torchvision_sets(monkeypatch):
    """CIFAR's (n, 32, 32, 3) arrays and STL-10's (n, 3, 96, 96), with its unlabelled images, of
    which none is held out."""
    script = SCRIPTS["directclr"]
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", CIFAR)
    monkeypatch.setattr(torchvision.datasets, "STL10", STL)
    classes, *parts = load_data(script, "cifar100")
    for part, train in ((0, True), (2, False)):
        expected = torch.from_numpy(CIFAR("", train, True).data).permute(0, 3, 1, 2)
        assert torch.equal(parts[part], expected) and parts[part].is_contiguous()
        assert parts[part + 1].tolist() == [0, 1, 0, 1, 1, int(train)] and classes == ["a", "b"]
    _, images, labels, held, held_labels = load_data(script, "stl10", "--holdout", "3")
    kept, held = images[:, 0, 0, 0].tolist(), held[:, 0, 0, 0].tolist()
    assert sorted(kept + held) == [*range(6)] and kept[1:] == [4, 5]
    assert labels.tolist()[1:] == [-1, -1] and labels.dtype == torch.int64
    assert [labels[0], *held_labels] == [i % 2 for i in kept[:1] + held]

def test_drawn_shapes():
    images, labels = simclr.draw_shapes(100, 1)
    again, other = (simclr.draw_shapes(100, seed)[0] for seed in (1, 2))
    assert images.shape == (100, 3, 32, 32) and images.dtype == torch.uint8
    assert torch.equal(images, again) and not torch.equal(images, other)
    assert torch.bincount(labels).tolist() == [10] * 10
    assert min(len(image.unique()) for image in images) > 9  # something is drawn on every one
