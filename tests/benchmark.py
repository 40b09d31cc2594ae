"""Print, side by side in one run on whatever device is there, what the scripts cost:

(a) the full training step against the bare forward and backward pass on a constant batch
(b) the augmentation against torchvision's, image by image, with all cores
(c) VICReg's loss against the official D x D form, in time and peak memory
(d) a streamed folder against a bare DataLoader that decodes and crops the same images

python tests/benchmark.py [--device cuda] [--arch resnet18] [--batch-size 512] [--parts abcd]
"""

import argparse
import ctypes
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torchvision
import torchvision.transforms.v2 as v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import simclr  # noqa: E402
import vicreg  # noqa: E402


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def time_in_turn(device, functions, rounds):
    """Seconds of each function, [median, least, most], taken in turn after one warm-up each."""
    for function in functions:
        function()
        function()
    seconds = [[] for _ in functions]
    for _ in range(rounds):
        for function, mine in zip(functions, seconds):
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            mine.append(time.perf_counter() - start)
    return [(statistics.median(s), min(s), max(s)) for s in seconds]


def peak_memory(device, function):
    """Bytes that function allocates at its peak, beyond what is there when it starts; None if the
    system does not tell."""
    function()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        synchronize(device)
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    except (OSError, AttributeError):
        return None
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def show(name, times, note=""):
    median, least, most = (1000 * t for t in times)
    print(f"  {name:44s} {median:9.2f} ms  ({least:.2f} to {most:.2f})  {note}", flush=True)


def full_step(script, device, args):
    """(a) Functions for the full step, the bare pass and the augmentation of a script's method."""
    flags = ["--arch", args.arch, "--batch-size", str(args.batch_size), "--device", str(device),
             "--precision", args.precision, *args.flags.get(script.METHOD, [])]
    run = script.parse_args(flags)
    _, dtype = script.choose_device(run)
    model = script.Model(run, 32, 10).to(device, memory_format=torch.channels_last)
    optimizer = script.build_optimizer(model, run)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    view = script.augment
    if device.type == "cuda":
        model.compile()
        view = torch.compile(script.augment)
    images, labels = (part.to(device) for part in script.draw_shapes(args.batch_size, 1))
    views = [images.float().div(255).contiguous(memory_format=torch.channels_last)] * 2

    def step():
        script.train_step(model, optimizer, scaler, view, images, labels, run, dtype)

    def bare():
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            z1, z2, _ = model(*views)
        (z1.float().sum() + z2.float().sum()).backward()

    def augment():
        draws = torch.rand(2, len(images), script.DRAWS, device=device)
        return [view(images, draws[i], i, run) for i in (0, 1)]

    return step, bare, augment


def part_a(device, args):
    print(f"(a) {args.arch}, 32 px, batches of {args.batch_size}, precision {args.precision}")
    epoch = 50_000 / args.batch_size
    for script in (simclr, vicreg):
        step, bare, augment = time_in_turn(device, full_step(script, device, args), args.rounds)
        show(f"{script.METHOD}: full step", step, f"{epoch * step[0]:.1f} s for 50,000 images")
        show(f"{script.METHOD}: bare passes", bare, f"step / bare {step[0] / bare[0]:.3f}")
        show(f"{script.METHOD}: augmentation", augment, f"of the step {augment[0] / step[0]:.3f}")


class TwoViews(torch.utils.data.Dataset):
    """The usual way: torchvision v2 transforms, one image at a time, in worker processes."""

    def __init__(self, images):
        self.images = images
        jitter = v2.ColorJitter(0.4, 0.4, 0.4, 0.1)
        self.transform = v2.Compose([
            v2.RandomResizedCrop(images.shape[-1], scale=(0.2, 1.0), antialias=True),
            v2.RandomHorizontalFlip(), v2.RandomApply([jitter], p=0.8), v2.RandomGrayscale(0.1),
            v2.ToDtype(torch.float32, scale=True)])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index]), self.transform(self.images[index])


