"""Accuracy."""

import torch
from torch import nn

from swan_surgery.experiments.digits.data import Images


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
