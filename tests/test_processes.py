"""Several processes: the gradient of one, files from the first alone, signals, deaths, resuming."""

import contextlib
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from family import TRAINING
from test_runs import TINY, equal_weights, load, records, refused, wait_for

import simclr

METHODS = [name.removesuffix(".py") for name in TRAINING]
LOSSES = {  # flags that give each loss, with heads that have no BatchNorm
    "simclr": [["--head", head, "--temperature", "0.2"] for head in ("mlp", "linear", "none")],
    "vicreg": [["--head", head] for head in ("mlp", "linear", "none")],
    "directclr": [["--head", head] for head in ("slice", "none", "linear", "diagonal", "orthogonal",
                                                "lowrank", "random", "group")],
    "interpolate": [["--head", "mlp", "--method", name] for name in importlib.import_module(
        "interpolate").VARIANTS] + [
        ["--head", "linear", "--method", "simclr", "--normalize", "A"],
        ["--head", "linear", "--method", "dcl", "--normalize", "B"],
        ["--head", "linear", "--method", "vicreg", "--blend", "simclr", "--alpha", "0.3"]],
}

# What each process does: one step of every loss, on its half of the batch, its gradients and losses
# into a file. With one process the whole batch is its half.
WORK = """
import importlib, json, os, sys
import torch
from torch import nn
def view(images, draws, i, args, cropped):  # in float64; each image by its own draws
    return images.double() / 255 + draws[:, i, None, None, None].double()
losses, folder = json.load(open(sys.argv[1])), sys.argv[2]
found, stepped = {}, {}
for method, cases in losses.items():
    script = importlib.import_module(method)
    script.build_backbone = lambda arch, size: (
        nn.Sequential(nn.Flatten(), nn.Linear(192, 24), nn.Tanh(), nn.Linear(24, 16)), 16)
    nn.BatchNorm1d = lambda features, affine: nn.Identity()  # the probe's
    for flags in cases:
        args = script.parse_args(["--dim", "8", "--hidden", "12", "--batch-size", "12", *flags]
            if method != "directclr" else ["--dim", "8", "--batch-size", "12", *flags])
        rank, world = script.join_processes(args)
        torch.manual_seed(0)
        model = script.Model(args, 8, 10).double()
        generator = torch.Generator().manual_seed(1)
        images = torch.randint(256, (12, 3, 8, 8), generator=generator, dtype=torch.uint8)
        labels = torch.tensor([0, 1, 2, -1, -1, -1, 3, 4, 5, 6, 7, 8])  # unevenly unknown
        network = nn.parallel.DistributedDataParallel(model) if world > 1 else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        mine = slice(rank * 12 // world, (rank + 1) * 12 // world)
        torch.manual_seed(2)
        torch.Tensor.float, single = torch.Tensor.double, torch.Tensor.float
        parts = script.train_step(network, optimizer, torch.amp.GradScaler("cpu", enabled=False),
                                  view, images[mine], labels[mine], args, None)
        torch.Tensor.float = single
        found[f"{method} {' '.join(flags)}"] = (
            {name: value.item() for name, value in parts.items()},
            {name: p.grad for name, p in model.named_parameters()})
torch.save(found, f"{folder}/{world}-{rank}.pt")
if world > 1:
    torch.distributed.destroy_process_group()
"""


def finish(*command):
    """Run a command in two processes to its end, which is without error; what it prints."""
    process = torchrun(*command)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return output, errors


