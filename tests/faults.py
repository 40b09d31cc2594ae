"""Print what becomes of runs that are killed, of full disks, and of memory as folders grow.

python tests/faults.py [kills] [disk] [memory]      without a name all three, about 15 minutes

kills: kill -9 at random moments until a run has died --kills times; its final weights against those
of an uninterrupted run. disk: a tmpfs that is too small, which only root can mount. memory: peak
memory of streamed runs on folders of 2,000 and 50,000 images.
"""

import argparse
import contextlib
import json
import os
import random
import signal
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


def start(*flags, extra=None, **options):
    command = [sys.executable, str(ROOT / "simclr.py"), *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **(extra or {})}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=environment, **options)


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
    flags = ["--data", "shapes", "--dim", "32", "--epochs", str(args.epochs), "--save-every", "0.5"]
    process = start(*flags, "--out", folder / "whole")
    began = time.time()
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    print(f"kills: uninterrupted {step(folder / 'whole')} steps, {time.time() - began:.0f} s",
          flush=True)
    run, rng, at, deaths = folder / "killed", random.Random(0), [], 0
    while deaths < args.kills:
        command = ["--resume", run] if (run / "last.pt").exists() else [*flags, "--out", run]
        process = start(*command)
        try:
            _, errors = process.communicate(timeout=rng.uniform(0, 12))
            raise SystemExit(f"ended by itself after {deaths} kills, code {process.returncode}: "
                             f"{errors} more --epochs")
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            deaths += 1
            at.append(step(run))
    process = start("--resume", run)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    print(f"  killed {deaths} times, the checkpoint then at steps {at}", flush=True)
    logs = [[json.loads(line) for line in (r / "log.jsonl").read_text().splitlines()]
            for r in (folder / "whole", run)]
    epochs = [[r.get("epoch") for r in log] for log in logs]
    losses = [[r.get("loss") for r in log] for log in logs]
    print(f"  weights and momenta equal: {equal(folder / 'whole', run)}; epochs in the log equal: "
          f"{epochs[0] == epochs[1]}; losses in it equal: {losses[0] == losses[1]}", flush=True)


def disk(folder, args):
    if os.geteuid():
        print("disk: skipped, only root can mount a tmpfs")
        return
    small = folder / "small"
    small.mkdir()
    flags = ["--data", "shapes", "--dim", "32", "--epochs", "1"]
    probe = start(*flags, "--out", folder / "size", "--steps", "1")
    probe.communicate()
    size = (folder / "size" / "last.pt").stat().st_size
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size)}", "tmpfs",
                              str(small)], capture_output=True, text=True)
    if mounted.returncode:
        print(f"disk: skipped, {mounted.stderr.strip()}")
        return
    try:
        process = start(*flags, "--out", small / "run", "--save-every", "0")
        _, errors = process.communicate()
        print(f"disk: {size / 2**20:.1f} MiB a checkpoint, room for one and a half: exit code "
              f"{process.returncode}, {errors.count(chr(10))} line: {errors.strip()}")
        print(f"  last.pt reads, at step {step(small / 'run')}; the folder holds "
              f"{sorted(p.name for p in (small / 'run').iterdir())}", flush=True)
        subprocess.run(["mount", "-o", "remount,size=1G", str(small)], check=True)
        process = start("--resume", small / "run")
        _, errors = process.communicate()
        print(f"  with room again: exit code {process.returncode}, step {step(small / 'run')}",
              flush=True)
    finally:
        subprocess.run(["umount", str(small)])


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
        flags = ["--data", root, "--arch", "convnet", "--dim", "32", "--batch-size", "64",
                 "--stream", "--steps", "30", "--epochs", "1", "--workers", "2", "--image-size",
                 "64"]
        process = start(*flags, "--out", folder / f"run-{n}", extra=GIVE_BACK)
        peaks, phase = {"evaluation": 0, "training": 0}, "evaluation"
        while process.poll() is None:
            if phase == "evaluation" and step(folder / f"run-{n}") == 0:
                phase = "training"
            elif step(folder / f"run-{n}") == 30:
                break
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
    parts = {"kills": kills, "disk": disk, "memory": memory}
    parser.add_argument("parts", nargs="*", choices=[[], *parts], default=[])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=10, help="of the run that is killed")
    args = parser.parse_args()
    for name in args.parts or parts:
        with tempfile.TemporaryDirectory() as folder:
            parts[name](Path(folder), args)


if __name__ == "__main__":
    main()
