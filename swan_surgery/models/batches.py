"""A loader's batch as a call of the model: inputs alone, with labels behind them, or by name."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from swan_surgery.environment.kinds_of_numbers import is_whole
from swan_surgery.errors import InputError


def batches_in(loader: Iterable[Any], num_batches: int | None) -> Iterator[Any]:
    """What a loader yields, at most so many; of whatever kind.

    Raises:
        InputError: it is no loader, or `num_batches` is below 1.
    """
    if isinstance(loader, Tensor) or not isinstance(loader, Iterable):
        raise InputError(
            f"a loader must yield batches; got a {type(loader).__name__}; for a single batch pass [batch]"
        )
    number: Any = 1 if num_batches is None else num_batches
    if not is_whole(number):
        raise InputError(f"num_batches is a whole number; got {num_batches!r}")
    if number < 1:
        raise InputError(f"num_batches must be at least 1; got {num_batches}")
    return islice(loader, num_batches)


def check_batch(batch: Any) -> None:
    """Refuse what is no batch of a loader, or holds no samples.

    Raises:
        InputError: says what was seen.
    """
    tensors = [leaf for leaf in tree_leaves(_given(batch)) if isinstance(leaf, Tensor)]
    if not tensors or not isinstance(batch, (Tensor, tuple, list, Mapping)):
        raise InputError(
            f"a batch is a tensor, a tuple that begins with one, or a mapping of keyword arguments; got "
            f"{type(batch).__name__}"
        )
    if tensors[0].ndim and not len(tensors[0]):
        raise InputError("a batch holds no samples; leave it out")


def _given(batch: Any) -> Any:
    """What the model is given of a batch: a mapping of whatever kind, or the first of several."""
    if isinstance(batch, Mapping):
        return dict(batch)
    return batch[:1] if isinstance(batch, (tuple, list)) else batch


def run_on_batch(model: nn.Module, batch: Any) -> Any:
    """Run a model on a copy of a batch, which it may change in place, on the device of its parameters.

    A mapping holds keyword arguments; of a tuple or list the first element is the input.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, Mapping):
        return model(**{name: _moved(value, device) for name, value in batch.items()})
    return model(_moved(batch[0] if isinstance(batch, (tuple, list)) else batch, device))


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors copied, also in lists and dicts, and what else can be moved."""

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(device, copy=True)
        return leaf.to(device) if hasattr(leaf, "to") else leaf

    return tree_map(move, value)


def num_samples(batch: Any) -> int:
    """The length of a batch's first tensor; 1 where it holds none with samples."""
    tensors = (
        leaf for leaf in tree_leaves(_given(batch)) if isinstance(leaf, Tensor) and leaf.ndim
    )
    return next((len(tensor) for tensor in tensors), 1)


def holds_nan(batch: Any) -> bool:
    """Whether the inputs in a batch hold NaN; infinity may be meant, as in masks that are added."""
    tensors = (leaf for leaf in tree_leaves(_given(batch)) if isinstance(leaf, Tensor))
    return any(bool(tensor.isnan().any()) for tensor in tensors)


def first_samples(batch: Any, count: int) -> Any:
    """Example inputs out of a batch: of every tensor that has one entry per sample the first few.

    A mapping holds keyword arguments; of a tuple or list the first element is the input.
    """
    if isinstance(batch, Mapping):
        sizes = [v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.ndim]
        most = sizes[0] if sizes else 0
        return {name: _first(value, count, most) for name, value in batch.items()}
    first = batch[0] if isinstance(batch, (tuple, list)) else batch
    if not isinstance(first, Tensor):
        return (first,)  # one argument, also where it is a list of images
    return first[:count] if first.ndim else first


def _first(value: Any, count: int, samples: int) -> Any:
    is_batch = isinstance(value, Tensor) and value.ndim and value.shape[0] == samples
    return value[:count] if is_batch else value
