"""How operations run while planning: tensors without data, and what depends on data decided.

Floating-point tensors of a shell have shapes alone (device `meta`). Integers and masks that come
from the inputs or from factories are real: they decide paths and positions. Where a result's shape
depends on data that nobody has (which boxes score high?), everything is taken to be selected.
"""

from collections.abc import Callable
from typing import Any

import torch
import torchvision.ops  # noqa: F401 - registers torchvision's operations
from torch import Tensor
from torch.utils._pytree import tree_map_only


def run_op(op: Any, inputs: tuple[Tensor, ...], args: Any, kwargs: Any) -> Any:
    """Run an operation on a shell: floating-point tensors have no data, integers and masks do.

    Integers decide paths and positions, so what makes them makes real ones; where they meet `meta`,
    the result has no data either.
    """
    if not inputs:
        return _made_real(op, args, kwargs)
    if not any(tensor.is_meta for tensor in inputs):
        if kwargs.get("device") == _META:
            floats = kwargs.get("dtype") is not None and kwargs["dtype"].is_floating_point
            kwargs = {**kwargs, "device": _META if floats else torch.device("cpu")}
        return op(*args, **kwargs)
    shortcut = _SHORTCUTS.get(str(op))
    if shortcut is not None:
        return shortcut(*args, **kwargs)
    takes_positions = str(op.overloadpacket) in _INDEXING and inputs[0].is_meta
    if not all(tensor.is_meta for tensor in inputs) and not takes_positions:
        return _on_meta(op, *args, **kwargs)
    return op(*args, **kwargs)


def depends_on_values(op: Any, inputs: tuple[Tensor, ...]) -> bool:
    """Whether the shape of a result, or the path that follows, depends on values that are there."""
    if not inputs or any(tensor.is_meta for tensor in inputs):
        return False
    name = str(op.overloadpacket)
    by_mask = name in _INDEXING and any(t.dtype in _MASKS for t in inputs[1:])
    return by_mask or name in _BY_VALUE


_BY_VALUE = {
    "aten.nonzero",
    "aten.masked_select",
    "aten._local_scalar_dense",
    "aten._unique2",
    "torchvision.nms",
}
_MASKS = {torch.bool, torch.uint8}


def _made_real(op: Any, args: Any, kwargs: Any) -> Any:
    out = op(*args, **kwargs)
    if isinstance(out, Tensor) and out.is_meta and not out.is_floating_point():
        out = op(*args, **{**kwargs, "device": torch.device("cpu")})
        if str(op.overloadpacket) in _UNFILLED:
            out.zero_()  # what lies there by chance must decide nothing
    return out


_UNFILLED = {"aten.empty", "aten.empty_strided", "aten.new_empty"}

_META = torch.device("meta")
# These take real positions beside tensors without data.
_INDEXING = {"aten.index", "aten.index_put", "aten.index_put_"}


def _batch_norm_shape(
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
    return torch.empty_like(x), x.new_empty(width), x.new_empty(width)


def _layer_norm_shape(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What native_layer_norm returns, without its slow decomposition in Python."""
    lead = x.ndim - len(shape)
    fits = all(list(t.shape) == list(shape) for t in (weight, bias) if t is not None)
    plain = x.is_contiguous() and x.dtype in (torch.float32, torch.float64)
    if not (plain and shape and fits and list(x.shape[lead:]) == list(shape)):
        out: tuple[Tensor, Tensor, Tensor] = _on_meta(
            torch.ops.aten.native_layer_norm.default, x, shape, weight, bias, eps
        )
        return out
    x = torch.empty_like(x, device=_META)
    kept = (*x.shape[:lead], *(1,) * len(shape))
    return x, x.new_empty(kept), x.new_empty(kept)


def _addmm_shape(bias: Tensor, x: Tensor, weight: Tensor, **scales: float) -> Tensor:
    """What addmm returns, without its slow decomposition in Python."""
    sizes = (x.shape[0], weight.shape[-1])
    dtypes = {bias.dtype, x.dtype, weight.dtype}
    fits = x.ndim == weight.ndim == 2 and x.shape[1] == weight.shape[0]
    if not (fits and bias.shape == sizes[1:] and len(dtypes) == 1 and not scales):
        out: Tensor = _on_meta(torch.ops.aten.addmm.default, bias, x, weight, **scales)
        return out
    return x.new_empty(sizes, device=_META)


def _sum_shape(one: Tensor, two: Any, **options: Any) -> Tensor:
    return _same_shape(torch.ops.aten.add.Tensor, one, two, **options)


def _product_shape(one: Tensor, two: Any) -> Tensor:
    return _same_shape(torch.ops.aten.mul.Tensor, one, two)


def _gelu_shape(x: Tensor, **options: Any) -> Tensor:
    return _same_shape(torch.ops.aten.gelu.default, x, **options)


def _same_shape(op: Any, one: Tensor, *others: Any, **options: Any) -> Tensor:
    """What an elementwise operation returns; torch's own way where anything needs thought."""
    plain = one.is_floating_point() and one.is_contiguous()
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
        return torch.empty_like(one, device=_META)
    result: Tensor = _on_meta(op, one, *others, **options)
    return result


def _on_meta(op: Any, *args: Any, **kwargs: Any) -> Any:
    args, kwargs = tree_map_only(Tensor, lambda t: t.to(_META), (args, kwargs))
    return op(*args, **kwargs)


def _all_nonzero(tensor: Tensor) -> Tensor:
    return torch.ones(tensor.shape, dtype=torch.bool).nonzero()


def _all_selected(tensor: Tensor, mask: Tensor) -> Tensor:
    return tensor.new_empty(torch.broadcast_shapes(tensor.shape, mask.shape).numel())


def _indexed(tensor: Tensor, indices: list[Tensor | None]) -> Tensor:
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


def _all_boxes(boxes: Tensor, _scores: Tensor, _threshold: float) -> Tensor:
    return torch.arange(boxes.shape[0])


# Operations that torch computes slowly, or not at all, on the meta device.
_SHORTCUTS: dict[str, Callable[..., Any]] = {
    "aten.native_batch_norm.default": _batch_norm_shape,
    "aten.native_layer_norm.default": _layer_norm_shape,
    "aten.addmm.default": _addmm_shape,
    "aten.add.Tensor": _sum_shape,
    "aten.mul.Tensor": _product_shape,
    "aten.gelu.default": _gelu_shape,
    "aten.nonzero.default": _all_nonzero,
    "aten.masked_select.default": _all_selected,
    "aten.index.Tensor": _indexed,
    "torchvision.nms.default": _all_boxes,
}
