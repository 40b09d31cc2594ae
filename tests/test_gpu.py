"""What a GPU does otherwise than a CPU. The tests run on both where that tells something, so that
they are known to work when a GPU comes."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from family import TRAINING
from test_runs import TINY, equal_weights, records

import simclr

METHODS = [name.removesuffix(".py") for name in TRAINING]
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CPU_AND_GPU = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])


@pytest.fixture
def deterministic(monkeypatch):
    """What --deterministic sets is taken back after the test."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield
    torch.use_deterministic_algorithms(False)


def prepare(flags, device, size=32, method="simclr"):
    """A script's network, optimiser and scaler on the device, as main() makes them."""
    script = importlib.import_module(method)
    args = script.parse_args(["--data", "shapes", "--device", device, *flags])
    _, dtype = script.choose_device(args)
    torch.manual_seed(0)
    model = script.Model(args, size, 10).to(device, memory_format=torch.channels_last)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    return script, args, dtype, model, script.build_optimizer(model, args), scaler


@pytest.mark.parametrize("precision", ["fp32", "bf16", pytest.param("fp16", marks=NEEDS_GPU)])
@CPU_AND_GPU
def test_deterministic_runs_are_equal(device, precision, image_folder, tmp_path, deterministic):
    """Two runs bit for bit, the second one stopped and gone on with, fp16's scaler with it."""
    if (device, precision) == ("cpu", "fp16"):
        pytest.skip("fp16 needs a GPU")
    flags = ["--data", str(image_folder), *TINY, "--device", device, "--precision", precision,
             "--deterministic", "--no-compile"]
    simclr.main([*flags, "--out", str(tmp_path / "one")])
    assert torch.are_deterministic_algorithms_enabled()
    simclr.main([*flags, "--out", str(tmp_path / "two"), "--steps", "5"])
    simclr.main(["--resume", str(tmp_path / "two")])
    assert equal_weights(tmp_path / "one", tmp_path / "two")
    one, two = (records(tmp_path / name)[-1] for name in ("one", "two"))
    same = ("knn", "linear", "online", "rank")
    assert {name: one[name] for name in same} == {name: two[name] for name in same}
    assert device == "cpu" or one["peak_mib"] > 0


@NEEDS_GPU
@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_does_not_wait_for_the_gpu(method, optimizer):
    """No synchronisation in augmentation, network, loss and optimiser."""
    script, args, dtype, model, optimizer, scaler = prepare(
        ["--batch-size", "16", "--precision", "bf16", "--blur", "0.5", "--solarize", "0.5",
         "--optimizer", optimizer], "cuda", method=method)
    images, labels = (part.cuda() for part in script.draw_shapes(16, 1))
    try:
        for mode in ("default", "error", "error"):
            script.train_step(model, optimizer, scaler, script.augment, images, labels, args, dtype)
            torch.cuda.set_sync_debug_mode(mode)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@NEEDS_GPU
def test_views_on_the_gpu_are_the_cpus():
    """The same draws give the same two views, to float32's rounding."""
    args = simclr.parse_args(["--blur", "1", "0.5", "--solarize", "0", "0.5"])
    images = simclr.draw_shapes(64, 1)[0]
    draws = torch.rand(2, 64, simclr.DRAWS, generator=torch.Generator().manual_seed(0))
    for i in (0, 1):
        ours = simclr.augment(images.cuda(), draws[i].cuda(), i, args).cpu()
        difference = (ours - simclr.augment(images, draws[i], i, args)).abs()
        # a crop's edge that rounds to the other side moves a whole image
        assert (difference.amax((1, 2, 3)) > 1e-3).sum() <= 1


@CPU_AND_GPU
def test_streamed_images_arrive_whole(device, image_folder):
    """Pinned memory and transfers that nothing waits for bring the images that the folder holds."""
    args = simclr.parse_args(["--data", str(image_folder), "--stream", "--workers", "2",
                              "--image-size", "16"])
    folder, device = simclr.load_data(args).train_images, torch.device(device)
    index = torch.arange(80)
    batches = [(part, part) for part in index.split(8)]
    found = [batch.clone() for batch, _ in simclr.fetch(folder, batches, device)]
    assert all(batch.device.type == device.type for batch in found)
    alone = torch.stack([folder[i, i][0] for i in index.tolist()])
    assert torch.equal(torch.cat(found).cpu(), alone)


@CPU_AND_GPU
@pytest.mark.parametrize("arch", ["convnet", "resnet18", "resnet34", "resnet50"])
def test_channels_last_reaches_every_layer(arch, device):
    """Weights, activations and gradients of every convolution keep the format, as does a step."""
    script, args, dtype, model, optimizer, scaler = prepare(
        ["--arch", arch, "--batch-size", "4", "--precision", "bf16"], device)
    formats = []

    def look(module, inputs, output):
        formats.append(output.is_contiguous(memory_format=torch.channels_last))

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(look)
    images, labels = (part.to(device) for part in script.draw_shapes(4, 1))
    parts = script.train_step(
        model, optimizer, scaler, script.augment, images, labels, args, dtype)
    assert parts["loss"].isfinite() and len(formats) >= 10 and all(formats)
    weights = [p for p in model.parameters() if p.ndim == 4]
    for tensors in (weights, [w.grad for w in weights]):
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors)


# For each of two processes: NCCL refuses two on one GPU, so their group is gloo's.
WORK = """
import sys, torch, simclr
torch.backends.cudnn.allow_tf32 = False
if int(sys.argv[1]) > 1:
    torch.distributed.init_process_group("gloo")
simclr.main(sys.argv[2:])
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


@NEEDS_GPU
def test_synchronised_batchnorm(image_folder, tmp_path):
    """Two processes on the GPU train one's weights, running statistics included."""
    flags = ["--data", str(image_folder), *TINY, "--steps", "4", "--precision", "fp32",
             "--device", "cuda:0", "--no-compile"]
    (tmp_path / "work.py").write_text(WORK)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for n in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
        subprocess.run([sys.executable, *launch, str(tmp_path / "work.py"), str(n), *flags, "--out",
                        str(tmp_path / str(n))], env=environment, check=True, timeout=300)
    one, two = (torch.load(tmp_path / str(n) / "last.pt", weights_only=True) for n in (1, 2))
    for part in ("backbone", "head", "probe"):
        for name, value in one[part].items():
            assert torch.allclose(two[part][name], value, rtol=1e-2, atol=1e-4), (part, name)


@NEEDS_GPU
@pytest.mark.parametrize("first, then", [
    ("--compile", "--no-compile"), ("--no-compile", "--compile")])
def test_compilation_may_change_on_resume(first, then, image_folder, tmp_path):
    """The weights have the same names with and without torch.compile; each reads the other's."""
    flags = ["--data", str(image_folder), *TINY, "--device", "cuda", "--out", str(tmp_path)]
    simclr.main([*flags, first, "--steps", "5"])
    assert simclr.main(["--resume", str(tmp_path), then])["step"] == 12
    names = torch.load(tmp_path / "backbone.pt", weights_only=True).keys()
    assert names == simclr.ConvNet().state_dict().keys()
