"""How operations run while planning: tensors without data, and what depends on data decided.

Floating-point tensors of a shell have shapes alone (device `meta`). Integers and masks that come
from the inputs or from factories are real: they decide paths and positions. Where a result's shape
depends on data that nobody has (which boxes score high?), everything is taken to be selected.
"""

from typing import Any

import torch
from torch import Tensor

from swan_surgery.channels.rules.on_meta import META, on_meta
from swan_surgery.channels.rules.registry import facts_of, writes_in_place


def run_op(op: Any, inputs: tuple[Tensor, ...], args: Any, kwargs: Any) -> Any:
    """Run an operation on a shell: floating-point tensors have no data, integers and masks do.

    Integers decide paths and positions, so what makes them makes real ones; where they meet `meta`,
    the result has no data either.
    """
    if not inputs:
        return _made_real(op, args, kwargs)
    if not any(tensor.is_meta for tensor in inputs):
        if kwargs.get("device") == META:
            floats = kwargs.get("dtype") is not None and kwargs["dtype"].is_floating_point
            kwargs = {**kwargs, "device": META if floats else torch.device("cpu")}
        return op(*args, **kwargs)
    facts = facts_of(op)
    shortcut = facts.on_meta.get(op._overloadname)  # noqa: SLF001 - torch's only access
    if shortcut is not None and not writes_in_place(op):
        return shortcut(*args, **kwargs)
    if facts.by_position and inputs[0].is_meta:
        return op(*args, **kwargs)
    return on_meta(op, *args, **kwargs)


def depends_on_values(op: Any, inputs: tuple[Tensor, ...]) -> bool:
    """Whether the shape of a result, or the path that follows, depends on values that are there."""
    if not inputs or any(tensor.is_meta for tensor in inputs):
        return False
    return selects_by_values(op, inputs) or facts_of(op).by_value


def selects_by_values(op: Any, inputs: tuple[Tensor, ...]) -> bool:
    """Whether values, there or not, decide how much is returned."""
    facts = facts_of(op)
    return facts.selects or (facts.by_position and any(t.dtype in _MASKS for t in inputs[1:]))


_MASKS = {torch.bool, torch.uint8}


def _made_real(op: Any, args: Any, kwargs: Any) -> Any:
    out = op(*args, **kwargs)
    if isinstance(out, Tensor) and out.is_meta and not out.is_floating_point():
        out = op(*args, **{**kwargs, "device": torch.device("cpu")})
        if facts_of(op).unfilled:
            out.zero_()  # what lies there by chance must decide nothing
    return out
