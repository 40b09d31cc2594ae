"""One thread, as in the processes that tests start; a small folder of images; an empty one."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = PATHS = [str(ROOT), str(ROOT / "tests")]
PATHS += os.environ.get("PYTHONPATH", "").split(":")
os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": ":".join(PATHS)}

import pytest  # noqa: E402
import torch  # noqa: E402
from torchvision.transforms.v2.functional import to_pil_image  # noqa: E402

torch.set_num_threads(1)

def write_folder(root, images, labels, names="abcdefghij"):
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
        write_folder(root / split, *simclr.draw_shapes(n, seed, size=16))
    return root

@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
