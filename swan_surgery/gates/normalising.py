"""x less its mean over its deviation, over the channels that the gates leave: one node of autograd.

Torch would write the same as sixteen operations, each with its own backward pass and its own copy of the
activation: too many launches for a GPU, and too much memory. With p = w / sum w,

    mu = sum p x,   v = sum p (x - mu)^2,   r = (v + eps)^-1/2,   y = (x - mu) r

and S1 = sum g, S2 = sum g y for the gradient g on y,

    dL/dx = r (g - p (S1 + y S2)),   dL/dw = -(S1 y + S2 (y^2 - v r^2) / 2) / sum w

Without a mean (root mean square), mu = 0 and S1 = 0.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad


def normalised(x: Tensor, w: Tensor, axes: Sequence[int], eps: float, *, centred: bool) -> Tensor:
    """The normalised values, of the shape of `x`.

    Args:
        x: any shape, float32 or wider.
        w: gate values, of as many axes as `x`; 1 where they are the same along one.
        axes: over which means are taken.
        eps: added to the variance.
        centred: subtract the mean (layer norm), or do not (RMS norm).
    """
    x = x.to(torch.promote_types(x.dtype, w.dtype))
    how = _How(tuple(axes), eps, centred)
    if _must_be_plain():
        return _plain(x, w, how)[0]
    result: Tensor = _Normalised.apply(x, w, how)
    return result


class _How(NamedTuple):
    axes: tuple[int, ...]
    eps: float
    centred: bool


def _must_be_plain() -> bool:
    """Where the operations themselves are asked for: by a compiler, `torch.func`, forward gradients."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()  # noqa: SLF001 - as torch's own Function asks
        or forward_ad._current_level >= 0  # noqa: SLF001 - there is no public question
    )


def count_of(w: Tensor, shape: Sequence[int], axes: Sequence[int]) -> Tensor:
    """How many positions the gates leave, keeping the axes."""
    wide = w.expand([shape[a] if a in axes else w.shape[a] for a in range(w.ndim)])
    return wide.sum(tuple(axes), keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)


def _plain(x: Tensor, w: Tensor, how: _How) -> tuple[Tensor, Tensor, Tensor]:
    """Values, 1 / deviation, count."""
    axes, eps, _ = how
    count = count_of(w, x.shape, axes)
    if how.centred:
        x = x - (x * w).sum(axes, keepdim=True) / count
    r = ((x.square() * w).sum(axes, keepdim=True) / count + eps).rsqrt()
    return x * r, r, count


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, how: _How) -> Tensor:
        y, r, count = _plain(x, w, how)
        ctx.save_for_backward(x, w, y, r, count)
        ctx.how = how
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        x, w, y, r, count = ctx.saved_tensors
        axes, eps, centred = ctx.how
        is_wanted = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # to be differentiated again
            wanted = [t for t, needed in zip((x, w), is_wanted, strict=True) if needed]
            again = _plain(x, w, ctx.how)[0]
            found = iter(torch.autograd.grad(again, wanted, g, create_graph=True))
            return *(next(found) if needed else None for needed in is_wanted), None
        second = (g * y).sum(axes, keepdim=True)
        first = g.sum(axes, keepdim=True) if centred else None
        of_x = of_w = None
        if is_wanted[0]:
            pull = y * second if first is None else y * second + first
            of_x = r * (g - pull * (w / count))
        if is_wanted[1]:
            moved = (y.square() - (1 - eps * r.square())) * (second / (2 * count))
            moved = moved if first is None else moved + y * (first / count)
            of_w = -moved.sum_to_size(w.shape)
        return of_x, of_w, None


__all__ = ["count_of", "normalised"]
