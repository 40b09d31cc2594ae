"""Processes: the gradient of one, files from the first alone, signals, deaths, a full disk."""

import functools
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_runs import (HEADS, METHODS, SCRIPTS, TINY, equal_weights, finished, load, records,
                       refused, train, wait_for, without_times)
from torch import nn

import simclr

# Forked off a process that has imported the scripts, and has neither threads nor a GPU.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["test_processes"])

def child(work, output, rank, world, port, *args):
    """What a process does: work(*args), in surroundings as torchrun's."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank),
                   "WORLD_SIZE": str(world)}
    os.setpgrp()
    multiprocessing.set_start_method("fork", force=True)  # of its workers
    sys.stdout = sys.stderr = open(output, "a", buffering=1)
    for script in SCRIPTS.values():
        script.RANK, script.WORLD, script.LOCAL_RANK = rank, world, rank
    work(*args)

def run(method, prepare, flags):
    prepare and prepare(SCRIPTS[method])
    train(SCRIPTS[method], *flags)

def start(*args, work=run, world=1, at="."):
    """Processes that do work(*args), and print into the file printed of a folder."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = [FORK.Process(target=child, args=(work, os.path.abspath(f"{at}/printed"), rank,
                                                  world, port, *args)) for rank in range(world)]
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

def test_kill_9_and_resume(image_folder, tmp_path):
    """At any moment: what was saved last is read, and the run goes on to the same weights."""
    script, new = SCRIPTS["directclr"], tmp_path / "run"
    out, flags, *_ = finished(script, image_folder)
    for step, begin in ((1, (*flags, "--out")), (6, ["--resume"])):
        process, = start("directclr", save_always, (*begin, new))
        wait_for(lambda: load(new)["step"] >= step)
        process.kill()
        assert finish([process]) == [-signal.SIGKILL] and step <= load(new)["step"] < 12
    train(script, "--resume", new)
    assert equal_weights(out, new) and without_times(out) == without_times(new)

def quota(size, script):  # what a write beyond it raises is what a full disk raises: OSError
    save_always(script)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

