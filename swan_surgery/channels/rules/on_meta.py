"""What some operations return on tensors without data, where torch is slow there or needs the data.

Where the shape of a result depends on data that nobody has (which boxes score high?), everything is
taken to be selected.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from swan_surgery.calls.arguments import leaves_of
from swan_surgery.channels.rules.remembering import remembered


META = torch.device("meta")


def _like(x: Tensor) -> Tensor:
    """Of the same layout, without torch's decomposition in Python, which takes ten times as long."""
    if x.is_contiguous():
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=META)
    return torch.empty_like(x, device=META)


def batch_norm_shape(
    x: Tensor,
    _weight: Tensor | None,
    _bias: Tensor | None,
    _mean: Tensor | None,
    _var: Tensor | None,
    training: bool,  # noqa: FBT001
    *_: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What native_batch_norm returns, without its slow decomposition in Python."""
    width = (x.shape[1],) if training else (0,)
    return _like(x), x.new_empty(width), x.new_empty(width)


def layer_norm_shape(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What native_layer_norm returns, without its slow decomposition in Python."""
    lead = x.ndim - len(shape)
    fits = all(list(t.shape) == list(shape) for t in (weight, bias) if t is not None)
    plain = x.is_contiguous() and x.dtype in (torch.float32, torch.float64)
    if not (plain and shape and fits and list(x.shape[lead:]) == list(shape)):
        out: tuple[Tensor, Tensor, Tensor] = on_meta(
            torch.ops.aten.native_layer_norm.default, x, shape, weight, bias, eps
        )
        return out
    x = _like(x)
    kept = (*x.shape[:lead], *(1,) * len(shape))
    return x, x.new_empty(kept), x.new_empty(kept)


def group_norm_shape(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *sizes: int,  # samples, channels, pixels, groups
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """What native_group_norm returns, without its slow decomposition in Python."""
    plain = x.is_contiguous() and x.dtype in (torch.float32, torch.float64) and not options
    if plain and len(sizes) == 5:
        samples, channels, _, groups, _ = sizes
        fits = all(t.shape == (channels,) for t in (weight, bias) if t is not None)
        if fits and x.shape[:2] == (samples, channels) and groups and channels % groups == 0:
            kept = (samples, groups)
            mean, scale = (x.new_empty(kept, device=META) for _ in range(2))
            return _like(x), mean, scale
    out: tuple[Tensor, Tensor, Tensor] = on_meta(
        torch.ops.aten.native_group_norm.default, x, weight, bias, *sizes, **options
    )
    return out


def addmm_shape(bias: Tensor, x: Tensor, weight: Tensor, **scales: float) -> Tensor:
    """What addmm returns, without its slow decomposition in Python."""
    sizes = (x.shape[0], weight.shape[-1])
    dtypes = {bias.dtype, x.dtype, weight.dtype}
    fits = x.ndim == weight.ndim == 2 and x.shape[1] == weight.shape[0]
    if not (fits and bias.shape == sizes[1:] and len(dtypes) == 1 and not scales):
        out: Tensor = on_meta(torch.ops.aten.addmm.default, bias, x, weight, **scales)
        return out
    return x.new_empty(sizes, device=META)


def same_shape(op: Any) -> Callable[..., Tensor]:
    """What an elementwise operation returns, without its slow decomposition in Python."""

    def returned(*args: Any, **options: Any) -> Tensor:
        return _same_shape(op, *args, **options)

    return returned


def _same_shape(op: Any, one: Tensor, *others: Any, **options: Any) -> Tensor:
    """What an elementwise operation returns; torch's own way where anything needs thought."""
    plain = one.is_floating_point() and one.is_contiguous() and options.get("dtype") is None
    if plain and all(
        type(two) in (int, float)
        or (
            isinstance(two, Tensor)
            and two.shape == one.shape
            and two.dtype is one.dtype
            and two.is_contiguous()
        )
        for two in others
    ):
        return _like(one)
    result: Tensor = on_meta(op, one, *others, **options)
    return result


def on_meta(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation on the shapes of its tensors alone."""

    def run() -> Any:
        leaves = leaves_of((args, kwargs))
        if all(leaf.is_meta for leaf in leaves if isinstance(leaf, Tensor)):
            return op(*args, **kwargs)
        own, named = tree_map_only(Tensor, lambda t: t.to(META), (args, kwargs))
        return op(*own, **named)

    return remembered(op, args, kwargs, run)


def all_nonzero(tensor: Tensor) -> Tensor:
    """Of values that nobody has, none is zero."""
    return torch.ones(tensor.shape, dtype=torch.bool).nonzero()


def all_selected(tensor: Tensor, mask: Tensor) -> Tensor:
    """A mask that nobody has hides nothing."""
    return tensor.new_empty(torch.broadcast_shapes(tensor.shape, mask.shape).numel())


def indexed(tensor: Tensor, indices: list[Tensor | None]) -> Tensor:
    """A mask without data selects everything."""
    known = [
        torch.ones(index.shape, dtype=torch.bool)
        if index is not None and index.is_meta and index.dtype in (torch.bool, torch.uint8)
        else index
        for index in indices
    ]
    if any(index is not None and index.is_meta for index in known):
        tensor = tensor.to("meta")
    result: Tensor = torch.ops.aten.index.Tensor(tensor, known)
    return result


def all_boxes(boxes: Tensor, _scores: Tensor, _threshold: float) -> Tensor:
    """No box is suppressed."""
    return torch.arange(boxes.shape[0])
