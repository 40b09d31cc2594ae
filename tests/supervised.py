"""Train the scripts' backbone with labels, on their data, augmentation and schedule: what a frozen
representation could reach at best, and what a re-encoding of the images costs.

python tests/supervised.py --data data/cifar10_jpeg --epochs 30 [simclr.py's other flags] > LOG

The defaults are simclr.py's but for the colours, which labels do not want changed. One JSON object
a line: the arguments, every epoch, the test accuracy in percent.
"""

import contextlib
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import simclr  # noqa: E402


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = simclr.parse_args(["--jitter-prob", "0", "--gray", "0", "--no-stream", *argv])
    device, dtype = simclr.choose_device(args)
    with contextlib.redirect_stdout(sys.stderr):
        data = simclr.load_data(args)
    print(json.dumps({"args": vars(args), **simclr.environment(device)}), flush=True)
    known = data.train_labels >= 0
    images, labels = data.train_images[known].to(device), data.train_labels[known].to(device)
    torch.manual_seed(args.seed)
    backbone, width = simclr.build_backbone(args.arch, images.shape[-1])
    model = torch.nn.Sequential(backbone, torch.nn.Linear(width, len(data.classes)))
    model = model.to(device, memory_format=torch.channels_last)
    lr = args.lr * args.batch_size / 256
    optimizer = torch.optim.SGD(model.parameters(), lr, args.momentum,
                                weight_decay=args.weight_decay)
    optimizer.param_groups[0]["peak_lr"] = lr
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    epoch_steps = len(images) // args.batch_size
    step, steps, start = 0, args.epochs * epoch_steps, time.time()
    view = torch.compile(simclr.augment) if device.type == "cuda" else simclr.augment
    if device.type == "cuda":
        model.compile()
    for epoch in range(args.epochs):
        losses = []
        order = torch.randperm(len(images), device=device)
        for index in order.split(args.batch_size)[:epoch_steps]:
            simclr.set_learning_rate(optimizer, step, steps, round(args.warmup * epoch_steps))
            draws = torch.rand(len(index), simclr.DRAWS, device=device)
            x = view(images[index], draws, 0, args).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), labels[index])
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.detach())
            step += 1
        print(json.dumps({"epoch": epoch + 1, "loss": torch.stack(losses).mean().item(),
                          "seconds": round(time.time() - start, 1)}), flush=True)
    features = simclr.extract_features(
        backbone, (part.to(device) for part in data.test_images.split(500)), len(data.test_images))
    with torch.no_grad():
        hits = model[1](features).argmax(1) == data.test_labels.to(device)
    accuracy = round(100 * hits.float().mean().item(), 2)
    print(json.dumps({"final": True, "accuracy": accuracy}), flush=True)
    return accuracy


if __name__ == "__main__":
    main()
