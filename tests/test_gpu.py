"""What a GPU does otherwise than a CPU. Tests run on both where that tells something."""

import functools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import simclr
import torch
from interpolate import PATH
from tables import HEADS
from test_runs import METHODS, SCRIPTS, TINY, equal_weights, load, records, refused, train

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CPU_AND_GPU = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])

@pytest.mark.parametrize("level, dtype", [
    ((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16)])
def test_precision_by_the_gpus_level(level, dtype, monkeypatch):
    """And the process's own GPU, unless another is named; GPUs are pretended."""
    script, zeros, chosen = SCRIPTS["directclr"], torch.zeros(1), []
    monkeypatch.setattr(script, "LOCAL_RANK", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: level)
    monkeypatch.setattr(torch, "zeros", lambda size, device: zeros)
    for flags, expected in (("", (1, dtype)), ("--precision bf16", (1, torch.bfloat16)),
                            ("--device cuda:0 --precision fp32", (0, torch.float32))):
        device, found = script.choose_device(script.parse_args(flags.split()))
        assert (device.index, found) == expected and chosen[-1] == device

@pytest.mark.parametrize("device, backend", [("cuda", "nccl"), ("cpu", "gloo")])
def test_process_group_serves_both_devices(device, backend, monkeypatch, capsys):
    """agree()'s number is on the CPU, gather()'s embeddings on the device."""
    monkeypatch.setattr(simclr, "WORLD", 2)
    monkeypatch.setattr(simclr, "choose_device", lambda args: (torch.device(device), torch.float32))
    monkeypatch.setattr(simclr.dist, "init_process_group", simclr.fail)
    asked = refused(capsys, simclr).split()[-1]
    backends = torch.distributed.BackendConfig(torch.distributed.Backend(asked))
    assert backends.get_device_backend_map().items() >= {"cpu": "gloo", device: backend}.items()

@pytest.mark.parametrize("total, dtype", [(2**33, torch.float16), (2**30, torch.bfloat16)])
def test_what_a_gpu_is_given(total, dtype, monkeypatch, capsys):
    """Images, if it has four times their size, in use or not; fused SGD, but not with fp16."""
    moved = []
    monkeypatch.setattr(simclr, "choose_device", lambda args: (torch.device("cuda"), dtype))
    monkeypatch.setattr(simclr, "load_data", lambda args: ([], *[torch.zeros(600)] * 4))
    monkeypatch.setattr(torch.Tensor, "nbytes", 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, total))
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device: moved.append(device) or x)
    monkeypatch.setattr(simclr, "Model", lambda *args: SimpleNamespace(to=lambda *a, **k: None))
    monkeypatch.setattr(simclr, "build_optimizer", lambda model, args, fused: simclr.fail(fused))
    assert refused(capsys, simclr).split()[-1] == str(dtype != torch.float16)
    assert len(moved) == 4 * (total > 2**32)

def make_step(device, *flags, method="simclr", n=16):
    """A function that makes one update, as train() does, and the model."""
    script = SCRIPTS[method]
    args = script.parse_args(["--data", "shapes", "--device", device, *flags])
    _, dtype = script.choose_device(args)
    model = script.Model(args, 32, 10).to(device, memory_format=torch.channels_last)
    optimizer = script.build_optimizer(model, args, fused=device == "cuda")
    batch = *script.draw_shapes(n, 1), torch.rand(2, script.DRAWS, n, 1, 1, 1)
    return functools.partial(
        script.train_step, model, optimizer, torch.amp.GradScaler(enabled=False), script.augment,
        script.loss_fn, *(x.to(device) for x in batch), args, dtype), model

@NEEDS_GPU
@pytest.mark.parametrize("choice", [
    "simclr --optimizer lars", "simclr --head expander", "vicreg",
    *(f"directclr --head {head}" for head in HEADS),
    *(f"interpolate --method {method}" for method in PATH)])
def test_a_step_does_not_wait_for_the_gpu(choice, request):
    """No synchronisation in augmentation, network, loss and optimiser."""
    method, *flags = f"{choice} --precision bf16 --blur .5 .5 --solarize 0 .5".split()
    step, _ = make_step("cuda", *flags, method=method)
    step()
    request.addfinalizer(lambda: torch.cuda.set_sync_debug_mode("default"))
    torch.cuda.set_sync_debug_mode("error")
    step()

