"""Print, side by side in one run on whatever device is there, what the scripts cost:

(a) the full training step against the bare forward and backward pass on a constant batch
(b) the augmentation against torchvision's, image by image on all cores
(c) VICReg's loss against the official D x D form, in time and peak memory
(d) a streamed folder against a bare DataLoader that decodes and crops the same images
(e) analyze.py's measures of 50,000 embeddings of 8192 dimensions: a quarter of an hour on two
    cores, so only where --parts names it
(f) the memory of the README's ImageNet recipes, counted without a GPU; only where named, too

python tests/benchmark.py [--device cuda] [--arch resnet18] [--batch-size 512 1024] [--parts abcd]
"""

import argparse
import importlib
import os
import platform
import re
import resource
import statistics
import sys
import tempfile
import time
import weakref
from pathlib import Path

import torch
import torchvision
import torchvision.transforms.v2 as v2
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import analyze  # noqa: E402
import simclr  # noqa: E402
import vicreg  # noqa: E402

def time_in_turn(device, functions, rounds):
    """Median seconds of each function, taken in turn after two warm-ups each."""
    wait = torch.cuda.synchronize if device.type == "cuda" else int
    for function in functions * 2:
        function()
    seconds = [[] for _ in functions]
    for _ in range(rounds):
        for function, mine in zip(functions, seconds):
            wait()
            start = time.perf_counter()
            function()
            wait()
            mine.append(time.perf_counter() - start)
    return [statistics.median(s) for s in seconds]

def peak_memory(device, function):
    """MiB that function allocates at its peak; on a CPU its tensors' alone."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with Allocated() as allocated:
        function()
    return allocated.peak / 2**20

class Allocated(TorchDispatchMode):
    """Bytes of the tensors made under it, now and at their peak."""
    now = peak = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **kwargs or {})
        for new, tree in ((False, (args, kwargs)), (True, output)):
            for x in filter(torch.is_tensor, torch.utils._pytree.tree_leaves(tree)):
                storage = x.untyped_storage()
                if not hasattr(storage, "counted"):
                    storage.counted, size = True, new * storage.nbytes()
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.free, size)
        return output
    def free(self, size):
        self.now -= size

def table(*columns):
    """Begin a Markdown table; row() goes on with it: what is printed can stand in the README."""
    print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|", flush=True)

def row(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)

class Steps:
    """One script's method ready to train: its full step, its bare passes, its augmentation."""
    def __init__(self, command, batch_size, device, args):
        torch._dynamo.reset()  # compiled for these shapes, as in training
        name, *flags = command.split()
        script = self.script = importlib.import_module(name.removesuffix(".py"))
        run = self.run = script.parse_args([
            "--arch", args.arch, "--batch-size", str(batch_size), "--device", str(device),
            "--precision", args.precision, *flags])
        _, self.dtype = script.choose_device(run)
        torch.manual_seed(0)
        self.model = script.Model(run, 32, 10).to(device, memory_format=torch.channels_last)
        self.optimizer = script.build_optimizer(
            self.model, run, fused=device.type == "cuda" and self.dtype != torch.float16)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.view, self.loss = script.augment, script.loss_fn
        if args.compile:
            self.model.compile()
            self.view, self.loss = torch.compile(script.augment), torch.compile(script.loss_fn)
        self.images, self.labels = (part.to(device) for part in script.draw_shapes(batch_size, 1))
        x = self.images.float().div(255).contiguous(memory_format=torch.channels_last)
        self.views = [x.to(self.dtype), x.flip(3).to(self.dtype)]  # two: one would be passed once
    def draws(self):
        return torch.rand(2, self.script.DRAWS, len(self.images), 1, 1, 1, pin_memory=
                          self.images.is_cuda).to(self.images.device, non_blocking=True)
    def step(self):
        return self.script.train_step(
            self.model, self.optimizer, self.scaler, self.view, self.loss, self.images,
            self.labels, self.draws(), self.run, self.dtype)
    def bare(self):
        self.model.zero_grad(set_to_none=True)
        device = self.images.device.type
        with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
            z1, z2, _ = self.model(*self.views)
        (z1.float().sum() + z2.float().sum()).backward()
    def augment(self):
        draws = self.draws()
        return [self.view(self.images, draws[i], i, self.run, self.dtype) for i in (0, 1)]

