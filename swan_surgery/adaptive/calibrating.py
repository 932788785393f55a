"""Batch-norm statistics and means of every width, measured as each width runs."""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from swan_surgery.adaptive.adaptive_model import AdaptiveModel
from swan_surgery.adaptive.block import NestedBlock
from swan_surgery.adaptive.checks import check_adaptive
from swan_surgery.adaptive.levels import LevelStatistics, norms_of
from swan_surgery.adaptive.masked import mean_of
from swan_surgery.calibration import Moments, calibrate, observing
from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import InputError
from swan_surgery.models.batches import run_on_batch


class _Seen:
    """What one block met at one level."""

    def __init__(self, block: NestedBlock) -> None:
        self.norms = {name: Moments() for name in norms_of(block.full)}
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def record(self, name: str, reader: nn.Module, x: Tensor) -> Tensor:
        """Add up what a reader gets; gives the mean of this batch."""
        mean = mean_of(reader, x)
        self.sums[name] = self.sums.get(name, 0) + mean.double() * len(x)
        self.counts[name] = self.counts.get(name, 0) + len(x)
        return mean


def calibrate_widths(
    adapted: AdaptiveModel,
    loader: Iterable[Any],
    *,
    num_batches: int | None = None,
    among: Literal["uniform", "mixed"] | None = None,
    full: bool = False,
) -> int:
    """Measure batch-norm statistics and the means of closed channels, for every width on its own.

    All units are computed while the blocks read as their widths do, so that the mean of what a width
    leaves out is known too. No weight changes. Call it after `adapt`, and again after training, before
    `fit_routes`.

    Args:
        adapted: the result of `adapt`; changed in place.
        loader: batches as `calibrate` takes them; held in memory while each width runs them.
        num_batches: how many batches to use at most; all of them by default.
        among: what the other blocks do while a block is measured at a width. "uniform": they have the
            same width, which is right for `per="network"` and `adapted.at`. "mixed": widths at random,
            twice as many runs, for `per="block"`. By default what fits `per`.
        full: measure the widest width and the norms outside of blocks too, as after training; the model
            with everything open then no longer is the given one.

    Returns:
        The number of batches used.

    Raises:
        ModelError: `adapted` is not an adaptive model, or compact.
        InputError: the loader yields no batch, or they give NaN statistics.
    """
    check_adaptive(adapted, to="calibrate")
    batches = list(islice(loader, num_batches))
    if not batches:
        raise InputError("the loader yielded no batch; statistics are unchanged")
    if among is None:
        among = "mixed" if adapted.structure.per == "block" else "uniform"
    if full:
        with adapted.holding(-1):
            calibrate(adapted, batches)
    blocks = adapted.blocks()
    seen = {(name, i): _Seen(b) for name, b in blocks.items() for i in range(len(adapted.widths))}
    for levels in _assignments(list(blocks), len(adapted.widths), among):
        _observe(adapted, batches, levels, seen)
    for (name, level), own in seen.items():
        if level < len(adapted.widths) - 1:
            _write_(blocks[name], level, own)
    return len(batches)


def _assignments(names: list[str], count: int, among: str) -> list[dict[str, int]]:
    """Levels of all blocks in each run, every block at every level but the widest at least once."""
    if among == "uniform":
        return [dict.fromkeys(names, level) for level in range(count - 1)]
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(2):
        orders = [torch.randperm(count, generator=generator).tolist() for _ in names]
        found += [dict(zip(names, levels, strict=True)) for levels in zip(*orders, strict=True)]
    return found


def _observe(
    adapted: AdaptiveModel,
    batches: list[Any],
    levels: Mapping[str, int],
    seen: Mapping[tuple[str, int], _Seen],
) -> None:
    moments: dict[_BatchNorm, Moments] = {}
    blocks = adapted.blocks()
    for name, block in blocks.items():
        own = seen[name, levels[name]]
        block.recorder = own.record
        if levels[name] < len(adapted.widths) - 1:
            moments |= {norm: own.norms[key] for key, norm in norms_of(block.full).items()}
    before = adapted.execution
    adapted.execution = "observe"
    try:
        with adapted.holding(levels), observing(adapted, moments), torch.no_grad(), streams_kept():
            for batch in batches:
                run_on_batch(adapted, batch)
    finally:
        adapted.execution = before
        for block in blocks.values():
            block.recorder = None


def _write_(block: NestedBlock, level: int, seen: _Seen) -> None:
    statistics = block.statistics[level]
    assert isinstance(statistics, LevelStatistics)  # noqa: S101 - made so
    found = [m.mean for m in seen.norms.values()] + [m.squares for m in seen.norms.values()]
    if any(t is None or not bool(t.isfinite().all()) for t in [*found, *seen.sums.values()]):
        raise InputError("the batches give NaN or infinite statistics; not all could be measured")
    for name, own in seen.norms.items():
        into = statistics.norm(name)
        assert own.mean is not None  # noqa: S101 - checked above
        assert own.squares is not None  # noqa: S101
        width = len(into["running_mean"])
        into["running_mean"].copy_(own.mean[:width])
        into["running_var"].copy_((own.squares / own.count)[:width])
    for name, total in seen.sums.items():
        statistics.mean(name).copy_(total / seen.counts[name])


__all__ = ["calibrate_widths"]
