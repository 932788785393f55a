"""A loader's batch as a call of the model: inputs alone, with labels behind them, or by name."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from swan_surgery.errors import InputError


def check_batch(batch: Any) -> None:
    """Refuse what is no batch of a loader, or holds no samples.

    Raises:
        InputError: says what was seen.
    """
    given = batch[:1] if isinstance(batch, (tuple, list)) else batch
    tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
    if not tensors or not isinstance(batch, (Tensor, tuple, list, Mapping)):
        raise InputError(
            f"a batch is a tensor, a tuple that begins with one, or a mapping of keyword arguments; got "
            f"{type(batch).__name__}"
        )
    if tensors[0].ndim and not len(tensors[0]):
        raise InputError("a batch holds no samples; leave it out")


def run_on_batch(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch, on the device of its parameters.

    A mapping holds keyword arguments; of a tuple or list the first element is the input.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, Mapping):
        return model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    first = batch[0] if isinstance(batch, (tuple, list)) else batch
    return model(first.to(device))


def first_samples(batch: Any, count: int) -> Any:
    """Example inputs out of a batch: of every tensor that has one entry per sample the first few.

    A mapping holds keyword arguments; of a tuple or list the first element is the input.
    """
    if isinstance(batch, Mapping):
        sizes = [v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.ndim]
        most = sizes[0] if sizes else 0
        return {name: _first(value, count, most) for name, value in batch.items()}
    first = batch[0] if isinstance(batch, (tuple, list)) else batch
    return _first(first, count, first.shape[0] if isinstance(first, Tensor) and first.ndim else 0)


def _first(value: Any, count: int, samples: int) -> Any:
    is_batch = isinstance(value, Tensor) and value.ndim and value.shape[0] == samples
    return value[:count] if is_batch else value
