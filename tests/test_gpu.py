"""What a GPU does otherwise than a CPU. The tests run on both where that tells something, so that
they are known to work when a GPU comes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_runs import METHODS, SCRIPTS, TINY, equal_weights, load, records, refused, train

import simclr

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CPU_AND_GPU = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])

@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_no_cuda(capsys):
    for name in ("cuda", "cuda:1"):
        line = refused(capsys, SCRIPTS["vicreg"], "--data", "shapes", "--device", name)
        assert f"--device {name}: cannot be used here (" in line

@pytest.mark.parametrize("level, dtype", [
    ((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16)])
def test_precision_by_the_gpus_level(level, dtype, monkeypatch):
    """And the process's own GPU, unless another is named; GPUs are pretended."""
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
    def group(backend):
        raise KeyboardInterrupt(backend)
    monkeypatch.setattr(simclr, "WORLD", 2)
    monkeypatch.setattr(simclr, "choose_device", lambda args: (torch.device(device), torch.float32))
    monkeypatch.setattr(simclr.dist, "init_process_group", group)
    with pytest.raises(KeyboardInterrupt) as asked:
        simclr.main([])
    backends = torch.distributed.BackendConfig(torch.distributed.Backend(str(asked.value)))
    assert backends.get_device_backend_map().items() >= {"cpu": "gloo", device: backend}.items()

def make_step(device, *flags, method="simclr", n=16):
    """A function that makes one update, as train() does, and the model."""
    script = SCRIPTS[method]
    args = script.parse_args(["--data", "shapes", "--device", device, "--batch-size", str(n), *flags])
    _, dtype = script.choose_device(args)
    model = script.Model(args, 32, 10).to(device, memory_format=torch.channels_last)
    optimizer, scaler = script.build_optimizer(model, args), torch.amp.GradScaler(enabled=False)
    batch = [x.to(device) for x in (*script.draw_shapes(n, 1),
                                    torch.rand(2, script.DRAWS, n, 1, 1, 1))]
    return lambda: script.train_step(model, optimizer, scaler, script.augment, *batch, args,
                                     dtype), model

@NEEDS_GPU
@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_does_not_wait_for_the_gpu(method, optimizer):
    """No synchronisation in augmentation, network, loss and optimiser."""
    step, _ = make_step("cuda", "--precision", "bf16", "--blur", ".5", ".5", "--solarize", "0", ".5",
                        "--optimizer", optimizer, method=method)
    try:
        for mode in ("default", "error", "error"):
            step()
            torch.cuda.set_sync_debug_mode(mode)
    finally:
        torch.cuda.set_sync_debug_mode("default")

@CPU_AND_GPU
@pytest.mark.parametrize("arch", ["convnet", "resnet18", "resnet50"])
def test_channels_last_reaches_every_layer(arch, device):
    """Weights, activations and gradients of every convolution keep the format, as does a step."""
    step, model = make_step(device, "--arch", arch, "--precision", "bf16", n=4)
    outputs = []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    assert step()["loss"].isfinite() and len(outputs) >= 10
    weights = [p for p in model.parameters() if p.ndim == 4]
    for tensor in (*outputs, *weights, *(w.grad for w in weights)):
        assert tensor.is_contiguous(memory_format=torch.channels_last)

@NEEDS_GPU
def test_views_on_the_gpu_are_the_cpus():
    """The same draws give the same two views, to float32's rounding."""
    args = simclr.parse_args("--blur 1 0.5 --solarize 0 0.5".split())
    images, draws = simclr.draw_shapes(64, 1)[0], torch.rand(2, simclr.DRAWS, 64, 1, 1, 1)
    for i in (0, 1):
        ours = simclr.augment(images.cuda(), draws[i].cuda(), i, args).cpu()
        difference = (ours - simclr.augment(images, draws[i], i, args)).abs()
        # a crop's edge that rounds to the other side moves a whole image
        assert (difference.amax((1, 2, 3)) > 1e-3).sum() <= 1

@CPU_AND_GPU
def test_streamed_images_arrive_whole(device, image_folder):
    """Pinned memory and transfers that nothing waits for bring the images that the folder holds."""
    args = simclr.parse_args(["--data", str(image_folder), "--workers", "2"])
    folder, device = simclr.load_data(args)[1], torch.device(device)
    batches = [(1, part) for part in torch.arange(80).split(8)]
    found = torch.cat([batch.clone() for batch in simclr.fetch(folder, batches, device)])
    assert found.device.type == device.type
    assert torch.equal(found.cpu(), torch.stack([folder[1, i] for i in range(80)]))

@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@CPU_AND_GPU
def test_deterministic_runs_are_equal(device, precision, image_folder, monkeypatch):
    """Two runs bit for bit, the second one stopped and gone on with, fp16's scaler with it."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    flags = ("--data", image_folder, *TINY, "--device", device, "--precision", precision,
             "--image-size", "8", "--deterministic", "--out")
    try:
        train(simclr, *flags, "one")
        assert torch.are_deterministic_algorithms_enabled()
        train(simclr, *flags, "two", "--steps", "5")
        train(simclr, "--resume", "two")
    finally:
        torch.use_deterministic_algorithms(False)
    assert equal_weights("one", "two") and load("one")["scaler"] == load("two")["scaler"]
    one, two = ({k: v for k, v in records(name)[-1].items() if k != "seconds"}
                for name in ("one", "two"))
    assert bool(load("one")["scaler"]) == (precision == "fp16")
    assert bool(one.pop("peak_mib")) == bool(two.pop("peak_mib")) == (device == "cuda")
    assert one == two

@NEEDS_GPU
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("flags, then", [(["--compile"], []), ([], ["--compile"])])
def test_compilation_may_change_on_resume(method, flags, then, image_folder):
    """The weights have the same names with and without torch.compile; each reads the other's."""
    train(SCRIPTS[method], "--data", image_folder, *TINY, "--device", "cuda", "--out", "run",
          "--steps", "5", *flags)
    assert train(SCRIPTS[method], "--resume", "run", *then)["step"] == 12
    names = SCRIPTS[method].build_backbone("convnet", 16)[0].state_dict().keys()
    assert torch.load("run/backbone.pt", weights_only=True).keys() == names

@NEEDS_GPU
def test_synchronised_batchnorm(image_folder):
    """Two processes on the GPU train one's weights, running statistics included. NCCL refuses two
    on one GPU, so their group is gloo's."""
    Path("work.py").write_text(
        "import sys, torch, simclr\ntorch.backends.cudnn.allow_tf32 = False\n"
        "simclr.WORLD == 1 or torch.distributed.init_process_group('gloo')\n"
        "simclr.main(sys.argv[1:])\n")
    for n in ("1", "2"):
        subprocess.run([
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", n,
            "work.py", "--data", image_folder, *TINY, "--steps", "4", "--precision", "fp32",
            "--device", "cuda:0", "--out", n], check=True, timeout=300)
    for part in ("backbone", "head", "probe"):
        for name, value in load("1")[part].items():
            assert torch.allclose(load("2")[part][name], value, rtol=1e-2, atol=1e-4), (part, name)
