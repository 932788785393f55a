"""What measures and fits leaves nothing half done."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from swan_surgery.adaptive.adaptive_model import AdaptiveModel
from swan_surgery.calibration import norms_of


@contextmanager
def unchanged_if_it_fails(adapted: AdaptiveModel) -> Iterator[None]:
    """All that is measured or fitted is as before when the block fails; `execution` in any case."""
    execution, ceiling = adapted.execution, adapted.max_macs
    before = [own.clone() for own in _fitted(adapted)]
    try:
        yield
    except BaseException:
        adapted.max_macs = ceiling
        with torch.no_grad():
            for tensor, old in zip(_fitted(adapted), before, strict=True):
                tensor.copy_(old)
        raise
    finally:
        adapted.execution = execution


def _fitted(adapted: AdaptiveModel) -> list[Tensor]:
    """Statistics of the model and of its widths, means, readers, and what looks."""
    own = [tensor for block in adapted.blocks().values() for tensor in block.own_state().values()]
    norms = [buffer for norm in norms_of(adapted) for buffer in norm.buffers()]
    return [*own, *norms]


__all__ = ["unchanged_if_it_fails"]
