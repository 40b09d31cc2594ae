"""Data: folders of images, crops as torchvision's, odd and damaged files; sets; drawn shapes."""

import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import simclr
import torch
from conftest import ROOT, write_folder
from PIL import Image
from test_runs import CPU, SCRIPTS, TINY, refused, train
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2.functional import pil_to_tensor, resized_crop, to_pil_image

def noise(height, width):
    return to_pil_image(torch.rand(3, height, width))

def load_data(root, *flags):
    return simclr.load_data(simclr.parse_args(["--data", str(root), "--workers", "0", *flags]))

def squares(folder, n):
    return next(simclr.fetch(folder, [(None, torch.arange(n))], CPU))

@pytest.mark.parametrize("workers", ["0", "2"])
def test_crops_are_torchvisions(workers):
    """Two of each image, a line and a point too, drawn by seed, epoch and image, in order."""
    images = [noise(*size) for size in ((40, 60), (60, 40), (33, 33), (1, 3000), (9, 8), (1, 1))]
    for i, image in enumerate(images):
        image.save(f"{i}.png")
    flags = ["--crop", "0.1", "0.9", "--seed", "7", "--workers", workers]
    folder = simclr.Folder([b"%d.png" % i for i in range(6)], 24, simclr.parse_args(flags))
    batches = [(0, torch.tensor([3, 0, 5, 1])), (2, torch.tensor([2, 4]))]
    for (epoch, index), pairs in zip(batches, simclr.fetch(folder, batches, CPU)):
        assert pairs.shape == (len(index), 2, 3, 24, 24)
        for i, pair in zip(index.tolist(), pairs):
            torch.manual_seed(simclr.derive_seed(7, 3, epoch, i))
            for view in pair:
                box = RandomResizedCrop.get_params(images[i], [0.1, 0.9], [3 / 4, 4 / 3])
                pillows = pil_to_tensor(resized_crop(images[i], *box, [24, 24]))
                assert (view.int() - pillows.int()).abs().max() <= 1

def test_squares(tmp_path):
    """Central, whole up to 64 pixels, above the middle 7/8, of the median of the shorter sides, 8
    to 224. Images of that size come unchanged, with their labels; val/ may lack classes."""
    images, labels = simclr.draw_shapes(30, 5, size=24)
    write_folder(tmp_path / "train", images, labels)
    write_folder(tmp_path / "val", images[3:5], labels[3:5])
    classes, found, y, test, test_y = load_data(tmp_path)
    assert torch.equal(squares(found, 30), images[labels.argsort(stable=True)])
    assert y.tolist() == sorted(labels.tolist()) and classes == [*"abcdefghij"]
    assert torch.equal(squares(test, 2), images[3:5]) and test_y.tolist() == [3, 4]
    for size, expected in ((6, 8), (300, 224), (96, 96)):
        image = noise(size, size + 24)
        for file in [*(tmp_path / "train").rglob("*.png")][:16]:
            image.save(file)
        assert load_data(tmp_path)[1].shape == (30, 3, expected, expected)
    for size, cut in ((28, 0), (64, 0), (72, 6)):
        box = 12 + cut, cut, 108 - cut, 96 - cut
        expected = pil_to_tensor(image.resize((size, size), Image.Resampling.BILINEAR, box)).int()
        found = squares(load_data(tmp_path, "--image-size", str(size))[1], 30)
        assert sum((x - expected).abs().max() <= 1 for x in found) == 16

def test_holdout(image_folder):
    """Of the asked size, disjoint, nothing lost, with the labels, the same each time."""
    _, whole, y, *_ = load_data(image_folder)
    _, kept, kept_y, held, held_y = load_data(image_folder, "--holdout", "20")
    files, label = [*kept.files, *held.files], dict(zip(whole.files, y.tolist()))
    assert held.shape == (20, 3, 16, 16) and len(files) == len({*files}) == 80
    assert len(held_y.unique()) > 4 and [label[file] for file in files] == [*kept_y, *held_y]
    assert [*load_data(image_folder, "--holdout", "20", "--seed", "1")[3].files] == [*held.files]