def test_full_disk(image_folder, tmp_path):
    """A checkpoint that does not fit leaves the one before, no rubbish, and one clear line."""
    new = tmp_path / "run"
    train(simclr, "--data", image_folder, *TINY, "--out", new, "--steps", "3")
    before = (new / "last.pt").read_bytes()
    small = functools.partial(quota, len(before) // 2)
    assert finish(start("simclr", small, ("--resume", new))) == [2]
    line = Path("printed").read_text().splitlines()[-1]
    assert line.startswith(f"simclr.py: error: cannot write {new / 'last.pt'}: ")
    assert (new / "last.pt").read_bytes() == before and not list(new.glob("*.tmp"))
    assert train(simclr, "--resume", new)["step"] == 12

LOSSES = [
    ("simclr", "--temperature 0.2"), ("simclr", "--head expander"), ("vicreg", ""),
    *[("directclr", f"--head {head}") for head in HEADS],
    *[("interpolate", f"--head mlp --method {name}") for name in SCRIPTS["interpolate"].PATH],
    ("interpolate", "--method simclr --normalize A"), ("interpolate", "--method dcl --normalize B"),
    ("interpolate", "--method vicreg --blend simclr --alpha 0.3")]

def gradients(folder):
    """One step of every loss, in float64 and without BatchNorm, on this process's part of a batch;
    its gradients, into a file."""
    torch.distributed.init_process_group("gloo")
    torch.Tensor.float, found = torch.Tensor.double, []
    nn.BatchNorm1d = lambda *features, **flags: nn.Identity()
    for method, flags in LOSSES:
        script = SCRIPTS[method]
        script.build_backbone = lambda arch, size: (
            nn.Sequential(nn.Flatten(), nn.Linear(192, 24), nn.Tanh(), nn.Linear(24, 16)), 16)
        wide = [] if method == "directclr" else ["--hidden", "12"]
        args = script.parse_args(["--dim", "8", "--batch-size", "12", *wide, *flags.split()])
        torch.manual_seed(0)
        model = script.Model(args, 8, 10).double()
        images = torch.randint(256, (12, 3, 8, 8), dtype=torch.uint8)
        labels = torch.tensor([0, 1, 2, -1, -1, -1, 3, 4, 5, 6, 7, 8])  # unevenly unknown
        draws = torch.rand(2, 1, 12, 1, 1, 1, dtype=torch.float64)
        mine = slice(script.RANK * 12 // script.WORLD, (script.RANK + 1) * 12 // script.WORLD)
        parts = script.train_step(
            nn.parallel.DistributedDataParallel(model), torch.optim.SGD(model.parameters(), lr=0.0),
            torch.amp.GradScaler("cpu", enabled=False),
            lambda images, draws, *_: images.double() / 255 + draws[0],
            script.loss_fn, images[mine], labels[mine], draws[:, :, mine], args, torch.float32)
        found.append(({name: value.item() for name, value in parts.items()},
                      {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    torch.save(found, f"{folder}/{simclr.WORLD}-{simclr.RANK}.pt")

@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """[(parts, gradients) of every loss] of one process, and of each of two."""
    folder = tmp_path_factory.mktemp("gradients")
    for world in (1, 2):
        assert finish(start(folder, work=gradients, world=world, at=folder)) == [0] * world
    return [torch.load(folder / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")]

@pytest.mark.parametrize("case", range(len(LOSSES)), ids=[" ".join(case) for case in LOSSES])
def test_two_processes_have_the_gradient_of_one(case, steps):
    """In float64, through loss, head, probe and network; the loss is the same in every process.
    Both halves of the batch differ, so neither gradient is the whole by luck."""
    (loss, whole), (first, one), (second, other) = (found[case] for found in steps)
    assert first == second == {name: pytest.approx(v, 1e-10, 1e-12) for name, v in loss.items()}
    total = torch.stack([g.norm() for g in whole.values()]).norm()
    for name, expected in whole.items():  # some are 0
        assert one[name].equal(other[name])
        assert (one[name] - expected).norm() < 1e-6 * max(expected.norm(), 1e-6 * total), name
    assert whole["backbone.1.weight"].norm() > 0 and whole["probe.1.weight"].norm() > 0

@pytest.fixture(scope="module")
def pair(image_folder, tmp_path_factory):
    """A run of two processes, uninterrupted: folder, flags. 61 images and 19 to test on."""
    out = tmp_path_factory.mktemp("pair") / "run"
    flags = ("--data", image_folder, *TINY, "--holdout", "19")
    assert finish(start("simclr", None, (*flags, "--out", out), world=2, at=out.parent)) == [0, 0]
    return out, flags

def test_run_of_two_processes(pair, tmp_path):
    """One log, one console, one checkpoint; of odd numbers of images, each counted once, and with
    the first process's network in both, the accuracies of one process."""
    out, flags = pair
    assert finish(start("simclr", None, (*flags, "--out", tmp_path / "run"), world=2)) == [0, 0]
    assert equal_weights(out, "run") and {p.name for p in out.iterdir()} == {
        "log.jsonl", "last.pt", "backbone.pt", "embeddings.pt", "neighbours.png"}
    log, args = records(out), simclr.parse_args(["--resume", str(out)])
    assert log[0]["processes"] == 2 and [r.get("epoch") for r in log] == [None, 0, 1, 2, 3, None]
    words = [line.split()[0] for line in open("printed")]
    assert words == ["120", "method", *["epoch"] * 4, "final"]
    model, data = simclr.Model(args, 16, 10), simclr.load_data(args)
    for name, part in model.named_children():
        part.load_state_dict(load(out)[name])
    metrics = simclr.evaluate(model, data, args)
    assert (len(data[2]), len(data[4])) == (61, 19)
    assert metrics == {k: pytest.approx(log[-1][k], abs=0.011) for k in metrics}

def test_resume_with_another_number_of_processes(pair, tmp_path):
    """One, two with workers, one: the same data in the same order. BatchNorm has on CPUs the
    statistics of each process's part, so the weights are not those of two throughout."""
    (out, flags), new = pair, tmp_path / "run"
    train(simclr, *flags, "--out", new, "--steps", "5")
    again = ("--resume", new, "--steps", "8", "--workers", "1")
    assert finish(start("simclr", None, again, world=2)) == [0, 0] and load(new)["step"] == 8
    train(simclr, "--resume", new)
    losses = [[r["loss"] for r in records(folder)[2:5]] for folder in (out, new)]
    assert losses[0] == pytest.approx(losses[1], rel=0.2) and not equal_weights(out, new)

@pytest.mark.parametrize("signum, world, times", [("SIGINT", 2, 1), ("SIGTERM", 2, 2),
                                                  ("SIGTERM", 1, 1)])
def test_signal_to_processes(signum, world, times, pair, image_folder, tmp_path):
    """To all, to one alone twice, or to one and its workers: all save and stop after the same step,
    and the run goes on to the same weights."""
    (out, flags), new, signum = pair, tmp_path / "run", getattr(signal, signum)
    if world == 1:
        out, flags, *_ = finished(simclr, image_folder)
    flags = (*flags, "--workers", "2" if world == 1 else "0", "--out", new)
    processes = start("simclr", None, flags, world=world)
    wait_for(lambda: len(records(new)) >= 3)
    for process in processes if times == 1 else 2 * processes[1:]:
        os.killpg(process.pid, signum)
    assert finish(processes) == [128 + signum] * world
    step = load(new)["step"]
    assert 4 <= step < 12 and f"after step {step}, saved" in Path("printed").read_text()
    assert finish(start("simclr", None, ("--resume", new), world=world)) == [0] * world
    assert equal_weights(out, new)

@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_on_each_machine_downloads(rank, monkeypatch, capsys):
    """The others load the data only once it has."""
    loads = []
    monkeypatch.setattr(simclr, "LOCAL_RANK", rank)
    monkeypatch.setattr(simclr, "load_data", loads.append)
    monkeypatch.setattr(simclr, "agree", lambda: simclr.fail("met"))
    assert refused(capsys, simclr, "--device", "cpu").endswith(" met\n") and len(loads) == 1 - rank

def test_world_that_does_not_divide_the_batch(image_folder, capsys, monkeypatch):
    for method, size in zip(METHODS, ("21", "2", "3", "25")):
        monkeypatch.setattr(SCRIPTS[method], "WORLD", 2)
        line = refused(capsys, SCRIPTS[method], "--data", image_folder, *TINY, "--batch-size", size)
        assert f"--batch-size {size} is for all processes, a multiple of their number, 2" in line

def torchrun(*command, nproc=2, rendezvous=("--standalone",)):
    launch = [sys.executable, "-m", "torch.distributed.run", *rendezvous, "--nproc-per-node", nproc,
              ROOT / "simclr.py", *command]
    return subprocess.Popen([*map(str, launch)], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)

def test_two_nodes(pair):
    """Two torchruns that meet at an address, as on two machines, train the pair's weights."""
    out, flags = pair
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    nodes = [torchrun(*flags, "--out", "run", nproc=1, rendezvous=[
        "--nnodes", "2", "--rdzv-id", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", address])
        for _ in range(2)]
    outputs = [node.communicate(timeout=200) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0] and "Traceback" not in str(outputs)
    assert str(outputs).count("final True") == 1 and equal_weights(out, "run")

def test_death_and_signal_under_torchrun(image_folder):
    """kill -9 of one process ends all, with a checkpoint; what a scheduler sends to torchrun before
    it takes the machine saves the run; both end with a code that is not zero."""
    process = torchrun("--data", image_folder, *TINY, "--epochs", "200", "--out", "run")
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