def torchrun(*command, nproc=2, rendezvous=("--standalone",), **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
                   "PYTHONPATH": str(ROOT)}
    launch = [sys.executable, "-m", "torch.distributed.run", *rendezvous, "--nproc-per-node",
              str(nproc)]
    return subprocess.Popen([*launch, *map(str, command)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=environment, **options)


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    """{case: (parts, gradients)} of one process, and of each of two."""
    folder = tmp_path_factory.mktemp("gradients")
    (folder / "work.py").write_text(WORK)
    (folder / "losses.json").write_text(json.dumps(LOSSES))
    for nproc in (1, 2):
        process = torchrun(folder / "work.py", folder / "losses.json", folder, nproc=nproc)
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    return [torch.load(folder / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")]


@pytest.mark.parametrize("case", [f"{m} {' '.join(f)}" for m in METHODS for f in LOSSES[m]])
def test_two_processes_have_the_gradient_of_one(gradients, case):
    """In float64, through loss, head, probe and a network without BatchNorm; the loss is the same
    in every process. Both halves of the batch differ, so neither gradient is the whole by luck."""
    (loss, whole), (first, one), (second, other) = (g[case] for g in gradients)
    assert first == second and first.keys() == loss.keys()
    for name, value in loss.items():
        assert first[name] == pytest.approx(value, rel=1e-10, abs=1e-12)
    assert len(whole) >= 6
    total = torch.stack([g.norm() for g in whole.values()]).norm()
    for name, expected in whole.items():
        assert torch.equal(one[name], other[name])
        size = expected.norm().clamp(min=1e-6 * total)  # some are 0
        error = (one[name] - expected).norm() / size
        assert error < 1e-6, (name, error)
    assert whole["backbone.1.weight"].norm() > 0 and whole["probe.1.weight"].norm() > 0


def test_processes_share_out_images_and_crops(monkeypatch):
    """Of every step each of two has one half: of the images, and of the seeds that draw crops."""
    args = simclr.parse_args(["--data", "shapes", "--batch-size", "12"])
    images, steps = torch.zeros(40, 1), {}
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        monkeypatch.setattr(simclr, "processes", lambda: (rank, world))
        steps[rank, world] = [*simclr.schedule(images, args, 2, 7)]
    for whole, *halves in zip(*steps.values()):
        assert len(whole[0]) == len(whole[1].unique()) == 12
        for all_, parts in zip(whole, zip(*halves)):
            assert torch.equal(torch.cat(parts), all_)


# ---- whole scripts ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(image_folder, tmp_path_factory):
    """A run of two processes, uninterrupted: (folder, flags, output, errors)."""
    out = tmp_path_factory.mktemp("pair") / "simclr"
    flags = ["--data", str(image_folder), *TINY]
    return out, flags, *finish(ROOT / "simclr.py", *flags, "--out", out)


def test_run_of_two_processes(pair):
    """One log, one table of epochs, one checkpoint, as of one process."""
    out, _, output, errors = pair
    assert {p.name for p in out.iterdir()} == {"log.jsonl", "last.pt", "backbone.pt"}
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    log = records(out)
    assert log[0]["processes"] == 2 and [r.get("epoch") for r in log] == [None, 0, 1, 2, 3, None]
    assert log[-1]["final"] and log[-1]["step"] == 12
    for line in ("epoch   1/3", "epoch   3/3", "untrained ", "trained "):
        assert len(re.findall(f"^{line}", output, re.M)) == 1
    assert "Traceback" not in errors and "Warning" not in errors
    model = simclr.Model(simclr.parse_args(["--resume", str(out)]), 16, 10)
    for part in ("backbone", "head", "probe"):
        getattr(model, part).load_state_dict(load(out)[part])


def test_evaluation_of_two_processes(image_folder, tmp_path):
    """Odd numbers of images, each counted once, and the first process's network in both: the
    figures are those of one process that evaluates the checkpoint."""
    run = tmp_path / "run"
    finish(ROOT / "simclr.py", "--data", image_folder, *TINY, "--holdout", "19", "--out", run)
    args = simclr.parse_args(["--resume", str(run)])
    model, data = simclr.Model(args, 16, 10), simclr.load_data(args)
    for part in ("backbone", "head", "probe"):
        getattr(model, part).load_state_dict(load(run)[part])
    metrics = simclr.evaluate(model, data, torch.device("cpu"), linear=True)
    final = records(run)[-1]
    assert len(data.train_images) == 61 and len(data.test_images) == 19
    assert final["rank"] == pytest.approx(metrics["rank"], abs=0.011)
    for name in ("knn", "linear", "online"):
        assert final[name] == metrics[name]


def test_one_process_on_each_machine_downloads(monkeypatch, tmp_path):
    """The others load the data only once it has."""
    class Met(Exception):
        pass

    def meets(caught):
        raise Met

    for rank, expected in (("0", ["load"]), ("1", [])):
        loads = []
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setattr(simclr, "load_data", lambda args: loads.append("load"))
        monkeypatch.setattr(simclr, "agree", meets)
        with pytest.raises(Met):
            simclr.main(["--data", "cifar10", "--device", "cpu", "--out", str(tmp_path / "run")])
        assert loads == expected


def test_two_nodes(pair, tmp_path):
    """Two torchruns that meet at an address, as on two machines with a common disk, train the
    weights of one torchrun with two processes."""
    out, flags, _, _ = pair
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    nodes = [torchrun(ROOT / "simclr.py", *flags, "--out", tmp_path / "run", nproc=1, rendezvous=[
        "--nnodes", "2", "--rdzv-id", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", address])
        for _ in range(2)]
    outputs = [node.communicate(timeout=200) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert sorted("trained" in output for output, _ in outputs) == [False, True]
    assert equal_weights(out, tmp_path / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_resume_with_another_number_of_processes(pair, tmp_path):
    """One process, then two, then one: the same data in the same order. BatchNorm has on CPUs
    the statistics of each process's part, so the weights are not those of one process."""
    out, flags, _, _ = pair
    run = tmp_path / "run"
    torch.set_num_threads(1)
    simclr.main([*flags, "--out", str(run), "--steps", "5"])
    finish(ROOT / "simclr.py", "--resume", run, "--steps", "8")
    assert load(run)["step"] == 8
    simclr.main(["--resume", str(run)])
    assert load(run)["step"] == 12
    first, last = records(out), records(run)
    assert [r.get("epoch") for r in first] == [r.get("epoch") for r in last]
    assert last[-2]["loss"] == pytest.approx(first[-2]["loss"], rel=0.2)


def test_streaming_resume_of_two_processes(image_folder, tmp_path):
    """To the bit: each process goes on with its part of the permutation and of the crops."""
    script, whole, parts = ROOT / "vicreg.py", tmp_path / "whole", tmp_path / "parts"
    flags = ["--data", image_folder, *TINY, "--epochs", "2", "--stream"]
    for command in ([*flags, "--out", whole], [*flags, "--out", parts, "--steps", "3"],
                    ["--resume", parts]):
        finish(script, *command)
    assert equal_weights(whole, parts)


@pytest.mark.parametrize("several", [True, False])
def test_second_signal(several, monkeypatch, tmp_path):
    """torchrun passes on what its processes had already: only a single one ends at once."""
    def ends(signum, frame):
        raise InterruptedError

    monkeypatch.setattr(simclr.dist, "is_initialized", lambda: several)
    before = signal.signal(signal.SIGTERM, ends)
    try:
        with simclr.catch_signals(simclr.Run(tmp_path)) as caught:
            os.kill(os.getpid(), signal.SIGTERM)
            assert caught == [signal.SIGTERM]
            with contextlib.nullcontext() if several else pytest.raises(InterruptedError):
                os.kill(os.getpid(), signal.SIGTERM)
            assert len(caught) == 1 + several
        assert signal.getsignal(signal.SIGTERM) is ends
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("to, signum", [
    ("torchrun", "SIGTERM"), ("all", "SIGINT"), ("one twice", "SIGTERM")])
def test_signal_to_torchrun(image_folder, tmp_path, to, signum):
    """What a scheduler sends before it takes the machine: to torchrun, or to every process, which
    then has it twice; or what reaches one process alone. The run is saved and ends with a code
    that is not zero."""
    run = tmp_path / "run"
    flags = ["--data", image_folder, *TINY, "--epochs", "200"]
    process = torchrun(ROOT / "simclr.py", *flags, "--out", run, start_new_session=True)
    wait_for(lambda: len(records(run)) >= 4)
    logged = records(run)[-1]["step"]
    if to == "one twice":
        for _ in range(2):
            os.kill(workers(process)[1], getattr(signal, signum))
            time.sleep(0.005)
    elif to == "all":
        os.killpg(process.pid, getattr(signal, signum))
    else:
        process.send_signal(getattr(signal, signum))
    output, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "simclr.py\", line" not in errors
    step = load(run)["step"]
    assert logged <= step < 800 and f"stopped after step {step}, saved" in output


def workers(process):
    """The process ids of torchrun's two children."""
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    found = sorted(int(pid) for pid in children.stdout.split())
    assert len(found) == 2
    return found


def test_a_process_that_dies_ends_all(image_folder, tmp_path):
    """kill -9 of one: a code that is not zero within a minute, a checkpoint to go on from."""
    run = tmp_path / "run"
    flags = ["--data", image_folder, *TINY, "--epochs", "200", "--save-every", "0"]
    process = torchrun(ROOT / "simclr.py", *flags, "--out", run)
    wait_for(lambda: load(run)["step"] >= 3)
    start = time.time()
    os.kill(workers(process)[1], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0 and time.time() - start < 60
    step = load(run)["step"]
    finish(ROOT / "simclr.py", "--resume", run, "--steps", step + 2)
    assert load(run)["step"] == step + 2


def test_world_that_does_not_divide_the_batch(image_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for method in METHODS:
        line = refused(capsys, importlib.import_module(method), "--data", image_folder, *TINY,
                       "--batch-size", "21", "--out", tmp_path / "run")
        assert "--batch-size 21 is for all processes: a multiple of their number, 2" in line
    assert not (tmp_path / "run").exists()


def test_all_variants_in_two_processes(image_folder, tmp_path):
    _, errors = finish(ROOT / "simclr.py", "--data", image_folder, *TINY, "--epochs", "1", "--head",
                       "all", "--out", tmp_path / "all")
    assert {p.name for p in (tmp_path / "all").iterdir()} == {"mlp", "linear", "none", "expander"}
    assert "Traceback" not in errors and records(tmp_path / "all" / "none")[-1]["step"] == 4
