# ruff: noqa: A002, FBT001, FBT002 - the signatures are torch's own, for positional and keyword calls
"""Statistics over channels that count channel i with its gate value w_i.

The pruned layer averages over the channels that are left. So do these: at 0/1 gates they equal the
pruned layer exactly, in between they interpolate (sum of w_i x_i over sum of w_i).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from swan_surgery.gates.normalising import count_of, normalised


def _axes(dim: Any, ndim: int) -> tuple[int, ...]:
    if dim is None or dim == ():
        return tuple(range(ndim))
    return tuple(d % ndim for d in ((dim,) if isinstance(dim, int) else dim))


def _moments(x: Tensor, w: Tensor, axes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted mean, biased variance and count, axes kept."""
    count = count_of(w, x.shape, axes)
    axes = tuple(axes)
    mean = (x * w).sum(axes, keepdim=True) / count
    variance = ((x - mean).square() * w).sum(axes, keepdim=True) / count
    return mean, variance, count


def layer_norm(
    w: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_flags: Any,
) -> Tensor:
    """`F.layer_norm` over the channels that the gates leave."""
    axes = tuple(range(input.ndim - len(normalized_shape), input.ndim))
    normal = normalised(_wide(input), w, axes, eps, centred=True)
    return _affine(normal, weight, bias).to(input.dtype)


