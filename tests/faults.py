"""Print what becomes of runs that are killed, and of memory as folders grow.

python tests/faults.py [kills] [memory]      without a name both, about 15 minutes

kills: kill -9 at random moments until a run has died --kills times; its final weights against those
of an uninterrupted run. memory: peak of streamed runs on folders of 2,000 and 50,000 images.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torchvision.transforms.v2.functional import to_pil_image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import simclr  # noqa: E402


def start(*flags, extra=None):
    """simclr.py with a checkpoint every half second."""
    code = "import simclr; simclr.SAVE_EVERY = 0.5; simclr.main()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(extra or {})}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, flags)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def step(run):
    if not (run / "last.pt").exists():
        return None
    return torch.load(run / "last.pt", weights_only=True, mmap=True)["step"]


def equal(a, b):
    """Whether two runs' weights, buffers and optimisers are the same to the bit."""
    a, b = (torch.load(run / "last.pt", weights_only=True) for run in (a, b))
    pairs = [(a[part][name], b[part][name]) for part in ("backbone", "head", "probe")
             for name in a[part]]
    pairs += [(x["momentum_buffer"], b["optimizer"]["state"][i]["momentum_buffer"])
              for i, x in a["optimizer"]["state"].items()]
    return a["step"] == b["step"] and all(torch.equal(x, y) for x, y in pairs)


def kills(folder, args):
    flags = ["--data", "shapes", "--dim", "32", "--epochs", str(args.epochs)]
    process = start(*flags, "--out", folder / "whole")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    run, rng, at = folder / "killed", random.Random(0), []
    while len(at) < args.kills:
        resumed = (run / "last.pt").exists()
        if not resumed and run.exists():  # died before the first checkpoint: the folder is taken
            (run / "log.jsonl").unlink(missing_ok=True)
        process = start(*(["--resume", run] if resumed else [*flags, "--out", run]))
        with contextlib.suppress(subprocess.TimeoutExpired):
            _, errors = process.communicate(timeout=rng.uniform(0, args.seconds))
            raise SystemExit(f"ended by itself after {len(at)} kills, code {process.returncode}: "
                             f"{errors} more --epochs")
        process.kill()
        process.communicate()
        at.append(step(run))
    process = start("--resume", run)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    print(f"kills: {step(run)} steps, killed {len(at)} times, the checkpoint then at steps {at}")
    logs = [[json.loads(line) for line in (r / "log.jsonl").read_text().splitlines()]
            for r in (folder / "whole", run)]
    same = [[[r.get(key) for r in log] for log in logs] for key in ("epoch", "loss", "knn")]
    print(f"  weights and momenta equal: {equal(folder / 'whole', run)}; epochs, losses and kNN in "
          f"the log equal: {all(a == b for a, b in same)}", flush=True)


def proportional(pid):
    """Memory of a process and its children in bytes, shared pages counted once (PSS)."""
    total = 0
    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    for member in [pid, *map(int, children.stdout.split())]:
        with contextlib.suppress(OSError):  # it has ended
            lines = Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()
            total += 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # glibc keeps freed blocks to itself otherwise


def memory(folder, args):
    images, _ = simclr.draw_shapes(100, 1, size=64)
    (folder / "one").mkdir()
    for i, image in enumerate(images):
        to_pil_image(image).save(folder / "one" / f"{i}.jpg")
    for n in (2000, 50000):
        root = folder / f"{n}"
        for split, count in (("train", n), ("val", 100)):
            (root / split / "a").mkdir(parents=True)
            for i in range(count):  # hard links: many paths, little disk
                os.link(folder / "one" / f"{i % 100}.jpg", root / split / "a" / f"image-{i}.jpg")
        process = start("--data", root, "--arch", "convnet", "--dim", "32", "--batch-size", "64",
                        "--steps", "30", "--epochs", "1", "--workers", "2", "--out",
                        folder / f"run-{n}", extra=GIVE_BACK)
        peaks, phase = {"evaluation": 0, "training": 0}, "evaluation"
        while process.poll() is None and step(folder / f"run-{n}") != 30:
            if step(folder / f"run-{n}") == 0:
                phase = "training"
            peaks[phase] = max(peaks[phase], proportional(process.pid))
            time.sleep(0.05)
        process.communicate()
        print(f"memory: {n:,} images streamed, with {GIVE_BACK}, peak of process and workers "
              f"{peaks['training'] / 2**20:.0f} MiB in training, "
              f"{peaks['evaluation'] / 2**20:.0f} MiB in evaluation, which holds "
              f"{n * 256 * 4 / 2**20:.0f} MiB of representations", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"kills": kills, "memory": memory}
    parser.add_argument("parts", nargs="*", choices=[[], *parts], default=[])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=12.0, help="that a run lives at most")
    parser.add_argument("--epochs", type=int, default=10, help="of the run that is killed")
    args = parser.parse_args()
    for name in args.parts or parts:
        with tempfile.TemporaryDirectory() as folder:
            parts[name](Path(folder), args)


if __name__ == "__main__":
    main()
