"""Does another activation help a network that is cut? FleS put in before a cut, after it, or not at all.

    python recipes/swap_then_cut.py --smoke     # seconds
    python recipes/swap_then_cut.py             # digits, 3 seeds, minutes on one core

One flat script to copy and change (`pip install 'swan-surgery[demo]'`). Three branches start from the same dense network
and get the same epochs, batches and learning rates; each ends at the same number of MACs or below, FleS's MLPs counted;
FleS starts as exactly the ReLU that was there; no setting was tuned:

    cut             train on, cut, fine-tune
    swap then cut   FleS in, train on, cut, fine-tune
    cut then swap   train on, cut, FleS in, fine-tune
"""

import argparse
import copy
import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import swan_surgery as swan


@dataclass(frozen=True)
class Knobs:
    """What to change first."""

    macs: float = 0.25  # share of the dense network's MACs to keep
    dense_epochs: int = 15
    before_epochs: int = 8  # before the cut: with FleS, or as it is
    after_epochs: int = 12  # of what the cut left
    lr: float = 2e-3  # peak of a cosine in every stage
    weight_decay: float = 0.01
    batch: int = 50
    width: int = 16
    num_train: int = 1000
    seeds: int = 3


SMOKE = Knobs(0.25, 3, 1, 2, batch=20, width=8, num_train=300, seeds=1)
Images = tuple[Tensor, Tensor]  # [N, 1, 8, 8], labels [N]


def digits(num_train: int) -> tuple[Images, Images]:
    """Scikit-learn's 1,797 real handwritten digits; the last 497 of a fixed order are test images."""
    bunch = load_digits()
    x = (torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16 - 0.3) / 0.4
    y = torch.tensor(bunch.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, test = order[:1300][:num_train], order[1300:]
    return (x[train], y[train]), (x[test], y[test])


def network(width: int) -> nn.Module:
    """Four convolutions with batch-norm and ReLU."""
    layers: list[nn.Module] = []
    widths = (1, width, 2 * width, 2 * width, 4 * width)
    for given, out, stride in zip(widths, widths[1:], (1, 1, 2, 1), strict=False):
        conv = nn.Conv2d(given, out, 3, stride, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(out, 10))


def loss(model: nn.Module, batch: Images) -> Tensor:
    """Cross-entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(images: Images, size: int, seed: int) -> list[Images]:
    """One epoch in random order, every image moved by a pixel at most."""
    generator = torch.Generator().manual_seed(seed)
    x, y = images
    rows, columns = torch.randint(0, 3, (2, len(x), 1), generator=generator) + torch.arange(8)
    which = torch.arange(len(x))[:, None, None]
    x = F.pad(x, (1, 1, 1, 1), value=-0.75)[which, 0, rows[:, :, None], columns[:, None, :]]
    parts = torch.randperm(len(x), generator=generator).split(size)
    return [(x[own].unsqueeze(1), y[own]) for own in parts]


def train(model: nn.Module, images: Images, epochs: int, knobs: Knobs, seed: int) -> nn.Module:
    """Train in place; the same seed means the same batches."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), knobs.lr, weight_decay=knobs.weight_decay)
    for epoch in range(epochs):
        all_batches = batches(images, knobs.batch, 1000 * seed + epoch)
        for step, batch in enumerate(all_batches):
            place = (epoch + step / len(all_batches)) / epochs
            for group in optimizer.param_groups:
                group["lr"] = knobs.lr * 0.5 * (1 + math.cos(math.pi * place))
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Percent, in eval mode."""
    return 100 * (model.eval()(images[0]).argmax(1) == images[1]).double().mean().item()


def run(seed: int, train_images: Images, test_images: Images, knobs: Knobs) -> dict[str, Any]:
    """All branches of one seed."""
    torch.manual_seed(seed)
    example = test_images[0][:1]
    dense = train(network(knobs.width), train_images, knobs.dense_epochs, knobs, seed)
    budget = int(knobs.macs * swan.count_macs(dense, example))
    data = batches(train_images, knobs.batch, seed)

    def cut(model: nn.Module, macs: int) -> nn.Module:
        own: dict[str, Any] = {"example_inputs": example, "progress": False, "round_to": 1}
        return swan.compress(model, data, macs=macs, loss=loss, **own).model

    def trained(model: nn.Module, epochs: int, stage: int) -> nn.Module:
        return train(model, train_images, epochs, knobs, 10 * seed + stage)

    swapped = swan.swap_activations(dense, "fles", example)
    mlps = swan.count_macs(swapped, example) - swan.count_macs(dense, example)
    longer = trained(copy.deepcopy(dense), knobs.before_epochs, 1)
    swapped = trained(swapped, knobs.before_epochs, 1)
    whole = {"dense": dense, "dense, longer": longer, "dense, FleS": swapped}
    found = {name: accuracy(model, test_images) for name, model in whole.items()}
    small = {
        "cut": cut(longer, budget),
        "swap then cut": cut(swapped, budget),
        "cut then swap": swan.swap_activations(cut(longer, budget - mlps), "fles", example),
    }
    for name, model in small.items():
        found[f"{name}, before fine-tuning"] = accuracy(model, test_images)
        found[name] = accuracy(trained(model, knobs.after_epochs, 2), test_images)
    macs = {name: swan.count_macs(model, example) for name, model in small.items()}
    return {"seed": seed, "accuracy": found, "macs": macs, "budget": budget}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    parser.add_argument("--smoke", action="store_true", help="everything, in seconds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    knobs = SMOKE if options.smoke else Knobs()
    rows = [run(seed, *digits(knobs.num_train), knobs) for seed in range(knobs.seeds)]
    for name in rows[0]["accuracy"]:
        own = [row["accuracy"][name] for row in rows]
        print(f"{name}: {statistics.mean(own):.2f} % ({min(own):.2f} to {max(own):.2f})")
    print(f"MACs, at most {rows[0]['budget']:,}: {rows[0]['macs']}")
    if options.output:
        options.output.write_text(json.dumps({"settings": asdict(knobs), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
