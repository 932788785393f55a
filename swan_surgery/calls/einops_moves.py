"""einops' rearrangements as calls that modes see: whose axes they split, and in how many parts.

`rearrange(x, "b (h d) x y -> (b h) (x y) d", h=4)` repeats a number of heads as a view does. einops asks the
tensor for its shape and refuses what does not divide before any function of torch is called. So where the
module of einops is loaded, its `reduce`, through which `rearrange` and `repeat` go, hands itself to whatever
torch function mode is in force, as torch's own functions in Python do.
"""

import functools
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function


# What only moves; reductions that take a mean are seen as torch's.
_MOVES = {"rearrange", "repeat"}
_ORIGINALS: list[Callable[..., Any]] = []


def rearrange(
    tensor: Tensor,
    pattern: str,
    reduction: str,
    places: Sequence[int],
    lengths: Sequence[int],
    names: Sequence[str],
) -> Any:
    """What einops' own function gives, of "rearrange" and of "repeat".

    Args:
        tensor: what is moved.
        pattern: of einops.
        reduction: "rearrange" or "repeat".
        places: where each named axis lies once the axes on the left are split; -1 for new ones.
        lengths: of these axes.
        names: of these axes.
    """
    if has_torch_function((tensor,)):  # each mode in force, the innermost first
        own = (pattern, reduction, places, lengths, names)
        return handle_torch_function(rearrange, (tensor,), tensor, *own)
    return _ORIGINALS[0](tensor, pattern, reduction, **dict(zip(names, lengths, strict=True)))


def show_einops() -> None:
    """Let modes see einops' calls from now on, if it is loaded; once per process."""
    module: Any = sys.modules.get("einops.einops")
    original = getattr(module, "reduce", None)
    if original is None or getattr(original, "shown", False):
        return
    _ORIGINALS[:] = [original]

    @functools.wraps(original)
    def reduce(tensor: Any, pattern: Any, reduction: Any, **lengths: Any) -> Any:
        moves = isinstance(tensor, Tensor) and isinstance(reduction, str) and reduction in _MOVES
        is_plain = moves and lengths and all(type(own) is int for own in lengths.values())
        split = _split_axes(pattern) if is_plain and has_torch_function((tensor,)) else None
        if split is None:
            return original(tensor, pattern, reduction, **lengths)
        places = tuple(split.index(name) if name in split else -1 for name in lengths)
        values = tuple(lengths.values())
        return rearrange(tensor, pattern, reduction, places, values, tuple(lengths))

    reduce.shown = True  # type: ignore[attr-defined]
    module.reduce = reduce


def _split_axes(pattern: str) -> list[str] | None:
    """The axes on the left one by one; None where some have no name of their own."""
    names = re.sub("[()]", " ", pattern.partition("->")[0]).split()
    return names if all(name.isidentifier() for name in names) else None


__all__ = ["rearrange", "show_einops"]
