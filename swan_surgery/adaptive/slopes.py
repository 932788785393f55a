"""How efforts learn: what a block gives on the other side of a threshold, times the slope of the probability."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from swan_surgery.adaptive.run import Slope


def leaning(output: Any, other: Any, levels: Tensor, slope: Slope) -> Any:
    """A block's output, as it is, with the gradient of its effort: straight through (Eq. 6), a width for a unit.

    d output / d p is what the wider of the two widths gives, less what the narrower one does.

    Args:
        output: at the levels that samples took, one row per sample.
        other: at `slope.levels`, without gradients.
        levels: int64 (B,).
        slope: what lies beyond the nearest threshold.
    """
    sign = (slope.levels - levels).sign()
    rise = (slope.wider - slope.wider.detach()) * sign

    def lean(own: Any, beyond: Any) -> Any:
        if not isinstance(own, Tensor) or not own.is_floating_point():
            return own
        rows = rise.to(own.dtype).reshape(-1, *[1] * (own.ndim - 1))
        return own + rows * (beyond - own.detach())

    return tree_map(lean, output, other)


@contextmanager
def statistics_at_rest(module: nn.Module) -> Iterator[None]:
    """Inside, batch-norms in train mode leave their running statistics alone."""
    norms = [
        own for own in module.modules() if isinstance(own, _BatchNorm) and own.track_running_stats
    ]
    for own in norms:
        own.track_running_stats = False
    try:
        yield
    finally:
        for own in norms:
            own.track_running_stats = True


__all__ = ["leaning", "statistics_at_rest"]
