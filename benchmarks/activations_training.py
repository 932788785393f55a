"""Activations trained from scratch on CIFAR-10: a small ResNet, one schedule, several seeds.

    python benchmarks/activations_training.py --data cifar10-jpeg.tar.gz
    python benchmarks/activations_training.py --data ... --methods relu fles --seeds 0 1 2

Every activation takes the place of every ReLU of the same network, at the activation's own start
("identity": FleS that starts as ReLU), and gets the same images, epochs, batches, augmentation and
learning rate. Parameters and MACs stand beside the accuracy, because FleS brings some of its own.
Rows that are in the result file already are not measured again.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _measure import arguments, console, environment, output_path, report, write
from quality_data import Images, Splits, batches, load, normalised, synthetic
from quality_networks import CifarResNet
from torch import nn

import swan_surgery as swan


# name -> (activation, start)
METHODS = {
    "relu": ("", ""),
    "silu": ("silu", "fresh"),
    "starrelu": ("starrelu", "fresh"),
    "acon-c": ("acon-c", "fresh"),
    "fles": ("fles", "fresh"),
    "fles-dg": ("fles-dg", "fresh"),
    "fles-pn": ("fles-pn", "fresh"),
    "fles-from-relu": ("fles", "identity"),
}


def build(method: str, depth: int) -> nn.Module:
    """The network with one activation everywhere."""
    model: nn.Module = CifarResNet(depth)
    activation, start = METHODS[method]
    if activation:
        model = swan.swap_activations(model, activation, torch.randn(2, 3, 32, 32), start=start)
    return model


def of_size(images: Images, size: int) -> Images:
    """Smaller images, each pixel the mean of those it covers."""
    x = F.adaptive_avg_pool2d(images.x.float(), size)
    return Images(x.round().to(torch.uint8), images.y)


def train(model: nn.Module, splits: Splits, options: argparse.Namespace, seed: int) -> None:
    """SGD with Nesterov momentum, one cosine, a tenth of the steps to warm up."""
    generator = torch.Generator().manual_seed(1000 + seed)
    steps = options.epochs * (len(splits.train) // options.batch)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=options.lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    model.train()
    step = 0
    for _ in range(options.epochs):
        for x, y in batches(splits.train, options.batch, generator):
            share = min(1.0, (step + 1) / (0.1 * steps))
            for group in optimizer.param_groups:
                group["lr"] = options.lr * share * 0.5 * (1 + math.cos(math.pi * step / steps))
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Test accuracy in %."""
    model.eval()
    hits = 0
    for start in range(0, len(images), 500):
        x, y = images.x[start : start + 500], images.y[start : start + 500]
        hits += int((model(normalised(x)).argmax(1) == y).sum())
    return 100 * hits / len(images)


def measure(method: str, seed: int, splits: Splits, options: argparse.Namespace) -> dict[str, Any]:
    """One training."""
    torch.manual_seed(seed)
    model = build(method, options.depth)
    started, cpu = time.perf_counter(), time.process_time()
    train(model, splits, options, seed)
    return {
        "method": method,
        "seed": seed,
        "test": accuracy(model, splits.test),
        "validation": accuracy(model, splits.validation),
        "train": accuracy(model, Images(splits.train.x[:2000], splits.train.y[:2000])),
        "params": swan.count_params(model),
        "macs": swan.count_macs(model.eval(), torch.zeros(1, 3, options.size, options.size)),
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, help="CIFAR-10 as a folder or tar archive of images")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--size", type=int, default=16, help="of the images, at most 32")
    parser.add_argument("--lr", type=float, default=0.1)
    options = parser.parse_args()
    if options.smoke:
        options.epochs, options.images, options.batch = 1, 64, 32
        options.seeds, options.methods = [0], ["relu", "fles"]
    if options.data is None and not options.smoke:
        raise SystemExit("--data FILE: where the images are (see quality.py)")
    torch.set_num_threads(1)
    out = output_path("activations_training", options)
    rows: list[dict[str, Any]] = []
    if out is not None and out.exists():
        rows = json.loads(out.read_text())["rows"]
    schedule = {
        k: getattr(options, k) for k in ("depth", "epochs", "images", "batch", "size", "lr")
    }
    splits = load(options.data, options.images) if options.data else synthetic(options.images)
    splits = Splits(
        *(of_size(own, options.size) for own in (splits.train, splits.validation, splits.test))
    )
    screen = console()
    for seed in options.seeds:
        for method in options.methods:
            if any((r["method"], r["seed"]) == (method, seed) for r in rows):
                continue
            row = measure(method, seed, splits, options)
            rows.append({**row, **schedule})
            screen.print(f"{method:16} seed {seed}: {row['test']:.2f} % ({row['cpu_seconds']} s)")
            result = {"theme": "activations_training", "environment": environment(), "rows": rows}
            write(out, result)
    report(out, screen)


if __name__ == "__main__":
    main()
