"""Gated compression: a digit of interest against the rest, on scikit-learn's digits and on MNIST.

    python benchmarks/gated_compression.py
    python benchmarks/gated_compression.py --data MNIST/raw   # the four *-ubyte.gz files, too

A small network learns whether an image shows the digit. A switch (`light=None`) behind its first or second
convolution then ends inputs that do not: "switch" trains it alone, on the network as it is; "jointly" goes on training
all of it with the network's own loss (Li et al., 2023). Thresholds are set on held-out images, so that with 90 %
confidence at most 1 % of all inputs are of the digit and end; all else is of the test images.
"""

import argparse
import copy
import gzip
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _measure import arguments, console, environment, output_path, report, write
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.experiments.digits.data import load_digits


HARM, SIZE = 0.01, 64
AFTER = {"first": "2", "second": "5"}
REST = torch.tensor([1.0, 0.0])  # the output of an input that ends: not the digit


@dataclass(frozen=True)
class Data:
    """Images [N, 1, H, W] and digits: to train, to set thresholds, to report."""

    train: tuple[Tensor, Tensor]
    held: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def small_digits() -> Data:
    """1,797 images of 8x8."""
    own = load_digits()
    return Data(*((part.x, part.y) for part in (own.train, own.validation, own.test)))


def mnist(folder: Path, train: int = 20_000, held: int = 10_000) -> Data:
    """40,000 of the 70,000 images of 28x28: all that are there to test."""

    def read(name: str, start: int) -> Tensor:
        with gzip.open(folder / f"{name}-ubyte.gz") as file:
            return torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=start).copy())

    parts = []
    for name in ("train", "t10k"):
        x = read(f"{name}-images-idx3", 16).reshape(-1, 1, 28, 28).float() / 255
        parts.append((x, read(f"{name}-labels-idx1", 8).long()))
    (x, y), test = parts
    return Data((x[:train], y[:train]), (x[-held:], y[-held:]), test)


def network(side: int) -> nn.Sequential:
    """Three convolutions; a large image is halved by the first."""
    layers: list[nn.Module] = []
    for before, width, stride in ((1, 8, 1 + (side > 8)), (8, 16, 2), (16, 32, 1)):
        layers += [
            nn.Conv2d(before, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2))