def part_b(device, args):
    cores = os.cpu_count()
    print(f"(b) two views of each image on {device} against torchvision v2 in {cores} workers")
    for size, n in ((32, 512), (96, 256)):
        run = simclr.parse_args(["--data", "shapes"])
        images = simclr.draw_shapes(n, 1, size)[0].to(device)

        def ours():
            draws = torch.rand(2, n, simclr.DRAWS, device=device)
            for i in (0, 1):
                simclr.augment(images, draws[i], i, run)

        (seconds, _, _), = time_in_turn(device, [ours], args.rounds)
        mine = n / seconds
        batch, batches = 32, 20 * cores
        dataset = TwoViews(images.cpu().repeat(batch * 24 * cores // n + 1, 1, 1, 1))
        loader = iter(torch.utils.data.DataLoader(dataset, batch, num_workers=cores))
        for _ in range(3 * cores):  # the start, and what the workers have made ahead, do not count
            next(loader)
        start = time.perf_counter()
        for _ in range(batches):
            next(loader)
        theirs = batch * batches / (time.perf_counter() - start)
        print(f"  {size} px: ours {mine:,.0f} images/s, torchvision {theirs:,.0f} images/s, "
              f"ratio {mine / theirs:.1f}", flush=True)


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
    print("(c) VICReg's loss, forward and backward, float32: ours against the D x D form")
    for n in (256, 512):
        for dim in (512, 2048, 8192):
            z1, z2 = (torch.randn(n, dim, device=device, requires_grad=True) for _ in range(2))

            def ours():
                torch.autograd.grad(vicreg.vicreg_loss(z1, z2)[0], (z1, z2))

            def theirs():
                torch.autograd.grad(official_loss(z1, z2), (z1, z2))

            rounds = args.rounds if device.type == "cuda" else 3
            (mine, _, _), (other, _, _) = time_in_turn(device, [ours, theirs], rounds)
            memory = [peak_memory(device, f) for f in (ours, theirs)]
            used = "memory unknown" if None in memory else (
                f"peak {memory[0] / 2**20:7.1f} and {memory[1] / 2**20:7.1f} MiB")
            print(f"  N {n}  D {dim:5d}  {1000 * mine:8.2f} and {1000 * other:8.2f} ms  "
                  f"ratio {other / mine:6.1f}  {used}", flush=True)


class BareCrops(torch.utils.data.Dataset):
    """The usual way to stream: torchvision opens an image and crops it twice, in worker processes.
    """

    def __init__(self, paths):
        self.paths, self.crop = paths, v2.RandomResizedCrop(224, scale=(0.2, 1.0), antialias=True)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        image = torchvision.datasets.folder.default_loader(self.paths[index])
        image = v2.functional.pil_to_tensor(image)
        return torch.stack([self.crop(image), self.crop(image)])


def part_d(device, args):
    cores, n, batch = os.cpu_count(), 3200, 64
    print(f"(d) streaming JPEGs of 500 x 375 px, two crops of 224 px each, {cores} workers")
    with tempfile.TemporaryDirectory() as folder:
        generator, paths = torch.Generator().manual_seed(0), []
        for i in range(100):
            coarse = torch.rand(1, 3, 24, 32, generator=generator)
            x = torch.nn.functional.interpolate(coarse, (375, 500), mode="bicubic")[0]
            x = (x + 0.05 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
            paths.append(f"{folder}/{i}.jpg")
            v2.functional.to_pil_image((255 * x).byte()).save(paths[-1], quality=90)
        paths = paths * (n // len(paths))
        run = simclr.parse_args(["--data", "shapes", "--batch-size", str(batch)])
        streamed = simclr.Folder(paths, 224, 1.0, run)

        def ours():
            return (x for x, _ in simclr.fetch(
                streamed, simclr.schedule(streamed, run, 0, n // batch), device))

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
                start, count = time.perf_counter(), 0
                for x in batches:
                    count += len(x)
                mine.append(count / (time.perf_counter() - start))
        mine, theirs = map(statistics.median, speeds)
        print(f"  ours {mine:,.0f} images/s {[round(s) for s in speeds[0]]}, bare DataLoader "
              f"{theirs:,.0f} images/s {[round(s) for s in speeds[1]]}, ratio {mine / theirs:.2f}",
              flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--arch", help="default: resnet18 on a GPU, convnet on a CPU")
    parser.add_argument("--batch-size", type=int, help="default: 512 on a GPU, 256 on a CPU")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp16", "fp32"))
    parser.add_argument("--rounds", type=int, help="timed rounds; default: 50 on a GPU, 5 on a CPU")
    parser.add_argument("--dim", type=int, default=2048, help="VICReg's D in (a)")
    parser.add_argument("--parts", default="abcd", help="which of a, b, c, d to run")
    args = parser.parse_args()
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    args.arch = args.arch or ("resnet18" if gpu else "convnet")
    args.batch_size = args.batch_size or (512 if gpu else 256)
    args.rounds = args.rounds or (50 if gpu else 5)
    args.flags = {"vicreg": ["--dim", str(args.dim)]}
    where = torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU"
    print(f"{where}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}, torchvision {torchvision.__version__}", flush=True)
    for part, function in (("a", part_a), ("b", part_b), ("c", part_c), ("d", part_d)):
        if part in args.parts:
            function(device, args)


if __name__ == "__main__":
    main()
