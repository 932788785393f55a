"""Training or evaluation: every module is in its own mode again afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_kept(*models: nn.Module) -> Iterator[None]:
    """Whatever modes are set inside the block, each module is in its own again afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode inside the block."""
    with modes_kept(*models):
        for model in models:
            model.eval()
        yield


__all__ = ["evaluating", "modes_kept"]