def train(loss: Any, parameters: Any, data: Data, digit: int, *, epochs: int, seed: int) -> None:
    """Adam with a cosine; a digit of interest is one class, all others are the other."""
    generator = torch.Generator().manual_seed(seed)
    x, y = data.train
    steps = epochs * (len(x) // SIZE)
    optimizer = torch.optim.AdamW(parameters, 3e-3, weight_decay=1e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(SIZE)[: len(x) // SIZE]:
            optimizer.zero_grad()
            loss((x[rows], (y[rows] == digit).long())).backward()
            optimizer.step()
            decay.step()


def predicted(model: nn.Module, x: Tensor) -> Tensor:
    """The class of each image."""
    with torch.no_grad():
        return torch.cat([model.eval()(part).argmax(1) for part in x.split(500)])


def quality(found: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy over all images, and over those of the digit, in percent."""
    right = (found == labels).double()
    return {"test": 100 * float(right.mean()), "recall": 100 * float(right[labels == 1].mean())}


def plain_loss(model: nn.Module) -> Any:
    """Cross entropy."""
    return lambda batch: F.cross_entropy(model(batch[0]), batch[1])


def routed_network(
    plain: nn.Module, data: Data, after: str, *, digit: int, how: str, options: Any, seed: int
) -> swan.RoutedModel:
    """The network with a switch that ends what is not the digit, and its threshold."""
    torch.manual_seed(seed)
    routed = swan.add_switch(
        plain,
        AFTER[after],
        example_inputs=data.train[0][:2],
        light=None,
        default=REST,
        positive=lambda labels: labels == 1,
        frozen=how == "switch",
    ).train()

    def loss(batch: Any) -> Tensor:
        if how == "switch":
            return routed.loss(batch)
        return routed.loss(batch, task=lambda out, own: F.cross_entropy(out, own[1]))

    own = [p for p in routed.parameters() if p.requires_grad]
    train(loss, own, data, digit, epochs=options.epochs, seed=seed)
    x, y = data.held
    labels = (y == digit).long()
    held = list(zip(x.split(500), labels.split(500), strict=True))
    swan.calibrate_switch(routed.eval(), held, harm=options.harm)
    return routed


def measured(
    routed: swan.RoutedModel, plain: nn.Module, x: Tensor, labels: Tensor
) -> dict[str, Any]:
    """Who ends, and what that costs and saves."""
    with torch.no_grad():
        score = torch.cat([routed.parts.switch(routed.parts.trunk(part)) for part in x.split(500)])
    ended = score <= routed.thresholds[0]
    share = float(ended.double().mean())
    one = float(swan.expected_macs(routed, [share])) / len(routed.example_inputs.args[0])
    return quality(predicted(routed, x), labels) | {
        "negatives_stopped": 100 * float(ended[labels == 0].double().mean()),
        "positives_stopped": 100 * float(ended[labels == 1].double().mean()),
        "harm": 100 * float((ended & (labels == 1)).double().mean()),
        "bound": 100 * routed.certificate.bound,
        "macs": one / swan.count_macs(plain, x[:1]),
    }


def one_seed(data: Data, digit: int, seed: int, options: Any) -> dict[str, Any]:
    """The plain network, trained for twice the epochs of each stage, and the rows with a switch."""
    x, y = data.test
    labels = (y == digit).long()
    torch.manual_seed(seed)
    base = network(x.shape[-1])
    train(
        plain_loss(base.train()), base.parameters(), data, digit, epochs=options.epochs, seed=seed
    )
    longer = copy.deepcopy(base).train()
    train(
        plain_loss(longer), longer.parameters(), data, digit, epochs=options.epochs, seed=seed + 500
    )
    found: dict[str, Any] = {
        "plain": quality(predicted(base, x), labels) | {"macs": 1.0},
        "plain, trained on": quality(predicted(longer, x), labels) | {"macs": 1.0},
    }
    for how in ("switch", "jointly"):
        for after in AFTER:
            started = time.process_time()
            routed = routed_network(
                base, data, after, digit=digit, how=how, options=options, seed=seed + 500
            )
            found[f"{how}, {after}"] = measured(routed, base, x, labels) | {
                "seconds": time.process_time() - started
            }
    return found


def parse() -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--data", type=Path, help="folder with MNIST's four *-ubyte.gz files")
    parser.add_argument("--interest", nargs="+", type=int, default=[0, 3, 8], help="the digits")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    options.harm = 0.05 if options.smoke else HARM
    if options.smoke:
        options.seeds, options.interest = [0], [3]
    return options


def main() -> None:
    """Measure what is not in the result file yet."""
    options = parse()
    torch.set_num_threads(1)
    terminal = console()
    path = output_path("gated_compression", options)
    result: dict[str, Any] = {
        "theme": "gated_compression", "environment": environment(), "rows": {}
    }  # fmt: skip
    if path is not None and path.exists():
        result["rows"] = json.loads(path.read_text())["rows"]
    sets: dict[str, tuple[Data, int]] = {"digits 8x8": (small_digits(), 1 if options.smoke else 30)}
    if options.data is not None:
        sets["MNIST"] = (mnist(options.data), 1)
    for name, (data, epochs) in sets.items():
        options.epochs = epochs
        for digit in options.interest:
            for seed in options.seeds:
                key = f"{name}/{digit}/{seed}"
                if key in result["rows"]:
                    continue
                found = one_seed(data, digit, seed, options)
                result["rows"][key] = found
                write(path, result)
                for how, row in found.items():
                    terminal.print(f"{key} {how}: {told(row)}")
    report(path, terminal)


def told(row: Mapping[str, Any]) -> str:
    """A row in words."""
    return ", ".join(f"{name} {value:.3g}" for name, value in row.items())


if __name__ == "__main__":
    main()
