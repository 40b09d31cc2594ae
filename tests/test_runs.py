"""Whole runs: to the last line, twice the same, stopped and resumed, and all kinds of bad input."""

import concurrent.futures
import contextlib
import functools
import importlib
import io
import json
import operator
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import analyze
import benchmark
import pytest
import torch
import torchvision
from conftest import ROOT
from family import TRAINING
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from tables import HEADS
from torch._dynamo.backends.common import aot_autograd

METHODS = [name.removesuffix(".py") for name in TRAINING]
SCRIPTS = {method: importlib.import_module(method) for method in METHODS}
TINY = ("--arch", "convnet", "--batch-size", "20", "--dim", "32", "--epochs", "3", "--lr", "0.02",
        "--device", "cpu", "--workers", "0")
CPU, RUNS = torch.device("cpu"), {}
INT, TERM = signal.SIGINT, signal.SIGTERM

def load(run):
    return torch.load(Path(run, "last.pt"), map_location="cpu", weights_only=True)

def records(run):
    return [json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()]

def without_times(run):
    times = ("seconds", "images_per_second", "left")
    return [{k: v for k, v in r.items() if k not in times} for r in records(run)[1:]]

def train(script, *flags):
    return script.main([str(flag) for flag in flags])

def equal_weights(a, b):
    a, b = load(a), load(b)
    tensors = [(name, key) for name in ("backbone", "head", "probe") for key in a[name]]
    assert len(tensors) > 20 and a["step"] == b["step"]
    return all(a[name][key].equal(b[name][key]) for name, key in tensors)

def wait_for(condition):
    deadline = time.time() + 120
    while time.time() < deadline:
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # half written, or not yet
            if condition():
                return
        time.sleep(0.005)
    raise AssertionError("it did not come about in 120 s")

def refused(capsys, script, *flags, code=2):
    """The one line that a script prints on standard error when it exits with this code."""
    with pytest.raises(SystemExit) as stop:
        train(script, *flags)
    error = capsys.readouterr().err
    assert stop.value.code == code and error.count("\n") == 1
    assert error.startswith(f"{script.METHOD}.py: error: ")
    return error

def finished(script, image_folder):
    """A run, uninterrupted, made once: folder, flags, final metrics, what was printed."""
    if script not in RUNS:
        out, printed = image_folder.parent / f"finished-{script.METHOD}", io.StringIO()
        flags = ("--data", str(image_folder), *TINY)
        with contextlib.redirect_stdout(printed):
            RUNS[script] = out, flags, train(script, *flags, "--out", out), printed.getvalue
    return RUNS[script]

@pytest.mark.parametrize("method", METHODS)
def test_run_to_the_last_line(method, image_folder):
    """Files, log and console; what is saved reads back strictly and has the accuracies logged."""
    script = SCRIPTS[method]
    out, _, metrics, printed = finished(script, image_folder)
    assert {p.name for p in out.iterdir()} == {
        "log.jsonl", "last.pt", "backbone.pt", "embeddings.pt", "neighbours.png"}
    header, untrained, *epochs, final = records(out)
    assert header["method"] == method and header["args"]["epochs"] == 3
    assert {"argv", "torch", "commit", "parameters", "threads"} <= set(header)
    assert (header["images"], header["test_images"], header["pixels"]) == (80, 40, 16)
    assert [(r["epoch"], r["step"], "knn" in r) for r in epochs] == [
        (1, 4, True), (2, 8, True), (3, 12, False)]
    assert all(r["loss"] > 0 and r["probe"] > 0 and r["images_per_second"] > 0 for r in epochs)
    assert final == {"final": True, **metrics} and final["step"] == 12
    names = ("knn", "linear", "online", "rank")
    assert {f"{name}_untrained" for name in names} <= set(untrained) & set(final)
    lines = printed().splitlines()
    assert [line.split()[0] for line in lines] == ["120", "method", *["epoch"] * 4, "final"]
    assert f"knn {final['knn']:.4g} " in lines[-1]
    checkpoint, args = load(out), script.parse_args(["--resume", str(out)])
    model, data = script.Model(args, 16, 10), script.load_data(args)
    for part in ("backbone", "head", "probe"):
        getattr(model, part).load_state_dict(checkpoint[part], strict=True)
    assert script.evaluate(model, data, args) == {name: final[name] for name in names}
    backbone = torch.load(out / "backbone.pt", weights_only=True)
    assert backbone.keys() == checkpoint["backbone"].keys()
    assert all(v.equal(checkpoint["backbone"][k]) for k, v in backbone.items())
    saved = torch.load(out / "embeddings.pt", weights_only=True)
    h = model.eval().backbone(next(script.fetch(data[3], [(None, torch.arange(40))], CPU)) / 255)
    for name, expected in (("h", h), ("z", model.head(h)), ("labels", data[4])):
        torch.testing.assert_close(saved[name], expected, rtol=1e-3, atol=1e-4)

