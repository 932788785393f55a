"""What operations make of tensors without data is remembered by the shapes that enter.

Rehearsals run a model over and over, and torch works shapes out in Python: most of an operation's time.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


# (shape, strides, type) of each tensor that comes out, and whether they came in a tuple.
_Made = tuple[list[tuple[torch.Size, tuple[int, ...], torch.dtype]], bool]
_MOST = 1 << 14
_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout)
_known: dict[Any, _Made] = {}


def remembered(op: Any, args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:
    """What `run`, which applies `op` on the shapes of these arguments, returns on `meta`."""
    key = _key((args, kwargs)) if _makes_new_tensors(op) else None
    if key is None:
        return run()
    known = op, key, torch.get_default_dtype()  # what whole numbers divide to
    made = _known.get(known)
    if made is None:
        return _remember(known, run())
    outputs = [
        torch.empty_strided(shape, strides, dtype=dtype, device="meta")
        for shape, strides, dtype in made[0]
    ]
    return tuple(outputs) if made[1] else outputs[0]


def _remember(key: Any, out: Any) -> Any:
    outputs = out if type(out) is tuple else (out,)
    if all(type(tensor) is Tensor and tensor.is_meta for tensor in outputs):
        if len(_known) >= _MOST:
            _known.clear()
        _known[key] = [(t.shape, t.stride(), t.dtype) for t in outputs], type(out) is tuple
    return out


@functools.cache
def _makes_new_tensors(op: Any) -> bool:
    """Whether it changes nothing, and returns nothing that shares memory with what it was given."""
    schema = op._schema  # noqa: SLF001 - torch's only access
    aliases = schema.is_mutable or any(own.alias_info is not None for own in schema.returns)
    return op.namespace == "aten" and not aliases and not op.is_view and "unsafe" not in schema.name


def _key(value: Any) -> Any:
    """What decides the shapes that come out; None where something else might."""
    if isinstance(value, Tensor):
        is_plain = type(value) in (Tensor, nn.Parameter) and not value.is_complex()
        return (value.shape, value.stride(), value.dtype) if is_plain else None
    if isinstance(value, dict):
        value = [*value.items()]
    if isinstance(value, (tuple, list)):
        keys = tuple(map(_key, value))
        return None if None in keys else keys
    return (type(value), value) if isinstance(value, _PLAIN) else None
