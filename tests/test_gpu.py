"""What a GPU does otherwise than a CPU. The tests run on both where that tells something, so that
they are known to work when a GPU comes."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_runs import (
    METHODS, SCRIPTS, TINY, equal_weights, in_an_empty_folder, load, records, refused, train)

import simclr

__all__ = ["in_an_empty_folder"]
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CPU_AND_GPU = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])

# ---- choices, the GPU pretended ------------------------------------------------------------------

@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_no_cuda(name, capsys):
    line = refused(capsys, SCRIPTS["vicreg"], "--data", "shapes", "--device", name)
    assert f"--device {name}: cannot be used here (" in line

@pytest.mark.parametrize("level, dtype", [
    ((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16)])
def test_precision_by_the_gpus_level(level, dtype, monkeypatch):
    """And the process's own GPU, unless another is named."""
    script, zeros, chosen = SCRIPTS["directclr"], torch.zeros, []
    monkeypatch.setattr(script, "LOCAL_RANK", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: level)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: zeros(*size))
    for flags, expected in (("", (1, dtype)), ("--precision bf16", (1, torch.bfloat16)),
                            ("--device cuda:0 --precision fp32", (0, torch.float32))):
        device, found = script.choose_device(script.parse_args(flags.split()))
        assert (device.index, found) == expected and chosen[-1] == device

@pytest.mark.parametrize("device, backend", [("cuda", "nccl"), ("cpu", "gloo")])
def test_process_group_serves_both_devices(device, backend, monkeypatch):
    """agree()'s number is on the CPU, gather()'s embeddings on the device."""
    class Asked(BaseException):
        pass
    def group(backend):
        raise Asked(backend)
    monkeypatch.setattr(simclr, "WORLD", 2)
    monkeypatch.setattr(simclr, "choose_device", lambda args: (torch.device(device), torch.float32))
    monkeypatch.setattr(simclr.dist, "init_process_group", group)
    with pytest.raises(Asked) as asked:
        simclr.main([])
    config = torch.distributed.BackendConfig(torch.distributed.Backend(asked.value.args[0]))
    backends = config.get_device_backend_map()
    assert (backends["cpu"], backends[device]) == ("gloo", backend)

# ---- steps ---------------------------------------------------------------------------------------

def step(device, *flags, method="simclr", size=32, n=16):
    """A function that makes one update, as train() does, and the model."""
    script = SCRIPTS[method]
    args = script.parse_args(["--data", "shapes", "--device", device, "--batch-size", str(n), *flags])
    _, dtype = script.choose_device(args)
    torch.manual_seed(0)
    model = script.Model(args, size, 10).to(device, memory_format=torch.channels_last)
    optimizer = script.build_optimizer(model, args)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    images, labels = (part.to(device) for part in script.draw_shapes(n, 1, size))
    draws = torch.rand(2, script.DRAWS, n, 1, 1, 1).to(device)
    return lambda: script.train_step(model, optimizer, scaler, script.augment, images, labels,
                                     draws, args, dtype), model

@NEEDS_GPU
@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_does_not_wait_for_the_gpu(method, optimizer):
    """No synchronisation in augmentation, network, loss and optimiser."""
    update, _ = step("cuda", "--precision", "bf16", "--blur", "0.5", "0.5", "--solarize", "0", "0.5",
                     "--optimizer", optimizer, method=method)
    try:
        for mode in ("default", "error", "error"):
            update()
            torch.cuda.set_sync_debug_mode(mode)
    finally:
        torch.cuda.set_sync_debug_mode("default")

@CPU_AND_GPU
@pytest.mark.parametrize("arch", ["convnet", "resnet18", "resnet50"])
def test_channels_last_reaches_every_layer(arch, device):
    """Weights, activations and gradients of every convolution keep the format, as does a step."""
    update, model = step(device, "--arch", arch, "--precision", "bf16", n=4)
    formats = []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: formats.append(
                output.is_contiguous(memory_format=torch.channels_last)))
    assert update()["loss"].isfinite() and len(formats) >= 10 and all(formats)
    weights = [p for p in model.parameters() if p.ndim == 4]
    for tensor in [*weights, *(w.grad for w in weights)]:
        assert tensor.is_contiguous(memory_format=torch.channels_last)