def rms_norm(
    w: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """`F.rms_norm` over the channels that the gates leave."""
    axes = tuple(range(input.ndim - len(normalized_shape), input.ndim))
    x = _wide(input)
    # Of the widened type, as torch's own kernels take it for half precision.
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    normal = normalised(x, w, axes, eps, centred=False)
    return _affine(normal, weight, None).to(input.dtype)


def group_norm(
    w: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_flags: Any,
) -> Tensor:
    """`F.group_norm` of [B, C, ...]; every group is left equally wide."""
    x = _wide(input).unflatten(1, (num_groups, -1))
    own, axes = w.unflatten(1, (num_groups, -1)), tuple(range(2, x.ndim))
    normal = normalised(x, own, axes, eps, centred=True).flatten(1, 2)
    shape = (-1, *[1] * (input.ndim - 2))
    weight = None if weight is None else weight.view(shape)
    return _affine(normal, weight, None if bias is None else bias.view(shape)).to(input.dtype)


def _wide(x: Tensor) -> Tensor:
    """Half precision is too short for sums of squares; torch's own norms widen it as well."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _kind(x: Tensor, dtype: torch.dtype | None = None) -> torch.dtype:
    """The dtype of a sum: gates may be wider than the model, their sums must not be."""
    if dtype is not None:
        return dtype
    return x.dtype if x.is_floating_point() or x.is_complex() else torch.int64


def _root(total: Tensor, power: float) -> Tensor:
    """The root whose slope at 0 is 0, as torch's own norms and deviations have it."""
    is_zero = total == 0
    return total.masked_fill(is_zero, 1.0).pow(1 / power).masked_fill(is_zero, 0.0)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """A tensor of its own in any case: the backward pass needs `x`, and an activation may work in place."""
    if weight is None and bias is None:
        return x.clone()
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def mean(
    w: Tensor, input: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    """`torch.mean` over the channels that the gates leave."""
    x = _wide(input if dtype is None else input.to(dtype))
    axes = _axes(dim, x.ndim)
    result = ((x * w).sum(axes, keepdim=True) / count_of(w, x.shape, axes)).to(_kind(input, dtype))
    return result if keepdim else result.squeeze(axes)


def sum_(
    w: Tensor, input: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    """`torch.sum` over the channels that the gates leave."""
    total = (_wide(input if dtype is None else input.to(dtype)) * w).sum(
        _axes(dim, input.ndim), keepdim=keepdim
    )
    return total.to(_kind(input, dtype))


def var_mean(
    w: Tensor,
    input: Tensor,
    dim: Any = None,
    unbiased: bool = True,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`torch.var_mean` over the channels that the gates leave."""
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    axes = _axes(dim, input.ndim)
    average, variance, count = _moments(_wide(input), w, axes)
    taken = float(unbiased) if correction is None else correction
    variance = (variance * count / (count - taken)).to(input.dtype)
    average = average.to(input.dtype)
    if keepdim:
        return variance, average
    return variance.squeeze(axes), average.squeeze(axes)


def var(w: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`torch.var` over the channels that the gates leave."""
    return var_mean(w, *args, **kwargs)[0]


def std(w: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`torch.std` over the channels that the gates leave."""
    return _root(var(w, *args, **kwargs), 2.0)


def norm(
    w: Tensor,
    input: Tensor,
    p: Any = 2,
    dim: Any = None,
    keepdim: bool = False,
    out: None = None,
    dtype: Any = None,
) -> Tensor:
    """`torch.norm`, the p-norm of any p, over the channels that the gates leave."""
    del out  # torch.norm hands it on; a result into given memory is no statistic of a model
    power = 2.0 if p in ("fro", None) else float(p)
    kind = _kind(input, dtype)
    x = _wide(input.to(kind)).abs()
    if math.isinf(power):
        extreme = amax if power > 0 else amin
        return extreme(w, x, dim, keepdim).to(kind)
    axes = _axes(dim, x.ndim)
    if power == 0:
        return ((x != 0) * w).sum(axes, keepdim=keepdim).to(kind)
    if power < 0:
        x = x.masked_fill(w == 0, 1.0)  # a closed zero must not become infinite
    return _root((x.pow(power) * w).sum(axes, keepdim=keepdim), power).to(kind)


def vector_norm(
    w: Tensor,
    x: Tensor,
    ord: Any = 2,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
) -> Tensor:
    """`torch.linalg.vector_norm` over the channels that the gates leave."""
    return norm(w, x, ord, dim, keepdim, dtype=dtype)


def linalg_norm(
    w: Tensor,
    A: Tensor,  # noqa: N803 - as torch calls it
    ord: Any = None,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
) -> Tensor:
    """`torch.linalg.norm` of vectors, over the channels that the gates leave."""
    return norm(w, A, ord, dim, keepdim, dtype=dtype)


def normalize(
    w: Tensor, input: Tensor, p: Any = 2.0, dim: Any = 1, eps: float = 1e-12, out: None = None
) -> Tensor:
    """`F.normalize`: divided by the p-norm over the channels that the gates leave."""
    del out
    return input / norm(w, input, p, dim, keepdim=True).clamp_min(eps)


def amax(w: Tensor, input: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    """`torch.amax` over the channels whose gate is not zero."""
    return input.masked_fill(w == 0, float("-inf")).amax(_axes(dim, input.ndim), keepdim=keepdim)


def amin(w: Tensor, input: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    """`torch.amin` over the channels whose gate is not zero."""
    return input.masked_fill(w == 0, float("inf")).amin(_axes(dim, input.ndim), keepdim=keepdim)


# By the name of the torch function or method; the first argument is the gates.
WEIGHTED: Mapping[str, Callable[..., Any]] = {
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "group_norm": group_norm,
    "mean": mean,
    "sum": sum_,
    "var": var,
    "std": std,
    "var_mean": var_mean,
    "norm": norm,
    "vector_norm": vector_norm,
    "linalg_vector_norm": vector_norm,
    "linalg_norm": linalg_norm,
    "normalize": normalize,
    "amax": amax,
    "amin": amin,
}


# torch takes numpy's names for these arguments, too.
_OTHER_NAMES = {"axis": "dim", "keepdims": "keepdim"}


def weighing(function: str, weights: Tensor) -> Callable[..., Any]:
    """The weighted form of a torch function, called like it."""

    def weighted(*args: Any, **kwargs: Any) -> Any:
        named = {_OTHER_NAMES.get(key, key): value for key, value in kwargs.items()}
        return WEIGHTED[function](weights, *args, **named)

    return weighted