def test_plan_visits_every_image(monkeypatch):
    """Once an epoch, in another order the next, from any step on; of two processes each a half."""
    args, halves = simclr.parse_args(["--batch-size", "12"]), []
    whole = [*simclr.plan(40, args, range(6), CPU)]
    first, second = (torch.cat([index for _, index in whole[i : i + 3]]) for i in (0, 3))
    assert len(first.unique()) == len(second.unique()) == 36 and not torch.equal(first, second)
    monkeypatch.setattr(simclr, "WORLD", 2)
    for rank in (0, 1):
        monkeypatch.setattr(simclr, "RANK", rank)
        halves.append([*simclr.plan(40, args, range(1, 6), CPU)])
    for (epoch, index), (_, one), (also, two), expected in zip(whole[1:], *halves, (0, 0, 1, 1, 1)):
        assert epoch == also == expected and torch.equal(index, torch.cat([one, two]))

def test_images_keep_their_labels(image_folder, monkeypatch):
    """A step sees images, whole where a crop is, labels of the same files, draws of its own."""
    _, folder, y, *_ = load_data(image_folder)
    pixels, hits, seen = squares(folder, 80), [], set()
    def looks(network, optimizer, scaler, view, loss, images, labels, draws, *args):
        same = (pixels == images[:, :1]).flatten(2).all(2).nonzero()  # pairs of a crop and an image
        hits.extend(labels[same[:, 0]] == y[same[:, 1]])
        return seen.add(draws.sum().item()) or {"loss": torch.ones(())}
    monkeypatch.setattr(simclr, "train_step", looks)
    train(simclr, "--data", image_folder, *TINY, "--crop", "1", "1", "--steps", "4")
    assert len(hits) >= 20 and all(hits) and len(seen) == 4

def test_odd_images_load():
    """Gray, bilevel, palettes, alpha, CMYK; turned as the camera's note says, if it can be read."""
    gray = (rgb := noise(30, 40)).convert("L")
    plain = (rgb, gray, *map(rgb.convert, ("1", "P", "CMYK")), rgb.quantize(7))
    cases = [(f"{i}.tif", image, image, {}) for i, image in enumerate(plain)]
    cases += [("a.png", gray.convert("LA"), gray, {}), ("b.png", rgb.convert("RGBA"), rgb, {}),
              ("exact.webp", rgb, rgb, {"lossless": True}), ("plain.gif", gray, gray, {})]
    cases.append(("c.webp", rgb, rgb, {"lossless": True, "exif": b"garbage garbage"}))
    for turn, undo in zip(range(2, 9), (0, 3, 1, 5, 4, 6, 2)):  # a turn, Image.Transpose's number
        exif = Image.Exif()
        exif[0x0112] = turn
        cases.append((f"{turn}.png", rgb, rgb.transpose(undo), {"exif": exif}))
    for name, image, expected, options in cases:
        image.save(name, **options)
        assert np.array_equal(simclr.open_image(name.encode()), expected.convert("RGB")), name

def test_deep_images_are_refused_by_name(tmp_path):
    """Pillow would cut their values off, or leave bits of them out. It does not write such PNGs."""
    for kind, channels in ((0, 1), (2, 3), (4, 2), (6, 4)):  # gray, RGB, with alpha
        header = b"IHDR" + struct.pack(">IIBBBBB", 2, 2, 16, kind, 0, 0, 0)
        rows = b"IDAT" + zlib.compress(2 * (b"\0" + bytes(range(4 * channels))))
        (tmp_path / f"{kind}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part))
            for part in (header, rows, b"IEND")))
    for kind in (np.uint16, np.int32, np.float32):
        Image.fromarray(kind([[1, 70]])).save(tmp_path / f"{kind.__name__}.tif")
    tags = {256: 1, 257: 1, 258: 122, 259: 1, 262: 5, 273: 130, 277: 4, 278: 1, 279: 8}
    (tmp_path / "cmyk.tif").write_bytes(b"II*\0" + struct.pack("<IH", 8, 9) + b"".join(
        struct.pack("<HHII", tag, 3, 4 if tag == 258 else 1, value)
        for tag, value in tags.items()) + struct.pack("<I4H", 0, *[16] * 4) + bytes(range(8)))
    for file in tmp_path.iterdir():
        with pytest.raises(OSError, match=f"/{file.name}': more than 8 bits"):
            simclr.open_image(os.fsencode(file))

