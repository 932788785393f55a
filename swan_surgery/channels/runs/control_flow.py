"""`torch.cond` and `while_loop` while a model is mapped: every branch runs, and what they return joins.

Which branch a value will choose, and how often a loop turns, nobody knows then. So a channel of the
result is that channel of either branch, and of what a loop carries from turn to turn.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops import utils
from torch.utils._pytree import tree_flatten, tree_unflatten


_LOCK = Lock()
_MAPPING: list[int] = []  # the threads that map a model, once for each run under way
_DOOR = "_hop_compile_and_call"  # what torch's control flow goes through, in the versions we know
_COMPILE: Any = getattr(utils, _DOOR, None)


@contextmanager
def control_flow_joined() -> Iterator[None]:
    """Inside the block, this thread's control flow runs all of its branches, and is not compiled."""
    if _COMPILE is None:
        yield
        return
    thread = get_ident()
    with _LOCK:
        _MAPPING.append(thread)
        setattr(utils, _DOOR, _run_or_compile)
    try:
        yield
    finally:
        with _LOCK:
            _MAPPING.remove(thread)
            if not _MAPPING:
                setattr(utils, _DOOR, _COMPILE)


def _run_or_compile(function: Any, args: Any, kwargs: Any = None) -> Any:
    name = function.__qualname__.partition(".")[0]
    if get_ident() not in _MAPPING or name not in _JOINED:
        return _COMPILE(function, args, kwargs)
    return _JOINED[name](*args)


def _both_branches(
    _choice: Any, one: Callable[..., Any], other: Callable[..., Any], operands: Any
) -> Any:
    return _joined(one(*operands), other(*operands))


def _one_turn(
    goes_on: Callable[..., Any], turn: Callable[..., Any], carried: Any, more: Any
) -> Any:
    goes_on(*carried, *more)
    return _joined(tuple(carried), turn(*carried, *more))


_JOINED: dict[str, Callable[..., Any]] = {"cond": _both_branches, "while_loop": _one_turn}


def _joined(one: Any, other: Any) -> Any:
    """Either of two results, as `where` has it for a condition that nobody knows."""
    first, spec = tree_flatten(one)
    second, _ = tree_flatten(other)
    return tree_unflatten([_either(*pair) for pair in zip(first, second, strict=True)], spec)


def _either(one: Any, other: Any) -> Any:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return one
    return torch.where(torch.ones((), dtype=torch.bool), one, other)
