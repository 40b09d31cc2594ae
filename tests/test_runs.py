"""Whole runs: to the last line, twice the same, stopped and resumed, and all kinds of bad input."""

import importlib
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import ROOT, write_folder
from family import TRAINING

METHODS = [name.removesuffix(".py") for name in TRAINING]
TINY = ("--arch", "convnet", "--batch-size", "20", "--dim", "32", "--epochs", "3", "--lr", "0.02",
        "--device", "cpu")


def load(run):
    return torch.load(Path(run) / "last.pt", weights_only=True)


def records(run):
    return [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]


def start(method, *flags, cwd=ROOT, session=False, limit=None):
    command = [sys.executable, str(ROOT / f"{method}.py"), *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=environment, start_new_session=session,
                            preexec_fn=limit)


def equal_weights(a, b):
    a, b = load(a), load(b)
    tensors = [(name, key) for name in ("backbone", "head", "probe") for key in a[name]]
    assert len(tensors) > 20 and a["step"] == b["step"]
    return all(torch.equal(a[name][key], b[name][key]) for name, key in tensors)


@pytest.fixture(scope="module", params=METHODS)
def finished(request, image_folder, tmp_path_factory):
    """A run of each script, uninterrupted, as a user starts it: (method, folder, flags, output)."""
    out = tmp_path_factory.mktemp("finished") / request.param
    flags = ("--data", image_folder, *TINY)
    process = start(request.param, *flags, "--out", out)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert not errors
    return request.param, out, flags, output


def test_run_to_the_last_line(finished):
    method, out, _, output = finished
    assert {p.name for p in out.iterdir()} == {"log.jsonl", "last.pt", "backbone.pt"}
    log = records(out)
    assert log[0]["method"] == method and log[0]["args"]["epochs"] == 3
    assert {"argv", "torch", "commit", "parameters", "learning_rate"} <= set(log[0])
    assert log[0]["learning_rate"] == pytest.approx(0.02 * 20 / 256)
    assert {"knn_untrained", "linear_untrained"} <= set(log[1])
    assert [r["epoch"] for r in log[2:-1]] == [1, 2, 3]
    assert all(r["loss"] > 0 and r["images_per_second"] > 0 for r in log[2:-1])
    final = log[-1]
    assert final["final"] and final["step"] == 12
    for name in ("knn", "linear", "online", "knn_untrained", "linear_untrained"):
        assert 0 <= final[name] <= 100
    assert re.search(rf"^trained +kNN +{final['knn']:.1f} ", output.splitlines()[-1])
    assert "\r" not in output  # no live line where there is no terminal


def test_checkpoint_reads_back_strictly(finished):
    method, out, _, _ = finished
    checkpoint = load(out)
    script = importlib.import_module(method)
    args = script.parse_args(["--resume", str(out)])
    model = script.Model(args, 16, 10)
    for part in ("backbone", "head", "probe"):
        getattr(model, part).load_state_dict(checkpoint[part], strict=True)
    backbone = torch.load(out / "backbone.pt", weights_only=True)
    assert all(torch.equal(backbone[k], v) for k, v in checkpoint["backbone"].items())
    assert checkpoint["method"] == method and checkpoint["step"] == 12
    data = script.load_data(args)
    metrics = script.evaluate(model, data, torch.device("cpu"), linear=True)
    final = records(out)[-1]
    assert {k: final[k] for k in ("knn", "linear")} == {k: metrics[k] for k in ("knn", "linear")}


def test_identical_runs_give_identical_weights(finished, tmp_path):
    method, out, flags, _ = finished
    flags = [str(f) for f in flags]
    script = importlib.import_module(method)
    torch.set_num_threads(1)  # as the run that it is compared with
    script.main([*flags, "--out", str(tmp_path / "again")])
    assert equal_weights(out, tmp_path / "again")
    script.main([*flags, "--out", str(tmp_path / "other"), "--seed", "1"])
    assert not equal_weights(out, tmp_path / "other")


@pytest.mark.parametrize("finished, step", [
    ("simclr", 4), ("vicreg", 5), ("directclr", 11), ("interpolate", 5)], indirect=["finished"])
