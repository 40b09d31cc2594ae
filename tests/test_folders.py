"""Folders of images: in memory or streamed, crops as torchvision's, odd and damaged files."""

import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
import torchvision.transforms as v1
from PIL import Image, ImageOps
from test_runs import TINY, equal_weights, load, records, refused, start, wait_for
from torchvision.transforms.v2.functional import (
    center_crop, pil_to_tensor, resize, resized_crop, to_pil_image)

import simclr

CPU = torch.device("cpu")


def photograph(height, width, seed=0):
    coarse = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    x = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def make_folder(paths, *flags, size=24, part=1.0):
    args = simclr.parse_args(["--workers", "2", *flags])
    return simclr.Folder([str(path) for path in paths], size, part, args)


def load_data(root, *flags):
    return simclr.load_data(simclr.parse_args(["--data", str(root), "--workers", "2", *flags]))


@pytest.fixture
def photographs(tmp_path):
    """Six PNG files of various sizes, and their pixels."""
    sizes = ((40, 60), (60, 40), (33, 33), (24, 90), (9, 8), (50, 51))
    images = [photograph(*size, seed) for seed, size in enumerate(sizes)]
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for image, path in zip(images, paths):
        to_pil_image(image).save(path)
    return paths, images


# ---- crops and squares --------------------------------------------------------------------------


def test_streamed_crops_are_torchvisions(photographs):
    """Two crops of each image as it is on disk, drawn by its seed, in the order asked."""
    paths, images = photographs
    index = torch.tensor([3, 0, 5, 1, 2, 4])
    seeds = torch.tensor([5, 2**63 - 2, 7, 0, 11, 2**40])
    batches = [(index[:4], seeds[:4]), (index[4:], seeds[4:])]
    found = [*simclr.fetch(make_folder(paths, "--crop", "0.1", "0.9"), batches, CPU)]
    assert [len(views) for views, _ in found] == [4, 2]
    views, where = (torch.cat(part) for part in zip(*found))
    assert views.shape == (6, 2, 3, 24, 24) and torch.equal(where, index)
    crop = v1.RandomResizedCrop(24, scale=(0.1, 0.9), antialias=True)
    for pair, i, seed in zip(views, index.tolist(), seeds.tolist()):
        torch.manual_seed(seed)
        for view in pair:
            box = crop.get_params(images[i], crop.scale, crop.ratio)
            assert torch.equal(view, resized_crop(images[i], *box, [24, 24], antialias=True))


@pytest.mark.parametrize("stream", [False, True])
def test_central_squares(tmp_path, stream):
    """Whole squares in memory; of streamed images the middle 7/8, as Resize(256), CenterCrop(224).
    """
    image = photograph(64, 100)
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        to_pil_image(image).save(tmp_path / split / "a" / "0.png")
    flag = "--stream" if stream else "--no-stream"
    data = load_data(tmp_path, "--image-size", "28", flag)
    side = 56 if stream else 64
    expected = resize(center_crop(image, [side, side]), [28, 28], antialias=True)
    assert isinstance(data.test_images, simclr.Folder) == stream
    (found, index), = simclr.fetch(data.test_images, [(torch.tensor([0]), None)], CPU)
    assert torch.equal(found[0], expected) and index.tolist() == [0]


def test_streams_by_itself_what_is_large(image_folder):
    """120 images of 4,000 px would take 5.4 GiB; of 3,000 px 3 GiB, which is not tried here."""
    data = load_data(image_folder, "--image-size", "4000")
    assert isinstance(data.train_images, simclr.Folder) and data.train_images.shape[0] == 80
    assert data.train_images.shape[1:] == (3, 4000, 4000)
    assert isinstance(load_data(image_folder).train_images, torch.Tensor)