@pytest.mark.parametrize("method, name, call, what, every, kept", [
    ("simclr", "train_step", 1, "crash", 0, 0), ("vicreg", "train_step", 5, "crash", 0, 4),
    ("directclr", "train_step", 12, "crash", 0, 11), ("vicreg", "evaluate", 3, "crash", 0, 7),
    ("simclr", "train_step", 10, "crash", 60, 0),  # two epochs are logged already
    ("interpolate", "replace", 5, "crash", 0, 3), ("simclr", "replace", 2, "crash", 60, 0),
    ("directclr", "evaluate", 4, "crash", 60, 12), ("simclr", "evaluate", 2, INT, 60, 5),
    ("vicreg", "augment", 3, TERM, 60, 2), ("directclr", "train_step", 12, TERM, 60, 12),
    ("interpolate", "replace", 2, INT, 60, 12)])
def test_stop_and_go_on(method, name, call, what, every, kept, image_folder, monkeypatch, capsys):
    """In any step, in an evaluation, while it saves: a run that goes on has the uninterrupted one's
    weights and log. After a signal the run is saved, and the handlers are the ones before."""
    script, owner, calls = SCRIPTS[method], os if name == "replace" else SCRIPTS[method], []
    out, flags, *_ = finished(script, image_folder)
    original, handlers = getattr(owner, name), [signal.getsignal(s) for s in (INT, TERM)]
    def stops(*args, **kwargs):
        calls.append(1)
        if len(calls) >= call and what == "crash":
            raise KeyboardInterrupt  # as good as a power cut: nothing catches it
        if len(calls) == call:
            os.kill(os.getpid(), what)
        return original(*args, **kwargs)
    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit)) as stop:
        patch.setattr(script, "SAVE_EVERY", every)
        patch.setattr(owner, name, stops)
        train(script, *flags, "--out", "run")
    assert load("run")["step"] == kept
    assert Path("run/last.pt.tmp").exists() == ((name, what) == ("replace", "crash"))
    assert [signal.getsignal(s) for s in (INT, TERM)] == handlers
    if what != "crash":
        assert stop.value.code == 128 + what and capsys.readouterr().out.splitlines()[-1] == (
            f"stopped after step {kept}, saved; python {method}.py --resume run")
    train(script, "--resume", "run")
    assert equal_weights(out, "run") and without_times(out) == without_times("run")

