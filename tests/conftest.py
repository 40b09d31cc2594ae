"""Imports the scripts from the project's root, and draws a small folder of images for them."""

import sys
from pathlib import Path

import pytest
import torch
from torchvision.transforms.v2.functional import to_pil_image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))


def write_folder(root, images, labels, names):
    """Write images uint8 (n, 3, S, S) as root/CLASS/0000.png, where the labels say."""
    for i, (image, label) in enumerate(zip(images, labels.tolist())):
        folder = root / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(folder / f"{i:04d}.png")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """A folder with 80 training and 40 test images of 16 px in ten classes."""
    import simclr

    root = tmp_path_factory.mktemp("images")
    for split, n, seed in (("train", 80, 3), ("test", 40, 4)):
        images, labels = simclr.draw_shapes(n, seed, size=16)
        write_folder(root / split, images, labels, list(simclr.SHAPES))
    return root


@pytest.fixture(autouse=True)
def two_threads():
    torch.set_num_threads(2)