def test_resume_after_a_crash(finished, tmp_path, step, monkeypatch, capsys):
    """A run that dies in step `step` + 1 and goes on ends with the uninterrupted run's weights."""
    method, out, flags, _ = finished
    script, run = importlib.import_module(method), tmp_path / "run"
    train_step, calls = script.train_step, []

    def dies(*args):
        calls.append(1)
        if len(calls) > step:
            raise RuntimeError("power cut")
        return train_step(*args)

    torch.set_num_threads(1)
    monkeypatch.setattr(script, "train_step", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        script.main([*map(str, flags), "--out", str(run), "--save-every", "0"])
    assert load(run)["step"] == step
    monkeypatch.setattr(script, "train_step", train_step)
    script.main(["--resume", str(run)])
    assert equal_weights(out, run)
    mine, theirs = records(run), records(out)
    times = ("seconds", "images_per_second")
    assert len(mine) == len(theirs)
    for a, b in zip(mine[1:], theirs[1:]):  # the log has no hole and no repetition
        assert {k: v for k, v in a.items() if k not in times} == {
            k: v for k, v in b.items() if k not in times}


def wait_for(condition):
    deadline = time.time() + 120
    while time.time() < deadline:
        try:
            if condition():
                return
        except (OSError, ValueError):  # not written yet, or half a line of it
            pass
        time.sleep(0.005)
    raise AssertionError("it did not come about in 120 s")


@pytest.mark.parametrize("moment", ["evaluate", "mean_history", "last step"])
def test_stop_at_an_awkward_moment(finished, tmp_path, moment, monkeypatch, capsys):
    """A signal during kNN, while the loop reads the loss, or in the last step is saved as well."""
    method, out, flags, _ = finished
    script, run, calls = importlib.import_module(method), tmp_path / "run", []
    name = "train_step" if moment == "last step" else moment
    original = getattr(script, name)
    at = {"evaluate": 2, "mean_history": 1, "last step": 12}[moment]

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    torch.set_num_threads(1)
    monkeypatch.setattr(script, name, interrupted)
    with pytest.raises(SystemExit) as stop:
        script.main([*map(str, flags), "--out", str(run)])
    assert stop.value.code == 128 + signal.SIGTERM
    assert f"stopped after step {load(run)['step']}, saved" in capsys.readouterr().out
    assert load(run)["step"] >= 1
    monkeypatch.setattr(script, name, original)
    script.main(["--resume", str(run)])
    assert equal_weights(out, run)


def test_killed_while_saving(finished, tmp_path, monkeypatch, capsys):
    """A checkpoint half written leaves the one before, and the run goes on from there."""
    method, out, flags, _ = finished
    script, run, calls, replace = importlib.import_module(method), tmp_path / "run", [], os.replace

    class PowerCut(BaseException):
        pass

    def dies(*args):
        calls.append(1)
        if len(calls) == 5:  # the end of the first epoch: it is logged already
            raise PowerCut
        replace(*args)

    torch.set_num_threads(1)
    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(PowerCut):
        script.main([*map(str, flags), "--out", str(run), "--save-every", "0"])
    assert (run / "last.pt.tmp").exists() and load(run)["step"] == 3
    assert records(run)[-1]["epoch"] == 1
    monkeypatch.setattr(os, "replace", replace)
    script.main(["--resume", str(run)])
    assert equal_weights(out, run)
    assert [r.get("epoch") for r in records(run)] == [None, 0, 1, 2, 3, None]


def test_dry_run_goes_on_to_the_end(finished, tmp_path):
    """--steps is not kept: the resumed run has the whole length, and its log no epoch twice."""
    method, out, flags, _ = finished
    script, run = importlib.import_module(method), tmp_path / "run"
    torch.set_num_threads(1)
    script.main([*map(str, flags), "--out", str(run), "--steps", "5"])
    assert load(run)["step"] == 5 and records(run)[-1]["final"]
    script.main(["--resume", str(run)])
    assert equal_weights(out, run)
    assert [r.get("epoch") for r in records(run)] == [r.get("epoch") for r in records(out)]


def test_checkpoint_keeps_the_scaler(script, tmp_path):
    """fp16's loss scale is saved and comes back; a run without one may move to where there is."""
    args = script.parse_args(["--data", "shapes", "--dim", "8"])
    model = script.Model(args, 32, 10)
    optimizer = script.build_optimizer(model, args)
    state = {"step": 0, "seconds": 0.0, "history": [], "untrained": {}, "data": [1, 32, []],
             "args": {}}
    scales = []
    for enabled in (True, False):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=enabled)
        scaler.scale(torch.ones(1))
        run = script.Run(tmp_path)
        script.save_checkpoint(model, optimizer, scaler, run, state)
        restored = torch.amp.GradScaler("cpu", init_scale=2.0)
        script.restore(script.load_checkpoint(tmp_path), model, optimizer, restored, dict(state))
        scales.append(restored.get_scale())
    assert scales == [8.0, 2.0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("flags", [("--precision", "bf16"), ("--precision", "fp16"),
                                   ("--precision", "fp32", "--no-compile")], ids=" ".join)
@pytest.mark.parametrize("method", METHODS)
def test_run_and_resume_on_a_gpu(method, flags, image_folder, tmp_path):
    script, run = importlib.import_module(method), tmp_path / "run"
    flags = ["--data", str(image_folder), *TINY, *flags, "--device", "cuda", "--out", str(run)]
    script.main([*flags, "--steps", "5"])
    metrics = script.main(["--resume", str(run)])
    assert metrics["step"] == 12 and records(run)[0]["gpu"]
    backbone = torch.load(run / "backbone.pt", weights_only=True)
    assert all(value.device.type == "cpu" for value in backbone.values())


@pytest.mark.parametrize("finished, signum", [
    ("simclr", "SIGINT"), ("vicreg", "SIGTERM"), ("directclr", "SIGKILL"),
    ("interpolate", "SIGKILL")], indirect=["finished"])
def test_stop_by_signal_and_resume(finished, tmp_path, signum):
    """The state survives; the command that the message names goes on to the same weights."""
    method, out, flags, _ = finished
    run, signum = tmp_path / "run", getattr(signal, signum)
    every = ("--save-every", "0") if signum == signal.SIGKILL else ()  # others save by themselves
    process = start(method, *flags, "--out", run, *every)
    wait_for(lambda: load(run)["step"] >= 1 if every else len(records(run)) >= 3)
    process.send_signal(signum)
    output, errors = process.communicate(timeout=60)
    assert not errors
    assert 1 <= load(run)["step"] < 12, "the run ended before the signal came"
    if signum == signal.SIGKILL:
        assert process.returncode == -signum
        command = [method, "--resume", run]
    else:
        assert process.returncode == 128 + signum
        line = output.splitlines()[-1]
        assert f"stopped after step {load(run)['step']}, saved" in line
        command = re.search(r"python (\w+)\.py (--resume) (\S+)$", line).groups()
    process = start(*command)
    assert process.wait(timeout=120) == 0
    process.communicate()
    assert equal_weights(out, run)


@pytest.mark.parametrize("method, flags", [(METHODS[(i + i // 4) % 4], f) for i, f in enumerate((
    ("--optimizer", "lars", "--warmup", "1", "--blur", "1", "0.1", "--solarize", "0", "0.2"),
    ("--precision", "bf16"),
    ("--arch", "resnet18", "--steps", "2"),
    ("--holdout", "20")) * 2)], ids=lambda x: x if isinstance(x, str) else x[0])
def test_flags_reach_the_end(method, flags, image_folder, tmp_path):
    script, out = importlib.import_module(method), tmp_path / "run"
    flags = [*TINY, "--epochs", "1", *flags]
    metrics = script.main(["--data", str(image_folder), *flags, "--out", str(out)])
    assert 0 <= metrics["linear"] <= 100 and (out / "backbone.pt").exists()
    if "resnet18" in flags:
        model = torchvision.models.resnet18(num_classes=10)
        model.fc = torch.nn.Identity()
        model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.load_state_dict(torch.load(out / "backbone.pt", weights_only=True), strict=True)
    if "--holdout" in flags:
        assert records(out)[0]["images"] == 60 and records(out)[0]["test_images"] == 20


def test_compile_saves_the_same_names(image_folder, tmp_path):
    """torch.compile leaves no prefix in the checkpoint and changes the loss by rounding only."""
    import simclr

    losses = []
    for flag in ("--no-compile", "--compile"):
        out = tmp_path / flag
        simclr.main(["--data", str(image_folder), *TINY, "--epochs", "1", flag, "--out", str(out)])
        losses.append(records(out)[-2]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    one, two = (load(tmp_path / flag) for flag in ("--no-compile", "--compile"))
    for part in ("backbone", "head", "probe"):
        assert list(one[part]) == list(two[part])


def test_all_variants_in_turn(image_folder, tmp_path, capsys, monkeypatch):
    """The table has a row a variant; a failed one does not end the others; the same command goes
    on, trains nothing twice, and ends with the same table."""
    import simclr

    folder = tmp_path / "all"
    flags = ["--data", str(image_folder), *TINY, "--epochs", "1", "--head", "all", "--out",
             str(folder)]
    train, trained = simclr.train, []

    def diverges(model, optimizer, scaler, data, args, dtype, run, state):
        trained.append((args.head, state["step"]))
        if args.head == "linear" and len(trained) < 5:
            simclr.fail("the loss is not finite", simclr.DIVERGED)
        return train(model, optimizer, scaler, data, args, dtype, run, state)

    monkeypatch.setattr(simclr, "train", diverges)
    with pytest.raises(SystemExit) as stop:
        simclr.main(flags)
    assert stop.value.code == simclr.DIVERGED  # not 0: a row is missing
    table = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert table[0].split() == ["head", "knn", "linear", "online", "rank", "seconds"]
    assert [row.split()[0] for row in table[1:]] == list(simclr.VARIANTS)
    assert table[2].split() == ["linear", "failed"]
    first = {head: records(folder / head)[-1] for head in ("mlp", "none", "expander")}
    assert table[1].split()[1] == f"{first['mlp']['knn']:.1f}"
    assert {p.name for p in folder.iterdir()} == set(simclr.VARIANTS)
    again = simclr.main(flags)
    assert trained[4:] == [("mlp", 4), ("linear", 0), ("none", 4), ("expander", 4)]
    assert again["linear"]["step"] == 4
    for head in ("mlp", "none", "expander"):
        assert {"final": True, **again[head]} == first[head] == records(folder / head)[-1]
    line = refused(capsys, simclr, *flags, "--lr", "0.3")
    assert f"{folder / 'mlp'} was begun with --lr 0.02" in line
    del flags[flags.index("--lr") : flags.index("--lr") + 2]  # a flag left out is noticed too
    assert "was begun with --lr 0.02" in refused(capsys, simclr, *flags)


def test_all_ends_at_bad_input(image_folder, tmp_path, capsys, monkeypatch):
    """What no variant can go on with is said once, where there is nothing yet and where there is;
    a flag that build_head fills in is compared too; the folder may be named another way."""
    import vicreg

    flags = ["--data", str(image_folder), *TINY, "--epochs", "1", "--head", "all"]
    out = ["--out", str(tmp_path / "all")]
    large = refused(capsys, vicreg, *flags, "--batch-size", "500", *out)
    assert "more than the 80" in large
    vicreg.main([*flags, "--head-lr", "0.5", *out])
    flags += ["--head-lr", "0.5"]
    assert "cannot be used" in refused(capsys, vicreg, *flags, *out, "--device", "moon")
    assert "no such folder" in refused(capsys, vicreg, *flags, *out, "--data", "/nowhere")
    assert "was begun with --head-lr 0.5" in refused(capsys, vicreg, *flags[:-2], *out)
    monkeypatch.chdir(tmp_path)
    again = vicreg.main([*flags, "--out", "all"])
    assert [again[head] for head in again] == [
        {k: v for k, v in records(tmp_path / "all" / head)[-1].items() if k != "final"}
        for head in vicreg.VARIANTS]


@pytest.mark.parametrize("script", ["directclr", "interpolate"])
def test_all_methods_and_heads_train(script, image_folder, tmp_path):
    script, folder = importlib.import_module(script), tmp_path / "all"
    flags = ["--data", str(image_folder), "--arch", "convnet", "--batch-size", "20",
             "--epochs", "2", "--out", str(folder), f"--{script.VARIANT}", "all"]
    small = ["--dim", "32", "--hidden", "32"] if script.METHOD == "interpolate" else []
    table = script.main(flags + small)
    assert list(table) == list(script.VARIANTS)
    for name, metrics in table.items():
        assert metrics["step"] == 8 and records(folder / name)[2]["loss"] is not None
        assert load(folder / name)["args"][script.VARIANT] == name


def test_interpolate_trains_what_vicreg_and_simclr_train(image_folder, tmp_path):
    """The path's first step is vicreg.py's run, weight for weight, a blend with alpha 0 too; alpha
    1 is the other method's. With simclr.py's head and temperature the step simclr is its run."""
    import interpolate
    import simclr
    import vicreg

    flags = ["--data", str(image_folder), *TINY, "--epochs", "1", "--out"]
    vicreg.main([*flags, str(tmp_path / "vicreg")])
    simclr.main([*flags, str(tmp_path / "simclr")])
    runs = {"start": [], "zero": ["--blend", "dcl", "--alpha", "0"],
            "one": ["--blend", "dcl", "--alpha", "1"], "dcl": ["--method", "dcl"],
            "step": ["--method", "simclr", "--head", "mlp", "--temperature", "0.5"]}
    for name, choice in runs.items():
        interpolate.main([*flags, str(tmp_path / name), *choice])
    assert equal_weights(tmp_path / "vicreg", tmp_path / "start")
    assert equal_weights(tmp_path / "vicreg", tmp_path / "zero")
    assert equal_weights(tmp_path / "dcl", tmp_path / "one")
    assert equal_weights(tmp_path / "simclr", tmp_path / "step")
    assert not equal_weights(tmp_path / "vicreg", tmp_path / "dcl")
    assert {"vicreg", "dcl"} <= set(records(tmp_path / "zero")[2])


def test_resume_may_change_what_does_not_matter(finished, tmp_path):
    method, out, _, _ = finished
    shutil.copytree(out, tmp_path / "moved")
    script = importlib.import_module(method)
    before = records(out)[-1]
    data = Path(records(out)[0]["args"]["data"])
    shutil.copytree(data, tmp_path / "elsewhere")
    (tmp_path / "moved" / "log.jsonl").unlink()
    after = script.main(["--resume", str(tmp_path / "moved"), "--workers", "1", "--device", "cpu",
                         "--data", str(tmp_path / "elsewhere")])
    assert {k: after[k] for k in ("knn", "linear")} == {k: before[k] for k in ("knn", "linear")}


# ---- bad input ----------------------------------------------------------------------------------


def refused(capsys, script, *flags, code=2):
    """The one line that a script prints on standard error when it exits with this code."""
    with pytest.raises(SystemExit) as stop:
        script.main([str(flag) for flag in flags])
    assert stop.value.code == code
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith(f"{script.METHOD}.py: error: ")
    return captured.err


@pytest.fixture(params=METHODS)
def script(request):
    return importlib.import_module(request.param)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


BAD_FLAGS = {
    "--batch-size 1": "of at least 2", "--batch-size 2.5": "whole number",
    "--dim 0": "of at least 1", "--dim -3": "of at least 1", "--epochs 0": "of at least 1",
    "--lr 0": "above 0", "--lr -1": "above 0", "--lr inf": "above 0", "--lr nan": "above 0",
    "--momentum 1.5": "at most 1", "--gray 2": "at most 1", "--jitter .4 .4 .4 .7": "at most 0.5",
    "--crop 0.5 0.2": "the smaller one first", "--crop 0 1": "above 0",
    "--blur .1 .2 .3": "two: one for each view", "--no-such-flag": "unrecognized",
    "--head moco": "invalid choice", "--arch vgg": "invalid choice",
    "--optimizer adam": "invalid choice",
    "--data nowhere": "no such folder", "--data ./nowhere": "no such folder",
    "--resume nowhere": "no last.pt there", "--resume=": "no last.pt there",
    "--precision fp16 --device cpu": "needs a GPU",
    "--device warp": "cannot be used here", "--device meta": "cannot be used here",
    "--holdout 5000 --data shapes": "leaves nothing",
    "--batch-size 6000 --data shapes": "more than the 5000 training images",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags(script, capsys, flags):
    line = refused(capsys, script, *flags.split())
    assert BAD_FLAGS[flags] in line
    assert not Path("runs").exists()


def test_temperature_must_be_positive(capsys):
    import simclr

    assert "above 0" in refused(capsys, simclr, "--temperature", "0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_no_cuda(script, capsys):
    assert "sees no CUDA device" in refused(capsys, script, "--data", "shapes", "--device", "cuda")


@pytest.mark.parametrize("level, dtype", [
    ((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16), ((6, 1), None)])
def test_precision_by_the_gpus_level(script, monkeypatch, level, dtype):
    """The choice that a GPU's compute capability leads to; the device itself is pretended."""
    zeros = torch.zeros
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: level)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: zeros(*size))
    assert script.choose_device(script.parse_args([])) == (torch.device("cuda"), dtype)


@pytest.fixture
def folder(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "images")
    return tmp_path / "images"


def test_bad_folders(script, capsys, folder):
    picture = next((folder / "train" / "moon").iterdir())
    picture.write_bytes(picture.read_bytes()[:100])
    for other in list((folder / "train" / "ring").iterdir())[1:]:
        other.write_bytes(b"")  # one line, however many are bad
    line = refused(capsys, script, "--data", folder, *TINY)
    assert "is unreadable" in line and str(picture) in line
    shutil.copytree(folder / "test" / "moon", folder / "test" / "sun")
    assert "test/ has classes that train/ lacks: sun" in refused(capsys, script, "--data", folder)
    (folder / "train" / "empty").mkdir()
    assert "empty" in refused(capsys, script, "--data", folder)
    shutil.rmtree(folder / "train")
    assert "needs train/CLASS/*" in refused(capsys, script, "--data", folder)
    (folder / "train").mkdir()
    shutil.rmtree(folder / "test")
    assert "val/CLASS/*" in refused(capsys, script, "--data", folder)
    assert not Path("runs").exists()


def test_no_network(script, capsys, monkeypatch, tmp_path):
    def download(self):
        raise urllib.error.URLError("no route to host")

    for name in ("CIFAR10", "STL10"):
        monkeypatch.setattr(getattr(torchvision.datasets, name), "download", download)
    for data in ("cifar10", "cifar100", "stl10"):
        line = refused(capsys, script, "--data", data, "--data-dir", tmp_path)
        assert "no route to host" in line and "--data shapes" in line and "--data DIR" in line


def test_out_that_holds_a_run(finished, capsys):
    method, out, flags, _ = finished
    before = (out / "last.pt").read_bytes()
    line = refused(capsys, importlib.import_module(method), *flags, "--out", out)
    assert "holds a run" in line and f"--resume {out}" in line
    assert (out / "last.pt").read_bytes() == before


def test_run_folder_that_cannot_be_made(image_folder, capsys):
    import simclr

    Path("runs").write_text("a file")
    flags = ("--data", image_folder, *TINY)
    assert "cannot make the run folder" in refused(capsys, simclr, *flags)
    assert "cannot make the run folder" in refused(capsys, simclr, *flags, "--out", "runs/mine")


def test_run_folders_are_numbered(image_folder):
    import simclr

    flags = ["--data", f"{image_folder}/", *TINY, "--steps", "1"]
    for _ in range(3):
        simclr.main(flags)
    name = f"simclr-{image_folder.name}"
    assert sorted(p.name for p in Path("runs").iterdir()) == [name, f"{name}-2", f"{name}-3"]


def test_resume_contradicted(finished, capsys):
    method, out, _, _ = finished
    script = importlib.import_module(method)
    line = refused(capsys, script, "--resume", out, "--lr", "0.2", "--epochs", "3", "--seed", "5")
    assert "--lr 0.2 (the run's: 0.02)" in line and "--seed 5" in line and "--epochs" not in line


def test_resume_of_another_method(finished, capsys):
    method, out, _, _ = finished
    for other in METHODS:
        if other != method:
            line = refused(capsys, importlib.import_module(other), "--resume", out)
            assert f"a run of {method}.py" in line


class Hostile:
    def __reduce__(self):
        return os.system, ("touch code-ran",)


def test_damaged_and_hostile_checkpoints(finished, capsys, tmp_path):
    method, out, _, _ = finished
    script, run = importlib.import_module(method), tmp_path / "run"
    whole = (out / "last.pt").read_bytes()
    run.mkdir()
    random = torch.Generator().manual_seed(0)
    for size in [0, 1, 4, len(whole) - 1,
                 *torch.randint(len(whole), (200,), generator=random).tolist()]:
        (run / "last.pt").write_bytes(whole[:size])
        assert "last.pt is damaged or no checkpoint" in refused(capsys, script, "--resume", run)
    hostile = {"method": method, "format": 1, "args": Hostile()}
    for content in (Hostile(), hostile, [1, 2], {"a": 1}):
        torch.save(content, run / "last.pt")
        assert "last.pt is damaged or no checkpoint" in refused(capsys, script, "--resume", run)
        (run / "last.pt").write_bytes(pickle.dumps(content))
        assert "last.pt is damaged or no checkpoint" in refused(capsys, script, "--resume", run)
    assert not Path("code-ran").exists()
    pickle.loads(pickle.dumps(Hostile()))
    assert Path("code-ran").exists()  # the files above were loaded guns


def test_checkpoint_that_does_not_fit(finished, capsys, tmp_path):
    """Entries missing, of another kind or another run's: one line, whatever is edited."""
    method, out, _, _ = finished
    script = importlib.import_module(method)
    shutil.copytree(out, tmp_path / "run")

    def edited(name, value):
        checkpoint = load(out)
        if isinstance(value, dict) and name != "optimizer":
            checkpoint[name] = {**checkpoint[name], **value}
        else:
            checkpoint[name] = value
        kept = {k: v for k, v in checkpoint.items() if v is not None}
        torch.save(kept, tmp_path / "run" / "last.pt")
        return refused(capsys, script, "--resume", tmp_path / "run")

    for name in script.CHECKPOINT:
        assert "damaged" in edited(name, None) and "damaged" in edited(name, 5j)
    assert "other arguments" in edited("args", {"crop": 3})
    assert "other arguments" in edited("args", {"surprise": 3})
    assert "does not fit" in edited("head", {"surprise": torch.zeros(2)})
    assert "does not fit" in edited("optimizer", {})
    assert "does not fit" in edited("history", [1])
    assert "80 images of 16 px, the run's 81 of 16 px" in edited("data", [81, 16, []])


def test_loss_that_is_not_finite(script, image_folder, capsys, monkeypatch, tmp_path):
    """Stops with epoch, step and parts; the last good checkpoint stays and reads."""
    run, loss_fn, calls = tmp_path / "run", script.loss_fn, []

    def breaks(z1, z2, args):
        calls.append(1)
        loss, parts = loss_fn(z1, z2, args)
        return (loss * torch.nan if len(calls) == 7 else loss), {**parts, "part": loss.detach()}

    monkeypatch.setattr(script, "loss_fn", breaks)
    line = refused(capsys, script, "--data", image_folder, *TINY, "--out", run, "--save-every", "0",
                   code=script.DIVERGED)
    assert "not finite in epoch 2, step 3 of 4: loss nan" in line and "part" in line
    assert load(run)["step"] == 6


def test_weights_that_are_not_finite(script, image_folder, capsys, monkeypatch, tmp_path):
    run, train_step, calls = tmp_path / "run", script.train_step, []

    def poisons(model, *args):
        parts = train_step(model, *args)
        calls.append(1)
        if len(calls) == 3:
            next(model.parameters()).data[0] = torch.inf
        return parts

    monkeypatch.setattr(script, "train_step", poisons)
    line = refused(capsys, script, "--data", image_folder, *TINY, "--out", run, "--save-every", "0",
                   code=script.DIVERGED)
    assert "weights are not finite after step 3" in line
    assert load(run)["step"] == 2
    calls[:] = [1]  # and before an evaluation, which could not make sense of them
    flags = ("--data", image_folder, *TINY, "--batch-size", "40", "--eval-every", "1")
    line = refused(capsys, script, *flags, "--out", tmp_path / "other", code=script.DIVERGED)
    assert "weights are not finite after step 2" in line and load(tmp_path / "other")["step"] == 0


# ---- data ---------------------------------------------------------------------------------------


def test_folder_equals_its_images(tmp_path):
    """Images of the asked size are read unchanged, in order; val/ may lack classes of train/."""
    import simclr

    images, labels = simclr.draw_shapes(30, 5, size=24)
    write_folder(tmp_path / "f" / "train", images, labels, [f"c{i}" for i in range(10)])
    write_folder(tmp_path / "f" / "val", images[3:5], labels[3:5], [f"c{i}" for i in range(10)])
    data = simclr.load_data(simclr.parse_args(["--data", str(tmp_path / "f")]))
    order = labels.argsort(stable=True)
    assert torch.equal(data.train_images, images[order])
    assert torch.equal(data.train_labels, labels[order])
    assert torch.equal(data.test_images, images[3:5]) and data.test_labels.tolist() == [3, 4]
    args = simclr.parse_args(["--data", str(tmp_path / "f"), "--image-size", "16"])
    small = simclr.load_data(args)
    assert small.train_images.shape == (30, 3, 16, 16)


def test_torchvision_sets(monkeypatch, tmp_path):
    """CIFAR's (n, 32, 32, 3) arrays and STL-10's (n, 3, 96, 96), with its unlabelled images."""
    import numpy as np

    import simclr

    class CIFAR:
        classes = ["a", "b"]

        def __init__(self, root, train, download):
            rng = np.random.default_rng(int(train))
            self.data = rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
            self.targets = [0, 1, 0, 1, 1, 1]

    class STL:
        classes = ["a", "b"]

        def __init__(self, root, split, download):
            self.data = np.zeros((6, 3, 96, 96), dtype=np.uint8)
            self.labels = np.array([0, 1, 0, 1, -1, -1] if split == "train+unlabeled" else [0] * 6)

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", CIFAR)
    monkeypatch.setattr(torchvision.datasets, "STL10", STL)
    data = simclr.load_data(simclr.parse_args(["--data", "cifar100"]))
    expected = torch.from_numpy(CIFAR("", True, True).data).permute(0, 3, 1, 2)
    assert torch.equal(data.train_images, expected) and data.train_images.is_contiguous()
    data = simclr.load_data(simclr.parse_args(["--data", "stl10", "--holdout", "1"]))
    assert data.train_images.shape == (5, 3, 96, 96) and len(data.test_labels) == 1
    assert data.test_labels[0] >= 0 and (data.train_labels == -1).sum() == 2


def test_drawn_shapes():
    import simclr

    images, labels = simclr.draw_shapes(100, 1)
    again, _ = simclr.draw_shapes(100, 1)
    other, _ = simclr.draw_shapes(100, 2)
    assert images.shape == (100, 3, 32, 32) and images.dtype == torch.uint8
    assert torch.equal(images, again) and not torch.equal(images, other)
    assert torch.bincount(labels).tolist() == [10] * 10


def test_full_disk(image_folder, tmp_path):
    """A checkpoint that does not fit leaves the one before, no rubbish, and one clear line."""
    import simclr as script

    run = tmp_path / "run"
    flags = ["--data", str(image_folder), *TINY, "--out", str(run), "--steps", "3"]
    script.main(flags)
    before = (run / "last.pt").read_bytes()

    def quota():  # what a write beyond it raises is what a full disk raises: OSError
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))

    process = start(script.METHOD, "--resume", run, limit=quota)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and errors.count("\n") == 1
    assert errors.startswith(f"{script.METHOD}.py: error: cannot write {run / 'last.pt'}: ")
    assert "what was saved before is still there" in errors
    assert (run / "last.pt").read_bytes() == before and not list(run.glob("*.tmp"))
    script.main(["--resume", str(run)])
    assert load(run)["step"] == 12