def test_stop_a_command(image_folder):
    """As a user does: SIGINT to the program. The console lacks a letter."""
    out, flags, *_ = finished(SCRIPTS["vicreg"], image_folder)
    process = subprocess.Popen([sys.executable, ROOT / "vicreg.py", *flags, "--out", "rün"],
                               env={**os.environ, "PYTHONIOENCODING": "ascii"}, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: len(records("rün")) >= 3)
    process.send_signal(INT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + INT and not errors and 4 <= load("rün")["step"] < 12
    assert f"step {load('rün')['step']}, saved; python vicreg.py --resume r?n" in output
    train(SCRIPTS["vicreg"], "--resume", "rün")
    assert equal_weights(out, "rün")

def test_dry_run_and_finished_run_go_on(image_folder, capsys, monkeypatch):
    """--steps is not kept: the resumed run has the whole length, whatever the number of workers.
    Once more there is nothing to train; folder and images may have moved, the log may be gone.
    Where torchrun starts the command again it goes on, too, but with no other run."""
    script = SCRIPTS["interpolate"]
    out, flags, metrics, _ = finished(script, image_folder)
    train(script, *flags, "--out", "run", "--steps", "5", "--workers", "2")
    assert load("run")["step"] == 5 and records("run")[-1]["final"]
    train(script, "--resume", "run", "--workers", "1")
    assert equal_weights(out, "run") and without_times(out) == without_times("run")
    shutil.copytree(image_folder, "images")
    shutil.move("run", "moved")
    Path("moved/log.jsonl").unlink()
    again = train(script, "--resume", "moved", "--data", "images")
    assert again["knn"] == metrics["knn"] and equal_weights(out, "moved")
    assert records("moved") == [{"final": True, **again}]
    train(script, *flags, "--out", "once", "--steps", "5")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert "not another dim, lr, arch" in refused(capsys, script, *flags[:2], "--out", "once")
    train(script, *flags, "--out", "once")
    assert equal_weights(out, "once") and len(records("once")) == len(records(out))

@pytest.mark.parametrize("method, flags", [
    ("simclr", "--optimizer lars --warmup .5 --blur 1 .1 --solarize 0 .2"),
    ("vicreg", "--precision bf16 --warmup 0 --optimizer lars"),
    ("directclr", "--arch resnet18 --image-size 8"), ("interpolate", "--holdout 20")])
def test_flags_reach_the_end(method, flags, image_folder):
    train(SCRIPTS[method], "--data", image_folder, *TINY, *flags.split(), "--epochs", "1", "--out",
          "run")
    header, _, epoch, final = records("run")
    assert 0 <= final["linear"] <= 100 and 0 < epoch["loss"] < 100 and load("run")["step"] > 2
    images = (60, 20) if "--holdout" in flags else (80, 40)
    assert (header["images"], header["test_images"]) == images
    assert header["precision"] == ("torch.bfloat16" if "bf16" in flags else "torch.float32")

@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
def test_backbone_is_torchvisions(arch):
    """Its names and shapes, strictly; up to 64 pixels with the CIFAR stem."""
    for size in (64, 65):
        backbone, features = SCRIPTS["vicreg"].build_backbone(arch, size)
        model = getattr(torchvision.models, arch)()
        model.fc, linear = torch.nn.Identity(), model.fc
        if size == 64:
            model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.load_state_dict(backbone.state_dict(), strict=True)
        assert features == linear.in_features and hasattr(backbone.maxpool, "stride") == (size > 64)

def test_start_from_weights(image_folder, capsys, monkeypatch):
    """All of torchvision's but for fc and a stem of another size; those of a run, once."""
    script, begun, theirs = SCRIPTS["directclr"], {}, torchvision.models.resnet18().state_dict()
    torch.save(theirs, "given.pt")
    flags = ("--data", image_folder, *TINY, "--weights")
    with monkeypatch.context() as patch:
        patch.setattr(script, "evaluate", lambda *args, **options: {})
        patch.setattr(script, "train", lambda model, *_: begun.update(model.backbone.state_dict()))
        for size, new in ((8, ["conv1.weight"]), (72, [])):
            train(script, *flags, "given.pt", "--arch", "resnet18", "--image-size", size)
            assert [k for k, w in theirs.items() if k not in begun or not w.equal(begun[k])] == [
                *new, "fc.weight", "fc.bias"]
    given = finished(script, image_folder)[0] / "backbone.pt"
    whole = train(script, *flags, given, "--out", "whole")
    assert whole["linear_untrained"] == finished(script, image_folder)[2]["linear"]
    train(script, *flags, given, "--steps", "1", "--out", "run")
    train(script, "--resume", "run")
    assert equal_weights("run", "whole") and not equal_weights("run", given.parent)
    for file in (given, "nowhere.pt", "run/embeddings.pt"):
        assert f"{file} does not fit: " in refused(
            capsys, script, *flags, file, "--arch", "resnet18")

@pytest.mark.parametrize("method, flag, names", [
    ("directclr", "head", HEADS), ("interpolate", "method", (*SCRIPTS["interpolate"].PATH,))])
def test_all_heads_and_methods_train(method, flag, names, image_folder):
    """In a folder of their own, which is numbered when it is taken."""
    flags = ("--data", f"{image_folder}/", *TINY, "--epochs", "1", "--batch-size", "40",
             "--image-size", "8")
    folders = [f"runs/{method}-{name}-{image_folder.name}" for name in names]
    for name in (*names, names[1]):
        assert train(SCRIPTS[method], *flags, f"--{flag}", name)["step"] == 2
    assert sorted(map(str, Path("runs").iterdir())) == sorted([*folders, f"{folders[1]}-2"])
    for name, folder in zip(names, folders):
        assert load(folder)["args"][flag] == name and abs(records(folder)[2]["loss"]) < 100

def test_interpolate_trains_what_vicreg_and_simclr_train(image_folder):
    """The path's first step is vicreg.py's run, weight for weight, a blend with alpha 0 too; alpha
    1 is the other method's. With simclr.py's head and temperature the step simclr is its run."""
    runs = {"vicreg": "", "simclr": "", "first": "", "zero": "--blend dcl --alpha 0",
            "one": "--method simclr --blend dcl --alpha 1", "dcl": "--method dcl",
            "last": "--method simclr --head mlp --temperature 0.5"}
    for name, choice in runs.items():
        train(SCRIPTS.get(name, SCRIPTS["interpolate"]), "--data", image_folder, *TINY, "--epochs",
              "1", "--out", name, *choice.split())
    assert equal_weights("vicreg", "first") and equal_weights("vicreg", "zero")
    assert equal_weights("dcl", "one") and equal_weights("simclr", "last")
    assert not equal_weights("vicreg", "dcl") and {"vicreg", "dcl"} <= set(records("zero")[2])

@pytest.mark.parametrize("optimizer, method, head_rate", [
    ("lars", "vicreg", 0.15), ("sgd", "simclr", 0.15), ("sgd", "interpolate", 0.075 / 64)])
def test_optimizers(optimizer, method, head_rate):
    """Three steps in float64 against the formulas, written as a loop: LARS scales and decays what
    has two dimensions; SGD gives an expander a lower rate; the probe has its own, no decay."""
    script, lars = SCRIPTS[method], optimizer == "lars"
    args = script.parse_args(f"--arch convnet --dim 8 --hidden 2048 --optimizer {optimizer} --lr .3"
                             " --batch-size 128 --weight-decay 0.01".split())
    torch.manual_seed(0)
    model = script.Model(args, 16, 10).double()
    model.backbone[0][0].weight.data.zero_()  # what has no ratio counts as 1
    rule, mine = script.build_optimizer(model, args), dict(model.named_parameters())
    theirs = {name: (p.detach().clone(), torch.zeros_like(p)) for name, p in mine.items()}
    for _ in range(3):
        for name, (p, velocity) in theirs.items():
            g = mine[name].grad = torch.randn_like(p)
            rate = {"b": 0.15, "h": head_rate, "p": 0.1}[name[0]]  # backbone, head, probe
            if rate != 0.1 and (p.ndim > 1 or not lars):
                g = g + 0.01 * p
            if rate != 0.1 and p.ndim > 1 and lars and p.any():
                g = g * (0.001 * p.norm() / g.norm())
            velocity.mul_(0.9).add_(g)
            p.sub_(rate * velocity)
        rule.step()
    for name, (p, _) in theirs.items():
        torch.testing.assert_close(mine[name].detach(), p, rtol=1e-10, atol=1e-12)

def test_compile(image_folder, monkeypatch):
    """Five graphs, a small one to see that it can be done, of two views, network and loss, whatever
    comes between; the same names are saved; the loss changes by rounding only. The operations are
    inductor's, without its C++."""
    script, compiler, counters = SCRIPTS["vicreg"], torch.compile, torch._dynamo.utils.counters
    flags = ("--data", image_folder, *TINY, "--batch-size", "80", "--out")  # an epoch has one step
    train(script, *flags, "plain")
    for run, backend in (((*flags, "graphs", "--compile", "--steps", "2"),
                          "aot_eager_decomp_partition"), (("--resume", "graphs"), "eager")):
        monkeypatch.setattr(torch, "compile", functools.partial(compiler, backend=backend))
        torch.compiler.reset()
        counters.clear()
        train(script, *run)
        assert counters["stats"]["unique_graphs"] == 5 and not counters["graph_break"]
    for part in ("backbone", "head", "probe"):
        assert list(load("plain")[part]) == list(load("graphs")[part])
    one, two = ([r["loss"] for r in records(run)[2:4]] for run in ("plain", "graphs"))
    assert one != two and one == pytest.approx(two, rel=1e-5)

def test_compile_without_a_compiler(image_folder):
    """One line before anything is read or trained."""
    command = [sys.executable, ROOT / "vicreg.py", "--data", image_folder, *TINY, "--compile"]
    done = subprocess.run(command, env={"PATH": "", "TORCHINDUCTOR_CACHE_DIR": "cache", "HOME": "."},
                          capture_output=True, text=True)
    assert done.returncode == 2 and not Path("runs").exists()
    assert re.fullmatch("vicreg.py: error: --device cpu --compile: .* compiler .*\n", done.stderr)

def test_benchmark_passes_both_views():
    """Compiled, too: of two views that are one tensor only one pass would be left."""
    counted, options = [], SimpleNamespace(arch="convnet", precision="fp32", compile=False)
    def count(graph, inputs):
        counted.append(sum("convolution" in str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph)
    steps = benchmark.Steps("simclr.py", 4, CPU, options)
    steps.model.compile(backend=aot_autograd(
        fw_compiler=count, partition_fn=min_cut_rematerialization_partition))
    steps.bare()
    assert counted[0] == 2 * sum(isinstance(m, torch.nn.Conv2d) for m in steps.model.modules())

@pytest.mark.parametrize("method, what, every, step, kept", [
    ("simclr", "loss", 0, 7, 6), ("vicreg", "weights", 0, 7, 6), ("interpolate", "loss", 60, 8, 0),
    ("directclr", "weights", 60, 8, 0), ("simclr", "fp16", 60, 28, 0)])
def test_training_that_is_not_finite(method, what, every, step, kept, image_folder, capsys,
                                     monkeypatch):
    """One line with the parts, an exit code of its own; the last good checkpoint stays and reads.
    Where nothing is to be saved yet the epoch's end notices, before an evaluation; where fp16's
    gradients are never finite, its scale when it is tiny."""
    script, calls = SCRIPTS[method], []
    train_step = script.train_step
    def poisoned(model, *args):
        if not calls and what == "fp16":
            next(model.parameters()).register_hook(lambda g: g * torch.nan)
        parts = train_step(model, *args)
        calls.append(1)
        if len(calls) == 7 and what == "loss":
            parts["loss"] *= torch.inf
        if len(calls) == 7 and what == "weights":
            next(model.parameters()).data[0] = torch.nan
        return parts
    monkeypatch.setattr(script, "train_step", poisoned)
    monkeypatch.setattr(script, "SAVE_EVERY", every)
    line = refused(capsys, script, "--data", image_folder, *TINY, "--image-size", "8", "--epochs",
                   "30", "--precision", what if what == "fp16" else "fp32", "--out", "run", code=3)
    assert f"not finite after step {step}: " in line and "'loss': " in line
    assert load("run")["step"] == kept and len(records("run")) == 2 + (step - 1) // 4

def test_analyze_reads_all_runs(image_folder):
    """What every training script leaves, side by side; what is no run is passed over."""
    outs = {method: finished(script, image_folder)[::2] for method, script in SCRIPTS.items()}
    analyze.main(["compare", str(image_folder), *(str(out) for out, _ in outs.values()),
                  "--out", "o"])
    table = Path("o/compare.md").read_text()
    for method, (_, final) in outs.items():
        assert re.search(rf"\| +finished-{method} \| .*\| +{final['linear']:.4g} \|", table)

def test_first_scale_that_is_too_large(image_folder, monkeypatch):
    """fp16 leaves out steps until a scale fits, and the resumed run has that scale."""
    script, after = SCRIPTS["vicreg"], []
    step = script.train_step
    def looks(model, optimizer, scaler, *args):
        parts = step(model, optimizer, scaler, *args)
        after.append((scaler.get_scale(), model.head[0].weight.sum().item()))
        return parts
    monkeypatch.setattr(script, "train_step", looks)
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(
        torch.amp.GradScaler, init_scale=2.0**20))
    train(script, "--data", image_folder, *TINY, "--hidden", "32", "--image-size", "8", "--epochs",
          "40", "--precision", "fp16", "--out", "run", "--steps", "30")
    scales, weights = zip(*after)
    halved = [new < old for old, new in zip((2.0**20, *scales), scales)]
    assert [*map(operator.eq, weights, weights[1:])] == halved[1:] and halved[0]
    assert 3 < sum(halved) < 25
    assert scales[-1] == 2.0 ** (20 - sum(halved)) == load("run")["scaler"]["scale"]
    train(script, "--resume", "run", "--steps", "31")
    assert after[30][0] == scales[-1] and after[30][1] != weights[-1] and len(after) == 31

BAD_FLAGS = {
    "--batch-size 1": "two each", "--batch-size 2.5": "invalid int value", "--dim 0": "above 0",
    "--epochs -3": "above 0", "--lr 0": "above 0", "--lr inf": "above 0", "--lr nan": "above 0",
    "--gray 2": "<= 1", "--warmup 1.5": "<= 1", "--jitter .4 .4 .4 .7": "the hue's <= 0.5",
    "--crop 0.5 0.2": "LOW <= HIGH", "--crop 0 1": "0 < --crop", "--solarize 0 -1": "0 <= ",
    "--blur .1 .2 .3": "unrecognized", "--seed -1": "at least 0", "--steps -1": "at least 0",
    "--no-such-flag": "unrecognized", "--arch vgg": "invalid choice",
    "--optimizer adam": "invalid choice", "--device warp": "cannot be used here",
    "--device cuda:99": "cannot be used here", "--device=": "cannot be used here",
    "--data nowhere": "no folder with images", "--resume nowhere": "last.pt is missing",
    "--resume=": "last.pt is missing", "--weights=": "does not fit", "--holdout 80": "80 of 80 images held out",
    "--batch-size 81": "only 80 images to train on", "simclr --head moco": "invalid choice",
    "simclr --temperature 0": "above 0", "directclr --dim 600": "more than the 512 features",
    "interpolate --alpha 2": "at most 1", "interpolate --mu 0": "above 0",
    "interpolate --normalize A": "is for simclr and dcl",
    "interpolate --method vicreg-exp --dim 2": "at least 3", "interpolate --alpha -.1": "at least 0",
    "interpolate --blend byol": "invalid choice: 'byol' (choose", "directclr --head lowrank --dim "
    "513": "more than the 512", "interpolate --blend vicreg-ctr --dim 1": "at least 3"}

@pytest.mark.parametrize("i, flags", [*enumerate(BAD_FLAGS)])
def test_bad_flags(i, flags, capsys, image_folder):
    method, *words = flags.split() if flags[0] != "-" else (METHODS[i % 4], *flags.split())
    assert BAD_FLAGS[flags] in refused(
        capsys, SCRIPTS[method], "--device", "cpu", "--data", image_folder, "--batch-size", "20",
        "--workers", "0", *words)
    assert not Path("runs").exists()

@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
@pytest.mark.parametrize("method", METHODS)
def test_several_processes_without_torchrun(name, method, capsys, monkeypatch):
    """Would train the same run as often, or wait for processes that never come."""
    monkeypatch.setenv(name, "2")
    assert "by torchrun" in refused(capsys, SCRIPTS[method], "--data", "shapes")
    monkeypatch.setenv("RANK", "0")
    SCRIPTS[method].parse_args(["--data", "shapes"])

def test_main_in_a_thread(image_folder):
    """Where no signal can be caught: the same weights and log, as in any run with the same seed."""
    script = SCRIPTS["directclr"]
    out, flags, *_ = finished(script, image_folder)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        for seed in "01":
            thread.submit(train, script, *flags, "--seed", seed, "--out", seed).result()
    assert equal_weights(out, "0") and without_times(out) == without_times("0")
    assert not equal_weights(out, "1")

def test_run_folders(image_folder, capsys, monkeypatch):
    """One that holds a run is not written to, one that cannot be made is an OSError, and one of a
    run that never saved keeps its log but for torchrun's restart; none is not one that is called
    None. A run ends where another, resumed twice, has written to its log."""
    script = SCRIPTS["vicreg"]
    out, flags, *_ = finished(script, image_folder)
    before = (out / "last.pt").read_bytes()
    assert f"holds a run; take --resume {out} " in refused(capsys, script, *flags, "--out", out)
    assert (out / "last.pt").read_bytes() == before
    Path("runs").write_text("a file")
    for out in ((), ("--out", "runs/mine")):
        with pytest.raises(OSError, match="runs"):
            train(script, *flags, *out)
    os.unlink("runs")
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(script, "evaluate", None)
        train(script, *flags, "--out", "None")
    assert "holds a run" in refused(capsys, script, *flags, "--out", "None")
    assert len(records("None")) == 1
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train(script, *flags, "--out", "None", "--steps", "1")
    assert len(records("None")) == 3
    monkeypatch.setattr(script, "evaluate", lambda *args, **options: open(
        "None/log.jsonl", "a").write("{}\n") and {})
    line = refused(capsys, script, "--resume", "None")
    assert "another run writes to None/log.jsonl" in line and load("None")["step"] == 1

@pytest.mark.parametrize("method", METHODS)
def test_resume_refused(method, image_folder, capsys):
    """With flags that are not the run's, and by another script."""
    out, *_ = finished(SCRIPTS[method], image_folder)
    line = refused(capsys, SCRIPTS[method], "--resume", out, "--lr", "0.2", "--epochs", "3",
                   "--seed", "5", "--weight-decay", "0")
    assert line.endswith("the run's own flags, not another lr, weight_decay, seed\n")
    for other in {*METHODS} - {method}:
        assert f"a run of {method}.py" in refused(capsys, SCRIPTS[other], "--resume", out)

class Hostile:
    def __reduce__(self):
        return os.system, ("touch code-ran",)

def test_damaged_and_hostile_checkpoints(image_folder, capsys):
    script, file = SCRIPTS["interpolate"], Path("last.pt")
    whole = (finished(script, image_folder)[0] / "last.pt").read_bytes()
    sizes = torch.randint(len(whole), (60,), generator=torch.Generator().manual_seed(0)).tolist()
    contents = [Hostile(), [1, 2], {"a": 1}, *({"method": "interpolate", "args": args}
                                               for args in (Hostile(), 5))]
    for value in (*(whole[:size] for size in (0, 1, 4, len(whole) - 1, *sizes)),
                  *map(pickle.dumps, contents), *contents):
        file.write_bytes(value) if isinstance(value, bytes) else torch.save(value, file)
        assert "last.pt is missing, damaged" in refused(capsys, script, "--resume", ".")
    assert not Path("code-ran").exists()
    pickle.loads(pickle.dumps(Hostile()))
    assert Path("code-ran").exists()  # the files above were loaded guns

@pytest.mark.parametrize("name", ["data", "step", "seconds", "sums", "untrained", "log_bytes",
                                  "backbone", "head", "probe", "optimizer", "scaler"])
def test_checkpoints_that_do_not_fit(name, image_folder, capsys):
    """An entry missing, of another kind or with too much: one line, whichever is edited."""
    script = SCRIPTS["simclr"]
    whole = load(finished(script, image_folder)[0])
    kept = {k: v for k, v in whole.items() if k != name}
    edits = [kept] if name == "scaler" else [kept, {**kept, name: "x"}]  # without fp16 not read
    if name in ("backbone", "head", "probe"):
        edits.append({**kept, name: {**whole[name], "surprise": torch.zeros(2)}})
    for edit in edits:
        torch.save(edit, "last.pt")
        line = refused(capsys, script, "--resume", ".")
        assert "does not fit: " in line or name == "data" and "is not the run's data" in line
    torch.save({**whole, "args": {**whole["args"], "lr": "much"}}, "last.pt")
    assert "invalid float value" in refused(capsys, script, "--resume", ".")