@CPU_AND_GPU
@pytest.mark.parametrize("arch", ["convnet", "resnet18", "resnet50"])
def test_channels_last_reaches_every_layer(arch, device):
    """Inputs, outputs, weights and gradients of every convolution have the format."""
    step, model = make_step(device, "--arch", arch, "--precision", "bf16", n=4)
    outputs = []
    for module in (m for m in model.modules() if isinstance(m, torch.nn.Conv2d)):
        module.register_forward_hook(lambda module, x, output: outputs.extend((*x, output)))
    assert step()["loss"].isfinite() and len(outputs) >= 20
    weights = [p for p in model.parameters() if p.ndim == 4]
    assert all(x.is_contiguous(memory_format=torch.channels_last)
               for x in (*outputs, *weights, *(w.grad for w in weights)))

@NEEDS_GPU
def test_views_on_the_gpu_are_the_cpus():
    """To float32's rounding, which may move a crop's edge by a pixel."""
    args = simclr.parse_args("--blur 1 0.5 --solarize 0 0.5".split())
    images, draws = simclr.draw_shapes(64, 1)[0], torch.rand(2, simclr.DRAWS, 64, 1, 1, 1)
    for i in (0, 1):
        ours = simclr.augment(images.cuda(), draws[i].cuda(), i, args).cpu()
        difference = (ours - simclr.augment(images, draws[i], i, args)).abs()
        assert (difference.amax((1, 2, 3)) > 1e-3).sum() <= 1

@CPU_AND_GPU
def test_streamed_images_arrive_whole(device, image_folder):
    """Through pinned memory and transfers that nothing waits for."""
    args = simclr.parse_args(["--data", str(image_folder), "--workers", "2"])
    folder, device = simclr.load_data(args)[1], torch.device(device)
    batches = [(1, part) for part in torch.arange(80).split(8)]
    found = torch.cat([*simclr.fetch(folder, batches, device)])
    assert found.device.type == device.type
    assert torch.equal(found.cpu(), torch.stack([folder[1, i] for i in range(80)]))

@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@CPU_AND_GPU
def test_deterministic_runs_are_equal(device, precision, image_folder, monkeypatch, request):
    """Two runs bit for bit, the second one stopped and gone on with, fp16's scaler with it."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    flags = ("--data", image_folder, *TINY, "--device", device, "--precision", precision,
             "--image-size", "8", "--deterministic", "--out")
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    train(simclr, *flags, "one")
    assert torch.are_deterministic_algorithms_enabled()
    train(simclr, *flags, "two", "--steps", "5")
    train(simclr, "--resume", "two")
    assert equal_weights("one", "two") and load("one")["scaler"] == load("two")["scaler"]
    assert bool(load("one")["scaler"]) == (precision == "fp16")
    one, two = (records(name)[-1] for name in ("one", "two"))
    assert all(one[k] == two[k] for k in ("knn", "linear", "online", "rank"))

@NEEDS_GPU
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("flags, then", [(["--compile"], []), ([], ["--compile"])])
def test_compilation_may_change_on_resume(method, flags, then, image_folder):
    """The weights have the same names with and without torch.compile; each reads the other's."""
    train(SCRIPTS[method], "--data", image_folder, *TINY, "--device", "cuda", "--out", "run",
          "--steps", "5", *flags)
    assert train(SCRIPTS[method], "--resume", "run", *then)["step"] == 12
    SCRIPTS[method].build_backbone("convnet", 16)[0].load_state_dict(torch.load("run/backbone.pt"))

@NEEDS_GPU
def test_synchronised_batchnorm(image_folder):
    """Two processes on the GPU train one's weights; NCCL refuses two on one GPU, gloo does not."""
    Path("work.py").write_text("""import sys, torch, simclr
torch.backends.cudnn.allow_tf32 = False
simclr.WORLD == 1 or torch.distributed.init_process_group('gloo')
simclr.main(sys.argv[1:])""")
    for n in ("1", "2"):
        subprocess.run([
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", n,
            "work.py", "--data", image_folder, *TINY, "--steps", "4", "--precision", "fp32",
            "--device", "cuda:0", "--out", n], check=True, timeout=300)
    one, two = load("1"), load("2")
    for part in ("backbone", "head", "probe"):
        torch.testing.assert_close(dict(two[part]), dict(one[part]), rtol=1e-2, atol=1e-4)