def test_parts_of_a_folder(photographs):
    paths, _ = photographs
    whole = make_folder(paths)
    mask = torch.tensor([True, False, True, False, False, True])
    for part, expected in ((whole[mask], [0, 2, 5]), (whole[1:3], [1, 2]),
                           (whole[torch.tensor([4, 4])], [4, 4])):
        assert [os.fsdecode(path) for path in part.paths] == [str(paths[i]) for i in expected]
        assert part.shape == (len(expected), 3, 24, 24)
    assert len(whole) == 6


def test_holdout_of_a_streamed_folder(image_folder):
    streamed, held = (load_data(image_folder, "--holdout", "20", flag)
                      for flag in ("--stream", "--no-stream"))
    assert len(streamed.train_images) == 60 and len(streamed.test_images) == 20
    assert torch.equal(streamed.test_labels, held.test_labels)
    for name in ("train_images", "test_images"):
        part = getattr(streamed, name)
        part.part = 1.0  # whole squares, as in memory
        found, _ = next(simclr.fetch(part, [(torch.arange(len(part)), None)], CPU))
        assert torch.equal(found, getattr(held, name))


# ---- whole runs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def streamed(image_folder, tmp_path_factory):
    """A streamed run, uninterrupted, with one worker: (folder, flags)."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("streamed") / "run"
    flags = ["--data", str(image_folder), *TINY, "--stream"]
    simclr.main([*flags, "--workers", "1", "--out", str(out)])
    return out, flags


def test_workers_do_not_matter(streamed, tmp_path):
    """Crops are drawn by seed and step, not by worker; another seed draws others."""
    out, flags = streamed
    torch.set_num_threads(1)
    simclr.main([*flags, "--workers", "2", "--out", str(tmp_path / "two")])
    assert equal_weights(out, tmp_path / "two")
    simclr.main([*flags, "--seed", "1", "--out", str(tmp_path / "other")])
    assert not equal_weights(out, tmp_path / "other")


@pytest.mark.parametrize("step", [3, 4, 6])
def test_streamed_run_goes_on(streamed, tmp_path, step):
    """With the permutation and the crops of the uninterrupted run."""
    out, flags = streamed
    torch.set_num_threads(1)
    simclr.main([*flags, "--steps", str(step), "--out", str(tmp_path / "run")])
    simclr.main(["--resume", str(tmp_path / "run")])
    assert equal_weights(out, tmp_path / "run")


def test_schedule_visits_every_image_with_its_own_draws(image_folder):
    """An epoch holds each image once, in another order than the next; no two images' crops are
    drawn by the same seed, within a step and across steps."""
    args = simclr.parse_args(["--data", str(image_folder), "--batch-size", "20", "--stream"])
    steps = [*simclr.schedule(simclr.load_data(args).train_images, args, 0, 8)]
    epochs = [torch.cat([index for index, _ in steps[i : i + 4]]) for i in (0, 4)]
    assert all(sorted(epoch.tolist()) == [*range(80)] for epoch in epochs)
    assert not torch.equal(*epochs)
    seeds = torch.cat([part for _, part in steps])
    assert len(seeds.unique()) == 8 * 20
    late = [*simclr.schedule(simclr.load_data(args).train_images, args, 6, 8)]
    for (index, mine), (other, theirs) in zip(steps[6:], late):
        assert torch.equal(index, other) and torch.equal(mine, theirs)


def test_streamed_images_keep_their_labels(image_folder, tmp_path, monkeypatch):
    """What train_step and kNN see are the images and labels of the same files."""
    data = load_data(image_folder, "--stream")
    memory = load_data(image_folder)
    data.train_images.part = 1.0
    index = torch.randperm(80, generator=torch.Generator().manual_seed(0))

    h, y = simclr.represent(torch.nn.Flatten(), data.train_images, data.train_labels, index, CPU)
    torch.testing.assert_close(h, memory.train_images[index].flatten(1) / 255)
    assert torch.equal(y, memory.train_labels[index])
    seen, train_step = [], simclr.train_step

    def looks(model, optimizer, scaler, view, images, labels, *args):
        seen.append((images, labels))
        return train_step(model, optimizer, scaler, view, images, labels, *args)

    monkeypatch.setattr(simclr, "train_step", looks)
    flags = ["--data", str(image_folder), *TINY, "--stream", "--crop", "1", "1", "--steps", "4"]
    simclr.main([*flags, "--out", str(tmp_path / "run")])
    for images, labels in seen:
        assert images.shape == (20, 2, 3, 16, 16)
        for pair, label in zip(images, labels):
            whole = (memory.train_images == pair[0]).flatten(1).all(1)  # area 1 may crop a little
            if whole.any():
                assert memory.train_labels[whole.nonzero()[0, 0]] == label
    hits = sum((memory.train_images == x[0]).flatten(1).all(1).any() for x in seen[0][0])
    assert hits >= 5  # some crops were the whole image, so the comparison above took place


@pytest.mark.parametrize("signum", ["SIGINT", "SIGTERM"])
def test_signal_to_a_streaming_group(streamed, tmp_path, signum):
    """A terminal and a scheduler signal the workers too: they stay until training has saved."""
    out, flags = streamed
    run = tmp_path / "run"
    process = start("simclr", *flags, "--epochs", "3", "--out", run, session=True)
    wait_for(lambda: len(records(run)) >= 3)
    os.killpg(process.pid, getattr(signal, signum))
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, signum) and not errors
    assert "saved; go on with" in output and 1 <= load(run)["step"] < 12
    torch.set_num_threads(1)
    simclr.main(["--resume", str(run)])
    assert equal_weights(out, run)


# ---- odd images ---------------------------------------------------------------------------------


def gray(image):
    return Image.fromarray(np.asarray(image.convert("L")))


ODD = {  # file name: what makes it of an RGB image, and the RGB pixels that are expected
    "gray.png": lambda image: (gray(image), gray(image)),
    "bilevel.png": lambda image: (image.convert("1"), image.convert("1")),
    "palette.png": lambda image: (image.quantize(7), image.quantize(7)),
    "palette.gif.png": lambda image: (image.convert("P"), image.convert("P")),
    "alpha.png": lambda image: (image.convert("RGBA"), image),
    "gray-alpha.png": lambda image: (gray(image).convert("LA"), gray(image)),
    "cmyk.tif": lambda image: (image.convert("CMYK"), image.convert("CMYK")),
    "plain.bmp": lambda image: (image, image),
    "plain.webp": lambda image: (image, None),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_images_load(name, tmp_path):
    made, expected = ODD[name](to_pil_image(photograph(30, 40)))
    made.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    expected = to_pil_image(photograph(30, 40)) if expected is None else expected
    found = simclr.decode_image(tmp_path / name)
    assert torch.equal(found, pil_to_tensor(expected.convert("RGB")))


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_16_bit_gray_is_scaled(name, tmp_path):
    """Pillow's own conversion would cut 257 to 65,535 off at 255."""
    deep = np.arange(0, 65536, 17, dtype=np.uint16)[: 60 * 64].reshape(60, 64)
    Image.fromarray(deep).save(tmp_path / name)
    found = simclr.decode_image(tmp_path / name)
    assert found.shape == (3, 60, 64) and torch.equal(found[0], found[2])
    assert np.array_equal(found[0].numpy(), (deep // 256).astype(np.uint8))


@pytest.mark.parametrize("pixels", [np.float32([[0.5, 2]]), np.int32([[1, 70000]])], ids=str)
def test_deeper_images_are_refused_by_name(pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "deep.tif")
    with pytest.raises(OSError, match="deep.tif is unreadable: its pixels have more than 16 bits"):
        simclr.decode_image(tmp_path / "deep.tif")


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_rotation(turn, tmp_path):
    image = to_pil_image(photograph(24, 40))
    exif = image.getexif()
    exif[0x0112] = turn
    image.save(tmp_path / "turned.png", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "turned.png"))
    assert torch.equal(simclr.decode_image(tmp_path / "turned.png"), pil_to_tensor(expected))


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 2)], ids=str)
def test_tiny_and_very_long_images(size, tmp_path):
    """They become squares and crops like any other, without a huge intermediate."""
    to_pil_image(photograph(*size)).save(tmp_path / "a.png")
    part = make_folder([tmp_path / "a.png"])
    (square, _), = simclr.fetch(part, [(torch.tensor([0]), None)], CPU)
    (views, _), = simclr.fetch(part, [(torch.zeros(5, dtype=int), torch.arange(5))], CPU)
    assert square.shape == (1, 3, 24, 24) and views.shape == (5, 2, 3, 24, 24)


