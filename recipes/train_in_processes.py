"""Gates, cut and fine-tuning in several processes with Accelerate: what has to be where.

    python recipes/train_in_processes.py                                      # one process, digits
    accelerate launch --multi_gpu --num_processes 2 recipes/train_in_processes.py
    torchrun --nproc_per_node 2 recipes/train_in_processes.py                 # without a GPU, too

One flat script to copy and change (`pip install 'swan-surgery[recipes,demo]'`). Gates go in before `prepare`; the
objective takes the gated model itself, not what `prepare` makes of it; every process calibrates on the same
batches and cuts, for each needs the smaller network; the optimizer of the cut network is a new one, prepared anew.
Batches are shared out by `prepare`, so that the batch over all processes is `BATCH` for any number of them.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import swan_surgery as swan


MACS = 0.5  # share of the multiply-adds to keep
BATCH = 64  # images per step, over all processes
LR = 1e-3  # peak of a cosine in every stage


def images() -> tuple[TensorDataset, TensorDataset]:
    """Scikit-learn's handwritten digits: 1,300 to train, 497 to test."""
    bunch = load_digits()
    x = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    y = torch.tensor(bunch.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, test = order[:1300], order[1300:]
    return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])


def network() -> nn.Module:
    """Group norm: its statistics are those of an image, whoever works on it. Batch norm's are each process's own."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GroupNorm(4, 64), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10)),
    )


def train(
    model: nn.Module,
    data: TensorDataset,
    epochs: int,
    accelerator: Accelerator,
    objective: swan.Objective | None = None,
) -> None:
    """Train in place, all processes together."""
    is_gated = isinstance(model, swan.GatedModel)
    groups = swan.parameter_groups(model, lr=LR) if is_gated else model.parameters()
    optimizer = torch.optim.AdamW(groups, LR)
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(data, BATCH, shuffle=True, drop_last=True, generator=generator)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for epoch in range(epochs):
        wrapped.train()
        for step, (x, y) in enumerate(loader):
            place = epoch + step / len(loader)
            for group in optimizer.param_groups:
                group["lr"] = LR * 0.5 * (1 + math.cos(math.pi * place / epochs))
            loss = F.cross_entropy(wrapped(x), y)
            if objective is not None:
                loss = loss + objective(place)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
    accelerator.free_memory()


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset, accelerator: Accelerator) -> float:
    """Percent of the images, in eval mode: hard gates. Each process takes its share of them."""
    model.eval()
    x, y = (own[accelerator.process_index :: accelerator.num_processes] for own in data.tensors)
    right = model(x.to(accelerator.device)).argmax(1).cpu() == y
    counts: Tensor = torch.tensor([right.sum(), len(y)], device=accelerator.device)
    total = accelerator.reduce(counts, "sum")
    return 100 * float(total[0] / total[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10, help="of each of the three stages")
    parser.add_argument("--out", type=Path, default=Path("out/train_in_processes"), help="folder")
    options = parser.parse_args()
    # Each process reads its part of a batch of BATCH, instead of a batch of its own.
    sharing = DataLoaderConfiguration(split_batches=True)
    cpu = not torch.cuda.is_available()
    accelerator = Accelerator(cpu=cpu, dataloader_config=sharing)
    set_seed(0)
    train_images, test_images = images()
    example = train_images.tensors[0][:1].to(accelerator.device)

    dense = network().to(accelerator.device)
    train(dense, train_images, options.epochs, accelerator)
    accelerator.print(f"dense: {accuracy(dense, test_images, accelerator):.2f} %")

    gated = swan.swanify(dense, example)
    ramp = swan.CosineRamp(length=0.6 * options.epochs)
    objective = swan.Objective(gated, macs=MACS, ramp=ramp, freeze_after=0.9 * options.epochs)
    train(gated, train_images, options.epochs, accelerator, objective)
    if any(isinstance(module, nn.BatchNorm2d) for module in gated.modules()):  # not as it stands
        order = torch.Generator().manual_seed(1)
        swan.calibrate(gated, DataLoader(train_images, BATCH, shuffle=True, generator=order), 100)

    # Gates that differed would cut a network of another shape in every process.
    everywhere = accelerator.gather(gated.gates.open_mask().float()[None])
    assert bool((everywhere == everywhere[0]).all()), "processes disagree on their gates"  # noqa: S101
    small = swan.prune(gated, macs=MACS)
    train(small, train_images, options.epochs, accelerator)
    accelerator.print(f"small: {accuracy(small, test_images, accelerator):.2f} %")

    if accelerator.is_main_process:
        options.out.mkdir(parents=True, exist_ok=True)
        swan.save(small.eval(), options.out / "small.swan")
        print(swan.report(dense, small, example).summary())
    accelerator.end_training()


if __name__ == "__main__":
    main()
