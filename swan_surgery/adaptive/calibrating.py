"""Batch-norm statistics and means of every width, measured as each width runs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from swan_surgery.adaptive.adaptive_model import AdaptiveModel
from swan_surgery.adaptive.block import AdaptiveBlock
from swan_surgery.adaptive.checks import batches_of, check_adaptive
from swan_surgery.adaptive.levels import LevelStatistics
from swan_surgery.adaptive.rollback import unchanged_if_it_fails
from swan_surgery.adaptive.run import Levels
from swan_surgery.calibration import Moments, measure_norms_, norms_of
from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import InputError
from swan_surgery.models.batches import run_on_batch
from swan_surgery.models.modes import evaluating


# Runs of a batch with widths at random.
_DRAWS = 2


class _Seen:
    """What one block met, level by level."""

    def __init__(self) -> None:
        self.norms: dict[tuple[str, int], Moments] = {}
        self.sums: dict[tuple[str, int], Tensor] = {}
        self.counts: dict[tuple[str, int], Any] = {}

    def reads(self, reader: str, level: int, mean: Tensor, count: int | Tensor) -> None:
        """Add up means of what a reader gets."""
        key = reader, level
        self.sums[key] = self.sums.get(key, 0) + mean.double() * count
        self.counts[key] = self.counts.get(key, 0) + count

    def normalises(self, norm: str, level: int, x: Tensor) -> None:
        """Add up moments."""
        self.norms.setdefault((norm, level), Moments()).update(x)


def calibrate_widths(
    adapted: AdaptiveModel,
    loader: Iterable[Any],
    *,
    num_batches: int | None = None,
    among: Literal["uniform", "mixed"] = "uniform",
    full: bool = False,
) -> int:
    """Measure batch-norm statistics and the means of closed channels, for every width on its own.

    All units are computed while the blocks read as their widths do, so that the mean of what a width
    leaves out is known too. No weight changes. Call it after `adapt`, and again after training, before
    `fit_widths`.

    Args:
        adapted: the result of `adapt`; changed in place.
        loader: batches as `calibrate` takes them; held in memory while each width runs them.
        num_batches: how many batches to use at most; all of them by default.
        among: "uniform": at each width all blocks have that width, which is right for `adapted.at` and
            `per="network"`. "mixed": every sample has a width of its own in every block, drawn at random,
            so that a width is measured on all kinds of inputs: measured on those that choose it, it would
            normalise away what they have in common. `fit_widths` does this in the shares that it found.
            Free units have one mean each: "uniform" measures it with everything open, "mixed" as the gates
            now decide. Blocks of neurons: "mixed" measures it over the tokens that close them.
        full: measure the widest width and the norms outside of blocks too, as after training; the model
            with everything open then no longer is the given one. Of free units all norms, under the gates
            where they are "mixed".

    Returns:
        The number of batches used.

    Raises:
        ModelError: `adapted` is not an adaptive model, or compact.
        InputError: the loader yields no batch, or they give NaN statistics.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> adapted = swan.adapt(net, torch.zeros(2, 3))
        >>> swan.calibrate_widths(adapted, [torch.randn(16, 3) for _ in range(4)])  # batches used
        4
    """
    check_adaptive(adapted, to="calibrate")
    if among not in ("uniform", "mixed"):
        raise InputError(f'among must be "uniform" or "mixed"; got {among!r}')
    batches = batches_of(loader, num_batches)
    with unchanged_if_it_fails(adapted):
        if full and norms_of(adapted):
            as_gated = adapted.structure.kind != "nested" and among == "mixed"
            with adapted.holding({} if as_gated else -1):
                measure_norms_(adapted, batches)
        observe_(adapted, batches, among=among)
    return len(batches)


def observe_(
    adapted: AdaptiveModel,
    batches: list[Any],
    *,
    among: str,
    shares: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Statistics of all widths but the widest, by runs of these batches.

    `shares`: of the widths by block, where they are drawn at random; all the same by default.
    """
    blocks = adapted.blocks()
    seen = {name: _Seen() for name in blocks}
    before = adapted.execution
    adapted.execution = "observe"
    for name, block in blocks.items():
        block.observer = seen[name]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad(), streams_kept(), evaluating(adapted):
            for batch in batches:
                for levels in _levels(adapted, batch, among, shares, generator):
                    with adapted.holding(levels):
                        run_on_batch(adapted, batch)
    finally:
        adapted.execution = before
        for block in blocks.values():
            block.observer = None
    _check(seen)
    for name, block in blocks.items():
        _write_(block, seen[name])


def _levels(
    adapted: AdaptiveModel,
    batch: Any,
    among: str,
    shares: Mapping[str, Sequence[float]] | None,
    generator: torch.Generator,
) -> list[Levels | Mapping[str, Levels]]:
    """The levels of the runs of one batch."""
    if adapted.structure.kind != "nested":
        return [-1 if among == "uniform" else {}]
    names, count = list(adapted.costs.blocks), len(adapted.widths)
    if among == "uniform":
        return [*range(count - 1)]
    first = next(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
    odds = [(1.0,) * count if shares is None else shares[name] for name in names]
    if adapted.structure.per == "network":
        odds = odds[:1]
    table = torch.tensor(odds, dtype=torch.float64)
    found: list[Levels | Mapping[str, Levels]] = []
    for _ in range(_DRAWS):
        drawn = torch.multinomial(table, len(first), replacement=True, generator=generator).T
        found.append(drawn.expand(-1, len(names)).to(first.device))
    return found


def _check(seen: Mapping[str, _Seen]) -> None:
    for own in seen.values():
        squares = [m.squares for m in own.norms.values() if m.squares is not None]
        if not all(bool(t.isfinite().all()) for t in [*squares, *own.sums.values()]):
            raise InputError("the batches give NaN or infinite statistics; they are unchanged")


def _write_(block: AdaptiveBlock, seen: _Seen) -> None:
    for (name, level), own in seen.norms.items():
        into = _statistics(block, level).norm(name)
        assert own.mean is not None  # noqa: S101 - it was updated
        assert own.squares is not None  # noqa: S101
        width = len(into["running_mean"])
        into["running_mean"].copy_(own.mean[:width])
        into["running_var"].copy_((own.squares / own.count)[:width])
    for (name, level), total in seen.sums.items():
        _statistics(block, level).mean(name).copy_(total / seen.counts[name, level])


def _statistics(block: AdaptiveBlock, level: int) -> LevelStatistics:
    found = block.statistics[level]
    assert isinstance(found, LevelStatistics)  # noqa: S101 - made so
    return found


__all__ = ["calibrate_widths"]
