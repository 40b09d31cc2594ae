"""Print what becomes of a run of simclr.py that is killed, with -9, at random moments until it has
died --kills times: its final weights and log against those of an uninterrupted run.

python tests/faults.py [--kills 50]      about ten minutes
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent

def start(*flags):
    """simclr.py with a checkpoint every half second."""
    code = "import simclr; simclr.SAVE_EVERY = 0.5; simclr.main()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
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

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=12.0, help="that a run lives at most")
    parser.add_argument("--epochs", type=int, default=10, help="of the run that is killed")
    with tempfile.TemporaryDirectory() as folder:
        kills(Path(folder), parser.parse_args())

if __name__ == "__main__":
    main()