# ---- damaged images -----------------------------------------------------------------------------


@pytest.fixture
def damaged(image_folder, tmp_path):
    """The folder with three files cut short; their paths."""
    root = tmp_path / "images"
    shutil.copytree(image_folder, root)
    files = sorted((root / "train").rglob("*.png"))
    bad = [files[6], files[7], files[40]]  # the first two are the last of their class
    for path in bad:
        path.write_bytes(path.read_bytes()[:90])
    return root, bad


@pytest.mark.parametrize("flag", ["--stream", "--no-stream"])
def test_damaged_images_stop_a_run(damaged, flag, capsys):
    """By default at once, with a name: in memory before anything is trained."""
    root, bad = damaged
    line = refused(capsys, simclr, "--data", root, *TINY, flag)
    assert "is unreadable" in line and any(str(path) in line for path in bad)
    assert "1 of at most 0, --max-unreadable" in line


@pytest.mark.parametrize("flag", ["--stream", "--no-stream"])
def test_damaged_images_are_skipped_up_to_a_limit(damaged, flag, capsys, tmp_path):
    root, bad = damaged
    flags = ["--data", str(root), *TINY, flag, "--out", str(tmp_path / "run")]
    metrics = simclr.main([*flags, "--max-unreadable", "3"])
    errors = capsys.readouterr().err
    assert metrics["step"] == 12
    assert errors.count("skipped: ") == 3 and "(3 of at most 3, --max-unreadable)" in errors
    assert all(errors.count(f"the image {path} is unreadable") == 1 for path in bad)
    with pytest.raises(SystemExit) as stop:
        simclr.main([*flags[:-1], str(tmp_path / "two"), "--max-unreadable", "2"])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 3 and "3 of at most 2" in lines[-1]