def part_a(device, args):
    print("\n(a) An epoch is of 50,000 images, steps alone.")
    table("script", "batch", "ms a step", "ms bare passes", "step / bare", "augmentation / step",
          "s an epoch", "MiB a step allocates")
    for batch in args.batch_size:
        for command in ("simclr.py", "vicreg.py --dim 2048", "directclr.py",
                        "interpolate.py --dim 2048"):
            steps = Steps(command, batch, device, args)
            full, bare, augment = time_in_turn(
                device, [steps.step, steps.bare, steps.augment], args.rounds)
            row(f"`{command}`", batch, f"{1000 * full:.1f}",
                f"{1000 * bare:.1f}", f"{full / bare:.2f}", f"{augment / full:.2f}",
                f"{50_000 / batch * full:.1f}", f"{peak_memory(device, steps.step):,.0f}")

class TwoViews(torch.utils.data.Dataset):
    """The usual way: torchvision v2 transforms, one image at a time, in worker processes."""
    def __init__(self, images):
        self.images = images
        self.transform = v2.Compose([
            v2.RandomResizedCrop(images.shape[-1], scale=(0.2, 1.0), antialias=True),
            v2.RandomHorizontalFlip(), v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.1), v2.ToDtype(torch.float32, scale=True)])
    def __len__(self):
        return len(self.images)
    def __getitem__(self, index):
        return self.transform(self.images[index]), self.transform(self.images[index])

