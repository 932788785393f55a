"""Work on models in the precision of their own weights, whatever runs around it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


@contextmanager
def in_own_precision(*models: nn.Module) -> Iterator[None]:
    """Inside, no autocast: it multiplies with copies of weights, which nobody knows again."""
    devices = {p.device.type for model in models for p in model.parameters()} - {"meta"}
    with ExitStack() as stack:
        for device in sorted(devices):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


__all__ = ["in_own_precision"]