@NEEDS_GPU
def test_views_on_the_gpu_are_the_cpus():
    """The same draws give the same two views, to float32's rounding."""
    args = simclr.parse_args("--blur 1 0.5 --solarize 0 0.5".split())
    images = simclr.draw_shapes(64, 1)[0]
    draws = torch.rand(2, simclr.DRAWS, 64, 1, 1, 1)
    for i in (0, 1):
        ours = simclr.augment(images.cuda(), draws[i].cuda(), i, args).cpu()
        difference = (ours - simclr.augment(images, draws[i], i, args)).abs()
        # a crop's edge that rounds to the other side moves a whole image
        assert (difference.amax((1, 2, 3)) > 1e-3).sum() <= 1

@CPU_AND_GPU
def test_streamed_images_arrive_whole(device, image_folder):
    """Pinned memory and transfers that nothing waits for bring the images that the folder holds."""
    flags = ["--data", str(image_folder), "--workers", "2"]
    folder, device = simclr.load_data(simclr.parse_args(flags))[1], torch.device(device)
    batches = [(1, part) for part in torch.arange(80).split(8)]
    found = [batch.clone() for batch in simclr.fetch(folder, batches, device)]
    assert all(batch.device.type == device.type for batch in found)
    alone = torch.stack([folder[1, i] for i in range(80)])
    assert torch.equal(torch.cat(found).cpu(), alone)

# ---- whole runs ----------------------------------------------------------------------------------

@pytest.fixture
def deterministic(monkeypatch):
    """What --deterministic sets is taken back after the test."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield
    torch.use_deterministic_algorithms(False)

@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@CPU_AND_GPU
def test_deterministic_runs_are_equal(device, precision, image_folder, deterministic):
    """Two runs bit for bit, the second one stopped and gone on with, fp16's scaler with it."""
    flags = ("--data", image_folder, *TINY, "--device", device, "--precision", precision,
             "--image-size", "8", "--deterministic", "--out")
    train(simclr, *flags, "one")
    assert torch.are_deterministic_algorithms_enabled()
    train(simclr, *flags, "two", "--steps", "5")
    train(simclr, "--resume", "two")
    assert equal_weights("one", "two") and load("one")["scaler"] == load("two")["scaler"]
    one, two = (records(name)[-1] for name in ("one", "two"))
    assert [one[k] == two[k] for k in ("knn", "linear", "online", "rank")] == [True] * 4
    assert bool(load("one")["scaler"]) == (precision == "fp16")
    assert one["peak_mib"] is None if device == "cpu" else one["peak_mib"] > 0

@NEEDS_GPU
@pytest.mark.parametrize("first, then", [(["--compile"], []), ([], ["--compile"])])
@pytest.mark.parametrize("method", METHODS)
def test_compilation_may_change_on_resume(method, first, then, image_folder):
    """The weights have the same names with and without torch.compile; each reads the other's."""
    script = SCRIPTS[method]
    train(script, "--data", image_folder, *TINY, "--device", "cuda", "--out", "run", *first,
          "--steps", "5")
    assert train(script, "--resume", "run", *then)["step"] == 12
    backbone = torch.load("run/backbone.pt", weights_only=True)
    assert backbone.keys() == script.build_backbone("convnet", 16)[0].state_dict().keys()
    assert all(value.device.type == "cpu" for value in backbone.values())

# For each of two processes: NCCL refuses two on one GPU, so their group is gloo's.
WORK = """
import sys, torch, simclr
torch.backends.cudnn.allow_tf32 = False
if simclr.WORLD > 1:
    torch.distributed.init_process_group("gloo")
simclr.main(sys.argv[1:])
"""

@NEEDS_GPU
def test_synchronised_batchnorm(image_folder):
    """Two processes on the GPU train one's weights, running statistics included."""
    with open("work.py", "w") as file:
        file.write(WORK)
    for n in ("1", "2"):
        subprocess.run([
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", n,
            "work.py", "--data", image_folder, *TINY, "--steps", "4", "--precision", "fp32",
            "--device", "cuda:0", "--out", n], env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=True, timeout=300)
    for part in ("backbone", "head", "probe"):
        for name, value in load("1")[part].items():
            assert torch.allclose(load("2")[part][name], value, rtol=1e-2, atol=1e-4), (part, name)