def part_b(device, args):
    cores, batch = os.cpu_count(), args.batch_size[0]
    print(f"\n(b) Two views of each image on {device}, against torchvision v2 in a DataLoader of "
          f"{cores} workers.")
    table("px", "images/s, ours", "images/s, torchvision", "ratio")
    for size in (32, 96):
        steps = Steps("simclr.py", batch, device, args)
        steps.images = simclr.draw_shapes(batch, 1, size)[0].to(device)
        mine = batch / time_in_turn(device, [steps.augment], args.rounds)[0]
        images = steps.images.cpu().repeat(32 * 24 * cores // batch + 1, 1, 1, 1)
        loader = iter(torch.utils.data.DataLoader(TwoViews(images), 32, num_workers=cores))
        for _ in range(4 * cores):  # those that were made ahead do not count
            next(loader)
        start, count = time.perf_counter(), sum(len(view) for view, _ in loader)
        other = count / (time.perf_counter() - start)
        row(size, f"{mine:,.0f}", f"{other:,.0f}", f"{mine / other:.1f}")

def official_covariance(z):
    """c(z) as VICReg's official code computes it: through the D x D covariance matrix."""
    n, dim = z.shape
    z = z - z.mean(dim=0)
    cov = (z.T @ z) / (n - 1)
    off_diagonal = cov.flatten()[:-1].view(dim - 1, dim + 1)[:, 1:].flatten()
    return off_diagonal.pow_(2).sum().div(dim)

def official_loss(z1, z2):
    """VICReg's loss with the D x D form: all else as in vicreg.py."""
    std = (vicreg.variance(z1) + vicreg.variance(z2)) / 2
    cov = official_covariance(z1) + official_covariance(z2)
    return 25 * torch.nn.functional.mse_loss(z1, z2) + 25 * std + cov

def part_c(device, args):
    print("\n(c) VICReg's loss, forward and backward, float32: ours against the D x D form.")
    table("N", "D", "ms, ours", "ms, D x D", "ratio", "peak MiB, ours", "peak MiB, D x D")
    for n in (256, 512):
        for dim in (512, 2048, 8192):
            z1, z2 = (torch.randn(n, dim, device=device, requires_grad=True) for _ in range(2))
            def ours():
                torch.autograd.grad(vicreg.vicreg_loss(z1, z2)[0], (z1, z2))
            def theirs():
                torch.autograd.grad(official_loss(z1, z2), (z1, z2))
            rounds = args.rounds if device.type == "cuda" else 3
            mine, other = time_in_turn(device, [ours, theirs], rounds)
            memory = [f"{peak_memory(device, f):,.0f}" for f in (ours, theirs)]
            row(n, dim, f"{1000 * mine:.1f}", f"{1000 * other:.1f}", f"{other / mine:.1f}", *memory)

class BareCrops(torch.utils.data.Dataset):
    """The usual way to stream: torchvision opens an image and crops it twice, in workers."""
    def __init__(self, paths):
        self.paths, self.crop = paths, v2.RandomResizedCrop(224, scale=(0.2, 1.0), antialias=True)
    def __len__(self):
        return len(self.paths)
    def __getitem__(self, index):
        image = torchvision.datasets.folder.default_loader(self.paths[index])
        image = v2.functional.pil_to_tensor(image)
        return torch.stack([self.crop(image), self.crop(image)])

def part_d(device, args):
    cores, batch = min(16, os.cpu_count()), 64  # simclr.py's --workers
    n = batch * (4 * cores + 41)
    print(f"\n(d) Streaming JPEGs of 500 x 375 px, two crops of 224 px each, {cores} workers.")
    with tempfile.TemporaryDirectory() as folder:
        generator, paths = torch.Generator().manual_seed(0), []
        for i in range(100):
            coarse = torch.rand(1, 3, 24, 32, generator=generator)
            x = torch.nn.functional.interpolate(coarse, (375, 500), mode="bicubic")[0]
            x = (x + 0.05 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
            paths.append(f"{folder}/{i}.jpg")
            v2.functional.to_pil_image((255 * x).byte()).save(paths[-1], quality=90)
        paths = (paths * n)[:n]
        run = simclr.parse_args(["--data", "shapes", "--batch-size", str(batch)])
        streamed = simclr.Folder([os.fsencode(path) for path in paths], 224, run)
        def ours():
            return simclr.fetch(streamed, simclr.plan(
                n, run, range(n // batch), torch.device("cpu")), device)
        def bare():
            return iter(torch.utils.data.DataLoader(
                BareCrops(paths), batch, shuffle=True, num_workers=cores,
                pin_memory=device.type == "cuda"))
        speeds = [[], []]
        for _ in range(5):
            for make, mine in zip((ours, bare), speeds):
                batches = make()
                for _ in range(4 * cores + 1):  # the workers' start does not count
                    next(batches)
                start, count = time.perf_counter(), sum(len(x) for x in batches)
                mine.append(count / (time.perf_counter() - start))
        table("", "images/s", "rounds")
        for name, rounds in zip(("ours", "bare DataLoader"), speeds):
            row(name, f"{statistics.median(rounds):,.0f}", ", ".join(f"{r:,.0f}" for r in rounds))

def part_e(device, args):
    z, generator = torch.empty(50_000, 8192), torch.Generator().manual_seed(0)
    scales = torch.exp(-torch.linspace(0, 8, 8192))  # a spectrum that falls, as of trained networks
    for part in z.split(1000):
        part.copy_(torch.randn(part.shape, generator=generator) * scales)
    print("\n(e) 50,000 embeddings of 8192 dimensions, on the CPU.")
    table("function", "s", "peak GiB of the whole process")
    for function in (analyze.effective_rank, analyze.spectrum, analyze.duality):
        start = time.perf_counter()
        function(z)
        row(f"`{function.__name__}`", f"{time.perf_counter() - start:.0f}",
            f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f}")

def part_f(device, args):
    print("\n(f) Tensors of two training steps, ResNet-50, 224 px, bf16, one GPU of eight, counted "
          "on tensors without data; the allocator's,\ncuDNN's and NCCL's own come on top.")
    table("recipe", "GiB at the peak")
    text = (Path(__file__).parent.parent / "README.md").read_text()
    flags = re.search('IMAGENET="(.*)"', text)[1].split()
    for name, own in re.findall(r"`torchrun --nproc-per-node 8 (\w+)\.py \$IMAGENET (.*?)`", text):
        script = importlib.import_module(name)
        run = script.parse_args([*flags, *own.split()])
        n = run.batch_size // 8
        script.gather = lambda x: torch.cat([x, *(torch.empty_like(x) for _ in range(7))])
        with FakeTensorMode(), Allocated() as allocated:
            model = script.Model(run, 224, 1000)
            optimizer, scaler = script.build_optimizer(model, run), torch.amp.GradScaler(enabled=False)
            for _ in range(2):
                script.train_step(
                    model, optimizer, scaler, script.augment, script.loss_fn,
                    torch.zeros(n, 2, 3, 224, 224, dtype=torch.uint8), torch.zeros(n).long(),
                    torch.rand(2, script.DRAWS, n, 1, 1, 1), run, torch.bfloat16)
        row(f"`{name}.py {own}`", f"{allocated.peak / 2**30:.1f}")
        importlib.reload(script)

PARTS = {"f": part_f, "a": part_a, "b": part_b, "c": part_c, "d": part_d, "e": part_e}

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--arch", help="default: resnet18 on a GPU, convnet on a CPU")
    parser.add_argument("--batch-size", type=int, nargs="+",
                        help="default: 512 1024 on a GPU, 256 on a CPU; parts but (a): the first")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp16", "fp32"))
    parser.add_argument("--compile", action="store_true", help="network, views and loss")
    parser.add_argument("--parts", default="abcd", help="which of a to f to run")
    args = parser.parse_args()
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    args.arch = args.arch or ("resnet18" if gpu else "convnet")
    args.batch_size = args.batch_size or ([512, 1024] if gpu else [256])
    args.rounds = 50 if gpu else 15
    where = torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU"
    print(f"{where}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}, torchvision {torchvision.__version__}\n{args.arch}, 32 px, "
          f"precision {args.precision}; median of {args.rounds} rounds in turn\n"
          f"python {' '.join(sys.argv)}")
    for name in args.parts:
        PARTS[name](device, args)

if __name__ == "__main__":
    main()
