"""Training on the device: batches, one-cycle schedule, bf16, and a clock that may end it."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_clock import Clock
from gpu_runs import JOINT, Run
from quality import accuracy
from quality_data import Images, Splits, batches
from quality_networks import build, load_pretrained_
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

import swan_surgery as swan


SIZE = 32


@dataclass(frozen=True)
class Settings:
    """With what every method trains alike.

    Attributes:
        batch: images per step.
        dense_lr: peak learning rate of a network that starts from random weights.
        adapt_lr: of one that starts from pretrained weights.
        lr: of everything after the dense network.
        warmup: share of a cycle in which the rate rises, from a twenty-fifth of its peak.
        joint: share of the epochs in which gates learn, where they do.
        ramp: share of the joint part over which the budget falls.
        weight_decay: of the weights.
        label_smoothing: of the cross-entropy.
        score_batches: of 64 images, for one-shot scores.
        calibration_batches: of `batch` images.
        tp_rounds: halvings of the ratio that Torch-Pruning is given.
        bf16: forward and backward under autocast; weights, gates and accuracies are float32.
    """

    batch: int = 512
    dense_lr: float = 0.2
    adapt_lr: float = 0.02
    lr: float = 0.05
    warmup: float = 0.15
    joint: float = JOINT
    ramp: float = 0.6
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    score_batches: int = 40
    calibration_batches: int = 8
    tp_rounds: int = 9
    bf16: bool = True


@dataclass(frozen=True, eq=False)
class Task:
    """What a run trains on, and until when."""

    splits: Splits
    settings: Settings
    clock: Clock
    build: Callable[[str], nn.Module] = build

    @property
    def device(self) -> torch.device:
        """Where the images lie."""
        return self.splits.train.x.device

    @property
    def steps(self) -> int:
        """Of one epoch."""
        return len(self.splits.train) // self.settings.batch

    def example(self) -> Tensor:
        """One image."""
        return torch.zeros(1, 3, SIZE, SIZE, device=self.device)

    def generator(self, seed: int) -> torch.Generator:
        """On the device, so that nothing is copied there in training."""
        return torch.Generator(self.device).manual_seed(seed)

    def some(self, count: int, size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        """Augmented batches for scores and statistics, the same for every method of a seed."""
        own = batches(self.splits.train, min(size, len(self.splits.train)), self.generator(seed))
        return [batch for _, batch in zip(range(count), own, strict=False)]

    def new(self, network: str) -> nn.Module:
        """A network with random weights, on the device."""
        return self.build(network).to(self.device, memory_format=torch.channels_last)


def one_cycle(step: int, total: int, warmup: float) -> float:
    """The share of the peak learning rate: linear up, cosine down to zero."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return 0.04 + 0.96 * step / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def train(
    model: nn.Module,
    task: Task,
    lr: float,
    span: tuple[int, int, int],
    generator: torch.Generator,
    *,
    groups: list[dict[str, Any]] | None = None,
    objective: swan.Objective | None = None,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Some steps of a cycle.

    Args:
        model: trained in place.
        task: images, settings, clock.
        lr: the peak.
        span: first step, the step to stop before, and all steps of the cycle.
        generator: of shuffling and augmentation.
        groups: of parameters, each with its peak rate; else all at `lr`.
        objective: added to the loss.
        around: each forward pass runs inside what this returns.

    Raises:
        OutOfTimeError: the clock ended; the model is worth nothing.
    """
    settings = task.settings
    first, last, total = span
    own = {"lr": lr, "weight_decay": settings.weight_decay}
    groups = groups or [{"params": list(model.parameters()), **own}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    peaks = [group["lr"] for group in optimizer.param_groups]
    model.train()
    for step, (x, y) in zip(range(first, last), _endless(task, generator), strict=False):
        task.clock.check()
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * one_cycle(step, total, settings.warmup)
        with around(), torch.autocast(task.device.type, torch.bfloat16, enabled=settings.bf16):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=settings.label_smoothing)
        if objective is not None:
            loss = loss + objective(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    wait(task.device)


def _endless(task: Task, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from batches(task.splits.train, task.settings.batch, generator)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def dense_path(work: Path, run: Run, device: torch.device) -> Path:
    """Where the dense network of a seed is kept: one made on another device is another one."""
    name = f"{run.part}_{run.network}_{run.seed}_{run.dense_epochs}_{device.type}.safetensors"
    return work / name


def dense_network(run: Run, task: Task, work: Path, pretrained: Path | None) -> nn.Module:
    """What every method of a network and a seed starts from: made once, kept in `work`.

    Raises:
        OutOfTimeError: the clock ended before it was trained.
    """
    path = dense_path(work, run, task.device)
    if path.exists():
        with torch.device("meta"):  # drawing VGG's first weights takes a second
            model = task.build(run.network)
        model = model.to_empty(device=task.device).to(memory_format=torch.channels_last)
        load_model(model, path)
        return model
    torch.manual_seed(run.seed)
    model = task.new(run.network)
    lr = task.settings.dense_lr
    if pretrained is not None:
        load_pretrained_(model, run.network, pretrained)
        lr = task.settings.adapt_lr
    total = run.dense_epochs * task.steps
    train(model, task, lr, (0, total, total), task.generator(run.seed))
    save_whole(lambda partial: save_model(model, str(partial)), path)
    return model


def save_whole(save: Callable[[Path], None], path: Path) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save(partial)
    partial.replace(path)


def cached_images(work: Path, num_train: int, read: Callable[[], Splits]) -> Splits:
    """Decoded images from `work`, where an earlier session left them; else read and left there."""
    path = work / f"images_{num_train}.safetensors"
    names = ("train", "validation", "test")
    if path.exists():
        found = load_file(path)
        return Splits(*(Images(found[f"{name}_x"], found[f"{name}_y"]) for name in names))
    splits = read()
    tensors = {
        f"{name}_{axis}": getattr(getattr(splits, name), axis).contiguous().clone()
        for name in names
        for axis in "xy"
    }
    save_whole(lambda partial: save_file(tensors, str(partial)), path)
    return splits


def measured_rates(network: str, task: Task, seconds: float) -> tuple[float, float]:
    """Training images per second, without gates and while gates learn; each in half of the seconds.

    Raises:
        OutOfTimeError: the clock ended meanwhile.
    """
    model = task.new(network)
    gated = swan.swanify(model, task.example())
    groups = swan.parameter_groups(gated, lr=1e-4, gate_lr=0.2, weight_decay=0.0)
    objective = swan.Objective(gated, macs=0.5)
    options = {"groups": groups, "objective": objective}
    return (
        _rate(model, task, seconds / 2, {}),
        _rate(gated, task, seconds / 2, options),
    )


def _rate(model: nn.Module, task: Task, seconds: float, options: dict[str, Any]) -> float:
    generator = task.generator(0)

    def steps(count: int) -> float:
        start = time.monotonic()
        train(model, task, 1e-4, (0, count, 100), generator, **options)
        return time.monotonic() - start

    steps(2)  # warm: kernels are chosen here
    start, done, each = time.monotonic(), 0, seconds
    while (left := seconds - (time.monotonic() - start)) > 0:
        count = min(50, max(1, int(left / each)))
        each = steps(count) / count
        done += count
    return done * task.settings.batch / (time.monotonic() - start)


__all__ = [
    "Settings",
    "Task",
    "accuracy",
    "cached_images",
    "dense_network",
    "dense_path",
    "measured_rates",
    "one_cycle",
    "train",
    "wait",
]
