"""Processes: the gradient of one, files from the first alone, signals, deaths, a full disk."""

import functools
import importlib
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_runs import (
    CPU, METHODS, SCRIPTS, TINY, equal_weights, finished, in_an_empty_folder, load, records,
    refused, train, wait_for, without_times)
from torch import nn

import simclr

__all__ = ["finished", "in_an_empty_folder"]

# Forked off a process that has imported the scripts, and has neither threads nor a GPU.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["test_processes"])

def child(method, flags, output, prepare, rank, world, port):
    """What a process does: main(), as torchrun would start it."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank),
                   "WORLD_SIZE": str(world)}
    script = importlib.import_module(method)
    sys.stdout = sys.stderr = open(output, "a", buffering=1)
    script.RANK, script.WORLD, script.LOCAL_RANK = rank, world, rank
    if prepare:
        prepare(script)
    script.main(flags)

def start(script, *flags, output="printed", prepare=None, world=1):
    """Processes that run main(), after prepare(script), and print into a file."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags, output = [os.path.abspath(f) if f == "run" else str(f) for f in flags], os.path.abspath(output)
    processes = [FORK.Process(target=child, args=(
        script.METHOD, flags, output, prepare, rank, world, port)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes

def finish(processes):
    """Wait for their end; their exit codes."""
    for process in processes:
        process.join(120)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]

def save_always(script):
    script.SAVE_EVERY = 0.0

# ---- one process ---------------------------------------------------------------------------------

def test_kill_9_and_resume(finished):
    """At any moment: what was saved last is read, and the run goes on to the same weights."""
    script = SCRIPTS["directclr"]
    out, flags, *_ = finished(script)
    for step, begin in ((1, (*flags, "--out")), (6, ["--resume"])):
        process, = start(script, *begin, "run", prepare=save_always)
        wait_for(lambda: load("run")["step"] >= step)
        process.kill()
        assert finish([process]) == [-signal.SIGKILL]
        assert step <= load("run")["step"] < 12, "the run ended before the signal came"
    train(script, "--resume", "run")
    assert equal_weights(out, "run") and without_times(out) == without_times("run")

def quota(size, script):  # what a write beyond it raises is what a full disk raises: OSError
    save_always(script)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

def test_full_disk(image_folder, tmp_path):
    """A checkpoint that does not fit leaves the one before, no rubbish, and one clear line."""
    run, printed = tmp_path / "run", tmp_path / "printed"
    train(simclr, "--data", image_folder, *TINY, "--out", run, "--steps", "3")
    before = (run / "last.pt").read_bytes()
    prepare = functools.partial(quota, len(before) // 2)
    assert finish(start(simclr, "--resume", run, output=printed, prepare=prepare)) == [2]
    line = printed.read_text().splitlines()[-1]
    assert line.startswith(f"simclr.py: error: cannot write {run / 'last.pt'}: ")
    assert "what was saved before is still there" in line
    assert (run / "last.pt").read_bytes() == before and not list(run.glob("*.tmp"))
    train(simclr, "--resume", run)
    assert load(run)["step"] == 12

# ---- gradients -----------------------------------------------------------------------------------

LOSSES = [  # with the heads and the probe BatchNorm's, which is left out here
    ("simclr", "--temperature 0.2"), ("simclr", "--head expander"), ("vicreg", ""),
    *[("directclr", f"--head {head}") for head in (
        "slice", "none", "linear", "mlp", "diagonal", "orthogonal", "lowrank", "random")],
    *[("interpolate", f"--head mlp --method {name}") for name in SCRIPTS["interpolate"].PATH],
    ("interpolate", "--method simclr --normalize A"), ("interpolate", "--method dcl --normalize B"),
    ("interpolate", "--method vicreg --blend simclr --alpha 0.3")]

def gradients(folder, rank, world, port):
    """One step of every loss, in float64, on this process's part of a batch; its gradients."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    torch.Tensor.float, found = torch.Tensor.double, []
    nn.BatchNorm1d = lambda *features, **flags: nn.Identity()
    for method, flags in LOSSES:
        script = SCRIPTS[method]
        script.RANK, script.WORLD = rank, world
        script.build_backbone = lambda arch, size: (
            nn.Sequential(nn.Flatten(), nn.Linear(192, 24), nn.Tanh(), nn.Linear(24, 16)), 16)
        wide = [] if method == "directclr" else ["--hidden", "12"]
        args = script.parse_args(["--dim", "8", "--batch-size", "12", *wide, *flags.split()])
        torch.manual_seed(0)
        model = script.Model(args, 8, 10).double()
        images = torch.randint(256, (12, 3, 8, 8), dtype=torch.uint8)
        labels = torch.tensor([0, 1, 2, -1, -1, -1, 3, 4, 5, 6, 7, 8])  # unevenly unknown
        draws = torch.rand(2, 1, 12, 1, 1, 1, dtype=torch.float64)
        mine = slice(rank * 12 // world, (rank + 1) * 12 // world)
        parts = script.train_step(
            nn.parallel.DistributedDataParallel(model), torch.optim.SGD(model.parameters(), lr=0.0),
            torch.amp.GradScaler("cpu", enabled=False),
            lambda images, draws, *_: images.double() / 255 + draws[0],
            images[mine], labels[mine], draws[:, :, mine], args, torch.float32)
        found.append(({name: value.item() for name, value in parts.items()},
                      {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    torch.save(found, f"{folder}/{world}-{rank}.pt")

@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """[(parts, gradients) of every loss] of one process, and of each of two."""
    folder = tmp_path_factory.mktemp("gradients")
    for world in (1, 2):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        both = [FORK.Process(target=gradients, args=(folder, rank, world, port))
                for rank in range(world)]
        for process in both:
            process.start()
        assert finish(both) == [0] * world
    return [torch.load(folder / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")]

@pytest.mark.parametrize("case", range(len(LOSSES)), ids=[" ".join(case) for case in LOSSES])
def test_two_processes_have_the_gradient_of_one(case, steps):
    """In float64, through loss, head, probe and network; the loss is the same in every process.
    Both halves of the batch differ, so neither gradient is the whole by luck."""
    (loss, whole), (first, one), (second, other) = (found[case] for found in steps)
    assert first == second == {name: pytest.approx(v, 1e-10, 1e-12) for name, v in loss.items()}
    total = torch.stack([g.norm() for g in whole.values()]).norm()
    for name, expected in whole.items():
        assert torch.equal(one[name], other[name])
        size = expected.norm().clamp(min=1e-6 * total)  # some are 0
        assert (one[name] - expected).norm() / size < 1e-6, name
    assert whole["backbone.1.weight"].norm() > 0 and whole["probe.1.weight"].norm() > 0

# ---- several processes ---------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pair(image_folder, tmp_path_factory):
    """A run of two processes, uninterrupted: folder, flags, output. 61 images and 19 to test on."""
    out = tmp_path_factory.mktemp("pair")
    flags = ("--data", str(image_folder), *TINY, "--holdout", "19")
    codes = finish(start(simclr, *flags, "--out", out / "run", world=2, output=out / "printed"))
    assert codes == [0, 0], (out / "printed").read_text()
    return out / "run", flags, (out / "printed").read_text()

def test_run_of_two_processes(pair):
    """One log, one console, one checkpoint. Odd numbers of images, each counted once, and the first
    process's network in both: accuracies are those of one process."""
    out, _, output = pair
    assert {p.name for p in out.iterdir()} == {
        "log.jsonl", "last.pt", "backbone.pt", "embeddings.pt", "neighbours.png"}
    log, args = records(out), simclr.parse_args(["--resume", str(out)])
    assert log[0]["processes"] == 2 and [r.get("epoch") for r in log] == [None, 0, 1, 2, 3, None]
    assert [line.split()[0] for line in output.splitlines()] == ["method", *["epoch"] * 4, "final"]
    model, data = simclr.Model(args, 16, 10), simclr.load_data(args)
    for part in ("backbone", "head", "probe"):
        getattr(model, part).load_state_dict(load(out)[part])
    metrics = simclr.evaluate(model, data, args)
    assert len(data[2]) == 61 and len(data[4]) == 19
    assert metrics == {k: pytest.approx(log[-1][k], abs=0.011) for k in metrics}

def test_resume_with_another_number_of_processes(pair):
    """One process, two, one: the same data in the same order. BatchNorm has on CPUs the statistics
    of each process's part, so the weights are not those of two. With two again, and workers, they
    are, to the bit."""
    out, flags, _ = pair
    train(simclr, *flags, "--out", "run", "--steps", "5")
    assert finish(start(simclr, "--resume", "run", "--steps", "8", world=2)) == [0, 0]
    assert load("run")["step"] == 8
    train(simclr, "--resume", "run")
    losses = [[r["loss"] for r in records(run)[2:5]] for run in (out, "run")]
    assert losses[0] == pytest.approx(losses[1], rel=0.2) and not equal_weights(out, "run")
    for begin in ((*flags, "--steps", "5", "--out"), ("--workers", "1", "--resume")):
        assert finish(start(simclr, *begin, os.path.abspath("two"), world=2)) == [0, 0]
    assert equal_weights(out, "two")

@pytest.mark.parametrize("signum, times", [("SIGINT", (1, 1)), ("SIGTERM", (0, 2))])
def test_signal_to_processes(signum, times, pair):
    """To all, or to one alone, twice: both save and stop after the same step."""
    out, flags, _ = pair
    processes = start(simclr, *flags, "--out", "run", world=2)
    wait_for(lambda: len(records("run")) >= 3)
    for process, number in zip(processes, times):
        for _ in range(number):
            os.kill(process.pid, getattr(signal, signum))
    assert finish(processes) == [128 + getattr(signal, signum)] * 2
    step = load("run")["step"]
    assert 4 <= step < 12 and f"stopped after step {step}, saved" in open("printed").read()
    assert finish(start(simclr, "--resume", "run", world=2)) == [0, 0] and equal_weights(out, "run")

@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_on_each_machine_downloads(rank, monkeypatch):
    """The others load the data only once it has."""
    class Met(Exception):
        pass
    def meets():
        raise Met
    loads = []
    monkeypatch.setattr(simclr, "LOCAL_RANK", rank)
    monkeypatch.setattr(simclr, "load_data", loads.append)
    monkeypatch.setattr(simclr, "agree", meets)
    with pytest.raises(Met):
        train(simclr, "--data", "cifar10", "--device", "cpu")
    assert len(loads) == 1 - rank

def test_world_that_does_not_divide_the_batch(image_folder, capsys, monkeypatch):
    for method, size in zip(METHODS, ("21", "2", "3", "25")):
        monkeypatch.setattr(SCRIPTS[method], "WORLD", 2)
        line = refused(capsys, SCRIPTS[method], "--data", image_folder, *TINY, "--batch-size", size)
        assert f"--batch-size {size} is for all processes, a multiple of their number, 2" in line
    assert not os.path.exists("runs")

# ---- torchrun ------------------------------------------------------------------------------------

def torchrun(*command, nproc=2, rendezvous=("--standalone",)):
    launch = [sys.executable, "-m", "torch.distributed.run", *rendezvous, "--nproc-per-node", nproc,
              ROOT / "simclr.py", *command]
    return subprocess.Popen([*map(str, launch)], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)

def test_two_nodes(pair):
    """Two torchruns that meet at an address, as on two machines with a common disk, train the
    weights of the pair."""
    out, flags, _ = pair
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    nodes = [torchrun(*flags, "--out", "run", nproc=1, rendezvous=[
        "--nnodes", "2", "--rdzv-id", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", address])
        for _ in range(2)]
    outputs = [node.communicate(timeout=200) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert sorted("final True" in output for output, _ in outputs) == [False, True]
    assert "Traceback" not in str(outputs) and equal_weights(out, "run")

def test_death_and_signal_under_torchrun(image_folder):
    """kill -9 of one process ends all, with a checkpoint; what a scheduler sends to torchrun before
    it takes the machine saves the run; both end with a code that is not zero."""
    flags = ("--data", image_folder, *TINY, "--epochs", "200")
    process = torchrun(*flags, "--out", "run")
    wait_for(lambda: len(records("run")) >= 4)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0 and load("run")["step"] == 0
    os.unlink("run/log.jsonl")
    process = torchrun("--resume", "run")
    wait_for(lambda: len(records("run")) >= 2)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    step = load("run")["step"]
    assert process.returncode != 0 and "simclr.py\", line" not in errors
    assert 8 <= step < 800 and f"stopped after step {step}, saved" in output
