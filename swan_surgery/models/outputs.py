"""What a model returns: every tensor in it, however nested."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def iter_tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor inside nested tuples, lists, dicts and plain objects, in order.

    Caches are passed over: a model reads them back itself, so their width may follow.
    """
    return (tensor for _, tensor in iter_named_tensors(value))


def iter_named_tensors(
    value: Any, name: str = "", _above: tuple[int, ...] = ()
) -> Iterator[tuple[str, Tensor]]:
    """The same with names: indices, keys and attributes joined by dots; `""` if it is a tensor itself."""
    if isinstance(value, Tensor):
        yield name, value
        return
    if id(value) not in _above:
        for key, item in _items(value):
            inner = f"{name}.{key}" if name else str(key)
            yield from iter_named_tensors(item, inner, (*_above, id(value)))


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return value.items()
    if isinstance(value, (list, tuple, set, frozenset)):
        return enumerate(value)
    if hasattr(value, "__dataclass_fields__"):
        return [(name, getattr(value, name)) for name in value.__dataclass_fields__]
    is_model = isinstance(value, (torch.nn.Module, type)) or callable(value)
    is_cache = any(kind.__name__.endswith("Cache") for kind in type(value).__mro__)
    return () if is_model or is_cache or not hasattr(value, "__dict__") else vars(value).items()


def spread_of(y: Tensor) -> Tensor:
    """Standard deviation of all values; of a constant output its size, or one."""
    y = y.detach()
    spread = y.float().std(correction=0)
    size = y.float().square().mean().sqrt()
    spread = torch.where(spread > 1e-6 * size, spread, size)
    return torch.where(spread > 0, spread, torch.ones_like(spread))
