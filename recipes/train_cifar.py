"""Train ResNet-18 on CIFAR-10, give it gates, cut it to half of its multiply-adds, fine-tune what is left.

    python recipes/train_cifar.py --smoke            # made-up images, seconds
    python recipes/train_cifar.py --data FOLDER      # holds cifar-10-batches-py/; wants a GPU

One flat script to copy and change: knobs, data, network, loop, cut, report. The dense network goes on for as
many epochs as the small one gets after it, so that the comparison at the end is fair. Nothing here can be
resumed; `swan-surgery train recipes/configs/cifar10_resnet.toml` can.
"""

import argparse
import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms import v2

import swan_surgery as swan


@dataclass(frozen=True)
class Knobs:
    """What to change first."""

    macs: float = 0.5  # share of the multiply-adds to keep: smaller, and less accurate
    dense_epochs: int = 60  # before the gates
    gate_epochs: int = 30  # weights and gates together, while the budget falls
    finetune_epochs: int = 30  # of the small network; what the cut costs comes back here
    ramp: float = 0.6  # share of gate_epochs in which the budget falls: longer is gentler
    freeze: float = 0.1  # last share of gate_epochs, in which gates stay as they are
    batch: int = 128
    lr: float = 0.1  # peak of a cosine in every stage
    weight_decay: float = 5e-4
    distillation: float = 0.5  # share of the loss that follows the dense network
    workers: int = 2
    num_classes: int = 10


SMOKE = Knobs(dense_epochs=1, gate_epochs=2, finetune_epochs=1, batch=16, lr=0.02, workers=0)


def network(knobs: Knobs) -> nn.Module:
    """Torchvision's ResNet-18 with a 3x3 stem that keeps the size of small images."""
    model: nn.Module = torchvision.models.resnet18(num_classes=knobs.num_classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def cifar(folder: Path) -> tuple[Dataset, Dataset]:
    """CIFAR-10 as torchvision keeps it; training images are moved and mirrored at random."""
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    plain = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    moved = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *plain])
    return (
        torchvision.datasets.CIFAR10(folder, train=True, transform=moved),
        torchvision.datasets.CIFAR10(folder, train=False, transform=v2.Compose(plain)),
    )


def made_up(knobs: Knobs) -> tuple[Dataset, Dataset]:
    """A random pattern per class, under noise."""
    patterns = torch.randn(knobs.num_classes, 3, 8, 8)
    labels = torch.arange(80) % knobs.num_classes
    images = patterns[labels] + 0.5 * torch.randn(80, 3, 8, 8)
    return TensorDataset(images[:60], labels[:60]), TensorDataset(images[60:], labels[60:])


def train(
    model: nn.Module,
    loader: DataLoader,
    epochs: int,
    knobs: Knobs,
    *,
    teacher: nn.Module | None = None,
    objective: Callable[[float], Tensor] | None = None,
) -> None:
    """Train in place; `objective` is what gates add to the loss, at a place in epochs."""
    device = next(model.parameters()).device
    gated = isinstance(model, swan.GatedModel)
    groups = swan.parameter_groups(model, lr=knobs.lr) if gated else model.parameters()
    optimizer = torch.optim.SGD(
        groups, knobs.lr, momentum=0.9, nesterov=True, weight_decay=knobs.weight_decay
    )
    for epoch in range(epochs):
        model.train()
        for step, batch in enumerate(loader):
            place = epoch + step / len(loader)
            for group in optimizer.param_groups:
                group["lr"] = knobs.lr * 0.5 * (1 + math.cos(math.pi * place / epochs))
            x, y = (own.to(device) for own in batch)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(x).float()
            loss = F.cross_entropy(logits, y)
            if teacher is not None:
                with torch.no_grad():
                    wanted = teacher(x)
                loss = torch.lerp(loss, swan.distillation_loss(logits, wanted), knobs.distillation)
            if objective is not None:
                loss = loss + objective(place)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"  epoch {epoch + 1} of {epochs}: loss {loss.item():.3f}")


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader) -> float:
    """Percent of the images, in eval mode: hard gates."""
    model.eval()
    device = next(model.parameters()).device
    right = [model(x.to(device)).argmax(1) == y.to(device) for x, y in loader]
    return 100 * torch.cat(right).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with cifar-10-batches-py/")
    parser.add_argument("--macs", type=float, default=Knobs.macs, help="share to keep")
    parser.add_argument("--out", type=Path, default=Path("out/train_cifar"), help="folder")
    parser.add_argument("--smoke", action="store_true", help="made-up images, seconds")
    options = parser.parse_args()
    if not (options.smoke or options.data):
        parser.error("give --data FOLDER, or --smoke")
    knobs = replace(SMOKE if options.smoke else Knobs(), macs=options.macs)
    torch.manual_seed(0)
    train_images, test_images = made_up(knobs) if options.smoke else cifar(options.data)
    own = {"num_workers": knobs.workers, "batch_size": knobs.batch}
    loader = DataLoader(train_images, shuffle=True, drop_last=True, **own)
    test = DataLoader(test_images, **own)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    print("A dense network.")
    dense = network(knobs).to(device)
    train(dense, loader, knobs.dense_epochs, knobs)
    longer = copy.deepcopy(dense)

    print("Gates go in; weights and gates learn together while the budget falls.")
    example = next(iter(test))[0][:1].to(device)
    gated = swan.swanify(dense, example)
    objective = swan.Objective(
        gated,
        macs=knobs.macs,
        ramp=swan.CosineRamp(length=knobs.ramp * knobs.gate_epochs),
        freeze_after=(1 - knobs.freeze) * knobs.gate_epochs,
    )
    train(gated, loader, knobs.gate_epochs, knobs, teacher=dense.eval(), objective=objective)
    swan.calibrate(gated, loader, 100)  # batch-norm statistics of the gates as they are now

    print("What is closed is cut out; `prune` compares both networks and raises where they differ.")
    small = swan.prune(gated, macs=knobs.macs)
    cut = accuracy(small, test)
    train(small, loader, knobs.finetune_epochs, knobs, teacher=dense)

    print("The dense network goes on for as long.")
    train(longer, loader, knobs.gate_epochs + knobs.finetune_epochs, knobs)
    options.out.mkdir(parents=True, exist_ok=True)
    swan.save(small.eval(), options.out / "small.swan")
    found = swan.report(longer, small, example, evaluate=lambda model: accuracy(model, test))
    (options.out / "report.html").write_text(found.to_html())
    print(found.summary())
    print(f"right after the cut: {cut:.2f} %; {options.out}: small.swan, report.html")


if __name__ == "__main__":
    main()