@pytest.mark.parametrize("workers", ["0", "2"])
def test_damaged_image_stops_a_run(workers, image_folder):
    """One line with its name from the program itself, which ends; an OSError from main()."""
    shutil.copytree(image_folder, "images")
    file = "images/test/f/0005.png"  # not among those that tell the size
    data = Path(file).read_bytes()
    Path(file).write_bytes(data[: len(data) // 2] + b"?" + data[len(data) // 2 + 1 :])
    flags = ("--data", "images", *TINY, "--workers", workers)
    if workers == "0":
        with pytest.raises(OSError, match=file):
            train(simclr, *flags)
    command = [sys.executable, ROOT / "simclr.py", *flags]
    done = subprocess.run(command, capture_output=True, timeout=60, text=True)
    line, = (line for line in done.stderr.splitlines() if "worker" not in line)  # too few cores
    assert done.returncode == 2 and line.startswith(f"simclr.py: error: mend, shrink or remove the image '{file}'")

def test_what_is_found_in_folders(capsys, image_folder, tmp_path):
    """No class from what is hidden or trash, nor from files; an ending in any case; once what links
    lead to; all without labels where there is no train/ or one class, a tenth of them held out."""
    shutil.copytree(image_folder, tmp_path / "f")
    os.chdir(tmp_path / "f")
    for name in (".ipynb_checkpoints", "@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN", "__MACOSX",
                 "empty", "#1"):
        os.mkdir(f"train/{name}")
        name == "empty" or shutil.copy("train/a/0000.png", f"train/{name}")
    for name in ("train/a/.0000.png", "neighbours.png", "train/loose.PNG", "train/a/#.png",
                 "train/a/neighbours.png"):
        shutil.copy("train/a/0000.png", name)
    Path("train/a/notes.txt").write_text("no image")
    os.symlink(".", "again")
    os.symlink("a", "train/z")
    classes, images, y, *_, test_y = load_data(".")
    assert capsys.readouterr().out.startswith("123 images, of ")
    assert classes == ["#1", *"abcdefghij"] and len(y) == len({*images.files}) == 83
    assert y[[*images.files].index(b"train/loose.PNG")] == -1
    assert {*test_y.tolist()} == {*range(1, 11)}
    os.mkdir("test/sun")
    _ = [shutil.copy("train/a/0000.png", place) for place in ("test", "test/sun")]
    assert "in no class of train/: ['.', 'sun']" in refused(capsys, simclr, "--data", ".")
    os.rename("test", "elsewhere")
    classes, images, y, held, held_y = load_data(".")
    assert len(held_y) == 9 and len({*images.files, *held.files}) == 83 == len(y) + 9
    assert min(held_y) >= 0 and len(classes) == 11
    for i in range(200):
        os.symlink("a/0000.png", f"train/{i}.png")
    assert len(load_data(".")[-1]) == 9 and min(load_data(".")[-1]) >= 0  # a tenth of the labelled
    for i in range(200):
        os.unlink(f"train/{i}.png")
    os.rename("train", "pictures")
    classes, images, y, held, held_y = load_data(".")  # also those that were to test on
    assert classes == [] and {*y.tolist(), *held_y.tolist()} == {-1}
    assert len(y) + len(held_y) == len({*images.files, *held.files}) == 125 and len(held_y) == 13
    os.makedirs("val/b")
    shutil.copy("pictures/b/0001.png", "val/b")
    shutil.copytree("pictures/b", "train/b")
    classes, images, y, held, held_y = load_data(".")
    assert classes == ["b"] and y.tolist() == [-1] * 8 and held_y.tolist() == [-1]
    shutil.rmtree("train")
    os.symlink("nowhere", "train")  # what was to be mounted is not
    os.mkdir("none")
    for folder in ("none", "pictures/a/notes.txt", "."):
        assert "no folder with images" in refused(capsys, simclr, "--data", folder)

@pytest.mark.parametrize("data", ["folder", "one class", "one test image"])
def test_images_without_labels_train(data, image_folder, tmp_path):
    """Loss and rank are logged, no accuracy is; the embeddings tell which file they are of."""
    where = image_folder / ("train/a" if data == "one test image" else "train")
    if data == "one class":
        where = tmp_path / "root"
        for name in ("train/a", "test/a"):
            shutil.copytree(image_folder / name, where / name)
    final = train(simclr, "--data", where, *TINY, "--batch-size", "4", "--out", "run")
    assert {*final} == {"rank", "rank_untrained", "step", "seconds"} and final["rank"] >= 1
    kept = torch.load("run/embeddings.pt", weights_only=True)
    assert len(kept["h"]) == len(kept["paths"]) and {*kept["labels"].tolist()} == {-1}
    images = simclr.Folder([os.fsencode(path) for path in kept["paths"]], 16, None)
    model = simclr.build_backbone("convnet", 16)[0].eval()
    model.load_state_dict(torch.load("run/backbone.pt", weights_only=True))
    with torch.no_grad():
        h = model(torch.stack([images[None, i] for i in range(len(kept["h"]))]) / 255)
    torch.testing.assert_close(h, kept["h"], rtol=1e-4, atol=1e-5)

def test_torchvision_sets(monkeypatch):
    """CIFAR's (n, 32, 32, 3) and STL-10's (n, 3, 96, 96), whose unlabelled are not held out."""
    def cifar(root, train, download):
        images = np.random.default_rng(train).integers(0, 256, (6, 32, 32, 3), np.uint8)
        return SimpleNamespace(data=images, targets=[0, 1, 0, 1, 1, int(train)], classes=[5, 6])
    def stl(root, split, download):
        images = np.arange(6, dtype=np.uint8).repeat(3 * 96 * 96).reshape(6, 3, 96, 96)
        labels = np.array([0, 1, 0, 1, -1, -1] if split == "train+unlabeled" else [0] * 6)
        return SimpleNamespace(data=images, labels=labels, classes=[5, 6])
    monkeypatch.setattr("torchvision.datasets.CIFAR100", cifar)
    monkeypatch.setattr("torchvision.datasets.STL10", stl)
    parts = load_data("cifar100")
    for (images, labels), train in ((parts[1:3], True), (parts[3:], False)):
        assert np.array_equal(images.permute(0, 2, 3, 1), cifar("", train, True).data)
        assert labels.tolist() == [0, 1, 0, 1, 1, int(train)]
    _, images, labels, held, held_labels = load_data("stl10", "--holdout", "3")
    kept, held = (x[:, 0, 0, 0].tolist() for x in (images, held))
    assert sorted(kept + held) == [*range(6)] and kept[1:] == [4, 5]
    assert [*labels, *held_labels] == [kept[0] % 2, -1, -1, *(i % 2 for i in held)]

def test_no_network(capsys, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: open("no route"))
    for script, name in zip(SCRIPTS.values(), ("cifar10", "cifar100", "stl10")):
        line = refused(capsys, script, "--data", name)
        assert "no route" in line and "--data shapes" in line and "--data DIR" in line

def test_drawn_shapes():
    images, labels = simclr.draw_shapes(100, 1)
    again, other = (simclr.draw_shapes(100, seed)[0] for seed in (1, 2))
    assert images.shape == (100, 3, 32, 32) and torch.bincount(labels).tolist() == [10] * 10
    assert torch.equal(images, again) and not torch.equal(images, other)
    assert min(len(image.unique()) for image in images) > 9  # something is drawn on every one
