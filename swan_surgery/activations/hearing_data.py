"""What activations are given and give on batches of data, by hooks."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.models.batches import run_on_batch
from swan_surgery.models.modes import evaluating


def run_hooked(
    model: nn.Module, hooks: Mapping[nn.Module, Callable[..., None]], batches: Iterable[Any]
) -> None:
    """Run a model on batches in eval mode with forward hooks, which are gone afterwards."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        with evaluating(model), torch.no_grad(), streams_kept():
            for batch in batches:
                run_on_batch(model, batch)
    finally:
        for handle in handles:
            handle.remove()