def test_next_readable_image_takes_the_place(damaged):
    """Its own label comes with it; the two in a row give way to the same one, of another class."""
    root, bad = damaged
    data = load_data(root, "--stream", "--max-unreadable", "2", "--image-size", "16")
    part = data.train_images
    names = [os.fsdecode(path) for path in part.paths]
    at = names.index(str(bad[0]))
    assert names[at + 1] == str(bad[1])
    (found, index), = simclr.fetch(part, [(torch.tensor([at, at + 1, at + 2]), None)], CPU)
    assert index.tolist() == [at + 2] * 3 and torch.equal(found[0], found[2])
    h, y = simclr.represent(torch.nn.Flatten(), part, data.train_labels, torch.tensor([at]), CPU)
    assert y.tolist() == [data.train_labels[at + 2]] != [data.train_labels[at]]
    memory = load_data(root, "--no-stream", "--max-unreadable", "3", "--image-size", "16")
    for i in (at, at + 1):
        assert torch.equal(memory.train_images[i], memory.train_images[at + 2])
        assert memory.train_labels[i] == memory.train_labels[at + 2]


def test_folder_of_damaged_images_alone(tmp_path, capsys):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(SystemExit):
        [*simclr.fetch(make_folder([tmp_path / "a.png", tmp_path / "b.png"], "--max-unreadable",
                                   "9"), [(torch.tensor([0]), None)], CPU)]
    assert re.search(r"error: no image near it .*a\.png is unreadable", capsys.readouterr().err)
