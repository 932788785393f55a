"""What a model returns: every tensor in it, however nested."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def iter_tensors(value: Any, _above: tuple[int, ...] = ()) -> Iterator[Tensor]:
    """Every tensor inside nested tuples, lists, dicts and plain objects, in order.

    Caches are passed over: a model reads them back itself, so their width may follow.
    """
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) not in _above:
        for item in _items(value):
            yield from iter_tensors(item, (*_above, id(value)))


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, (list, tuple, set, frozenset)):
        return value
    if hasattr(value, "__dataclass_fields__"):
        return [getattr(value, name) for name in value.__dataclass_fields__]
    is_model = isinstance(value, (torch.nn.Module, type)) or callable(value)
    is_cache = any(kind.__name__.endswith("Cache") for kind in type(value).__mro__)
    return (
        () if is_model or is_cache else vars(value).values() if hasattr(value, "__dict__") else ()
    )
