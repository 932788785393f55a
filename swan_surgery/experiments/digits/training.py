"""The training loop every method shares, and accuracy."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from swan_surgery.experiments.digits.data import Images, shuffled_batches
from swan_surgery.learning.objective import Objective


def train(
    model: nn.Module,
    groups: list[dict[str, Any]],
    images: Images,
    *,
    epochs: int,
    batch: int,
    generator: torch.Generator,
    start: int = 0,
    schedule_epochs: int | None = None,
    objective: Objective | None = None,
    on_epoch: Callable[[], None] = lambda: None,
) -> None:
    """AdamW on the cross entropy, plus the objective if there is one.

    Args:
        model: trained in place.
        groups: parameter groups, with their peak learning rates.
        images: the training images.
        epochs: how many.
        batch: images per step.
        generator: draws order and shifts.
        start: epochs of the schedule that are over already.
        schedule_epochs: length of the cosine along which all learning rates fall to zero.
        objective: SWAN's penalty, called with the fractional epoch.
        on_epoch: called after every epoch.
    """
    optimizer = torch.optim.AdamW(groups)
    steps = math.ceil(len(images) / batch)
    total = (schedule_epochs or epochs) * steps
    peaks = [group["lr"] for group in optimizer.param_groups]
    for epoch in range(epochs):
        model.train()
        for step, (x, y) in enumerate(shuffled_batches(images, batch, generator)):
            done = (start + epoch) * steps + step
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * done / total))
            loss = F.cross_entropy(model(x), y)
            if objective is not None:
                loss = loss + objective(epoch + step / steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        on_epoch()


def accuracy(model: nn.Module, images: Images) -> float:
    """Percent of images classified right, in eval mode; the mode is restored."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            right = model(images.x).argmax(dim=1) == images.y
    finally:
        model.train(was_training)
    return 100 * int(right.sum()) / len(images)
