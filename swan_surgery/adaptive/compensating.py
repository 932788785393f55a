"""`compensate_widths`: every width of a nested model reads what stays open with weights solved for it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from swan_surgery.adaptive.adaptive_model import AdaptiveModel
from swan_surgery.adaptive.checks import batches_of, check_adaptive
from swan_surgery.adaptive.levels import STATISTICS, LevelStatistics
from swan_surgery.adaptive.nested_block import NestedBlock
from swan_surgery.cutting.compensation.compensating import Compensation, compensate_only
from swan_surgery.errors import ModelError


def compensate_widths(
    adapted: AdaptiveModel,
    batches: Iterable[Any],
    *,
    damping: float = 0.01,
    num_batches: int | None = None,
    progress: bool = False,
) -> dict[float, Compensation]:
    """Give the readers of every width weights of their own, solved for so that blocks give what they give at full width.

    `swan.compensate` for each width with all blocks at it, but only layers that read the channels which
    adapt change (and batch-norm statistics in the blocks). They are kept beside those of the full width: a copy of the first
    inputs of each reader for every width but the widest. MACs and time stay as they are; widths train apart there, and
    share what writes the channels. A width whose outputs come out further from the full one's than before keeps its
    shared weights.

    Call it after `calibrate_widths` and before training; afterwards, or where weights have changed, it
    starts from the readers each width has by then. What a block of mixed widths brings to the next is not foreseen:
    `calibrate_widths(among="mixed")` and `fit_widths(statistics=...)` take its statistics into account.

    Args:
        adapted: nested; changed in place.
        batches: as of `swan.compensate`, 512 to 1,024 samples as in training; held in memory.
        damping: as of `swan.compensate`.
        num_batches: how many batches to use at most; all of them by default.
        progress: show a bar for each width on stderr.

    Returns:
        What came of it, by width.

    Raises:
        ModelError: not an adaptive model, a compact one, or one that is not nested.
        InputError: no batches, or `damping` not positive.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> adapted = swan.adapt(net, torch.zeros(2, 8))
        >>> done = swan.compensate_widths(adapted, [torch.randn(256, 8)])
        >>> done[0.5].after < done[0.5].before
        True
    """
    check_adaptive(adapted, to="compensate the widths of")
    if adapted.structure.kind != "nested":
        raise ModelError(
            "free units and blocks of neurons have no widths to compensate: every sample may close others; fit_widths "
            "takes means of what is closed into account"
        )
    held = batches_of(batches, num_batches)
    found, solved = {}, {}
    with torch.inference_mode(mode=False), torch.no_grad():
        reference, only = adapted.dense_model(), _may_change(adapted)
        for width in adapted.widths[:-1]:
            solved[width] = adapted.at(width)
            found[width] = compensate_only(
                solved[width], reference, held, only=only, damping=damping, progress=progress
            )
        for level, width in enumerate(found):
            if found[width].kept:
                _take_over_(adapted, level, solved[width])
    return found


def _may_change(adapted: AdaptiveModel) -> frozenset[str]:
    """Weights of readers, and statistics of norms inside the blocks."""
    names = set()
    for block in adapted.blocks().values():
        statistics = block.statistics[0]
        assert isinstance(statistics, LevelStatistics)  # noqa: S101 - made so
        names |= {_inside(block.name, f"{reader}.weight") for reader in statistics.readers}
        names |= {
            _inside(block.name, f"{norm}.{own}") for norm in statistics.norms for own in STATISTICS
        }
    return frozenset(names)


def _take_over_(adapted: AdaptiveModel, level: int, small: nn.Module) -> None:
    """Readers and statistics of a level become those of a static model."""
    for name, block in adapted.blocks().items():
        assert isinstance(block, NestedBlock)  # noqa: S101 - of structure "nested"
        module = small.get_submodule(name)
        tensors = dict([*module.named_parameters(), *module.named_buffers()])
        statistics: Any = block.statistics[level]
        wanted = block.tensors(level)
        block.own_readers_(level, wanted | {k: tensors[k] for k in wanted if k in tensors})
        for norm in statistics.norms:
            for own, tensor in statistics.norm(norm).items():
                tensor.copy_(tensors[_inside(norm, own)])


def _inside(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


__all__ = ["compensate_widths"]
