"""What inputs take in a routed model: who leaves where, what that harms, and what it costs in MACs and in time."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from swan_surgery.environment.machine import wait_for
from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import InputError, ModelError
from swan_surgery.models.modes import evaluating
from swan_surgery.routing.costs import routed_costs
from swan_surgery.routing.finding import shares_of
from swan_surgery.routing.observing import Harm, Observed, observe
from swan_surgery.routing.parts import Ending
from swan_surgery.routing.routed_model import RoutedModel
from swan_surgery.routing.rows import arguments_of


@dataclass(frozen=True, slots=True)
class RouteStats:
    """What the samples of a loader take.

    Attributes:
        samples: how many.
        decide: how each switch decides.
        shares: of the samples that leave at each switch, and that take the full way.
        harm: mean of what is lost by those who leave (light wrong where full is right); None without labels.
        accuracy: of the routed and of the given model; None without labels of classes.
        apart: mean discrepancy to the full branch, over all samples; those that take the full way count 0.
        macs: mean MACs of a sample, over those of the given model.
        worst_macs: of a sample that takes the full way.
        mean_ms: wall time per sample, mean over batches.
        p95_ms: 95 % of the batches take at most this per sample.
        full_mean_ms: the same with every sample on the full way, measured in turns.
        full_p95_ms: likewise.
    """

    samples: int
    decide: tuple[str, ...]
    shares: tuple[float, ...]
    harm: float | None
    accuracy: tuple[float, float] | None
    apart: float
    macs: float
    worst_macs: float
    mean_ms: float
    p95_ms: float
    full_mean_ms: float
    full_p95_ms: float

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def __str__(self) -> str:
        leaving = ", ".join(f"{share:.1%}" for share in self.shares[:-1])
        lines = [
            f"{leaving} of {self.samples:,} samples leave early ({'/'.join(self.decide)})",
            f"mean discrepancy to the full way {self.apart:.3g}",
            f"MACs mean {self.macs:.1%} of the given model's, worst {self.worst_macs:.1%}",
            f"ms per sample mean {self.mean_ms:.3f}, p95 {self.p95_ms:.3f}",
            f"all on the full way: mean {self.full_mean_ms:.3f}, p95 {self.full_p95_ms:.3f}",
        ]
        if self.harm is not None:
            lines.insert(1, f"harm {self.harm:.2%}")
        if self.accuracy is not None:
            routed, full = self.accuracy
            lines.insert(1, f"accuracy {routed:.2%}, of the given model {full:.2%}")
        return "\n".join(lines)


def route_stats(
    routed: RoutedModel, loader: Iterable[Any], *, loss: Harm | None = None
) -> RouteStats:
    """Which way the samples of a loader take, what that harms, and what it costs.

    Args:
        routed: with the thresholds that are to be judged; run in eval mode.
        loader: batches as `swan.calibrate_switch` takes them, held in memory; latencies are those of its batch size.
            Batches of one tell the spread over inputs.
        loss: as of `swan.calibrate_switch`.

    Raises:
        ModelError: not a routed model.
        InputError: no batch, or a loss that is not between 0 and 1.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> routed = swan.add_switch(net, "1", example_inputs=torch.randn(4, 3), light=0.5)
        >>> swan.route_stats(routed, [torch.randn(8, 3)]).shares  # no threshold yet
        (0.0, 1.0)
    """
    if not isinstance(routed, RoutedModel):
        raise ModelError(
            f"expected a routed model, got {type(routed).__name__}; call swan.add_switch first"
        )
    if not isinstance(loader, Iterable):
        raise InputError(f"a loader yields batches; got {type(loader).__name__}")
    batches = list(loader)
    observed = observe(routed, batches, harm=loss)
    levels = range(routed.num_switches)
    decide = [_own_decision(routed, level) for level in levels]
    shares = shares_of(observed, decide, routed.thresholds)
    takes = ways_taken(observed, decide, routed.thresholds)
    costs = routed_costs(routed, decide)
    own, full = _times(routed, batches)
    return RouteStats(
        samples=observed.num_samples,
        decide=tuple(decide),
        shares=(*shares, 1 - sum(shares)),
        harm=None if observed.harm is None else _mean_of_those_who_leave(observed.harm, takes),
        accuracy=_accuracy(observed, takes),
        apart=apart_of(observed, takes),
        macs=costs.expected(shares) / costs.given,
        worst_macs=costs.worst / costs.given,
        mean_ms=float(own.mean()),
        p95_ms=float(own.quantile(0.95)),
        full_mean_ms=float(full.mean()),
        full_p95_ms=float(full.quantile(0.95)),
    )


def _own_decision(routed: RoutedModel, level: int) -> str:
    is_ending = isinstance(routed.parts.chain[level].light, Ending)
    return "label" if is_ending else routed.decision(level)


def ways_taken(observed: Observed, decide: Sequence[str], thresholds: Sequence[float]) -> Tensor:
    """By sample the switch at which it leaves; as many as there are switches for the full way. int64 [N]."""
    takes = torch.full((observed.num_samples,), len(decide))
    for level in reversed(range(len(decide))):
        takes[observed.scores[decide[level]][level] <= thresholds[level]] = level
    return takes


def apart_of(observed: Observed, takes: Tensor) -> float:
    """Mean discrepancy to the full branch."""
    return _mean_of_those_who_leave(observed.apart, takes)


def _mean_of_those_who_leave(values: Tensor, takes: Tensor) -> float:
    """Over all samples; the full way counts 0. `values` [switches, N]."""
    table = torch.cat([values, torch.zeros_like(values[:1])])
    return float(table.gather(0, takes[None]).mean())


def _accuracy(observed: Observed, takes: Tensor) -> tuple[float, float] | None:
    right = observed.right
    if right is None or right.ndim != 2:
        return None
    return float(right.gather(0, takes[None]).mean()), float(right[-1].mean())


def _times(routed: RoutedModel, batches: list[Any]) -> tuple[Tensor, Tensor]:
    """Milliseconds per sample of every batch: routed, and with all on the full way; in turns."""
    found: tuple[list[float], list[float]] = ([], [])
    with evaluating(routed), torch.no_grad(), streams_kept(), routed.acting() as parts:
        runs: tuple[nn.Module, nn.Module] = (routed, _FullWay(parts))
        for index, batch in enumerate([batches[0], *batches]):  # the first one twice: to warm up
            args, kwargs = arguments_of(batch, routed.device)
            first = next(t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
            for times, run in zip(found, runs, strict=True):
                start = time.perf_counter()
                run(*args, **kwargs)
                wait_for(routed.device)
                if index:
                    times.append((time.perf_counter() - start) * 1e3 / len(first))
    own, full = (torch.tensor(times, dtype=torch.float64) for times in found)
    return own, full


class _FullWay(nn.Module):
    """The given model: trunks and the full branch, no switch."""

    def __init__(self, parts: Any) -> None:
        super().__init__()
        self.trunks = [own.trunk for own in parts.chain]
        self.last = parts.last

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the given model returns."""
        first, *others = self.trunks
        crossing = first(*args, **kwargs)
        for trunk in others:
            crossing = trunk(crossing)
        return self.last(crossing)


__all__ = ["RouteStats", "apart_of", "route_stats", "ways_taken"]
