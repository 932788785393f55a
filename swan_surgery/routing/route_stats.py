"""What inputs take in a routed model: who leaves where, what that harms, and what it costs in MACs and in time."""

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from swan_surgery.environment.machine import environment, wait_for
from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import InputError, ModelError
from swan_surgery.models.modes import evaluating
from swan_surgery.routing.certificate import Certificate
from swan_surgery.routing.costs import routed_costs
from swan_surgery.routing.figures import Curve, RouteStats
from swan_surgery.routing.finding import shares_of
from swan_surgery.routing.observing import Harm, Observed, observe, weights_digest
from swan_surgery.routing.parts import Ending
from swan_surgery.routing.routed_model import RoutedModel
from swan_surgery.routing.rows import arguments_of
from swan_surgery.routing.takes import apart_of, mean_of_those_who_leave, ways_taken


# Of the chart of discrepancies: parts of the samples, and the quantiles shown of each.
_BINS, _BAND = 40, (0.05, 0.5, 0.95)


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
    if isinstance(loader, Tensor) or not isinstance(loader, Iterable):
        raise InputError(
            f"a loader yields batches; got {type(loader).__name__}; for a single batch pass [batch]"
        )
    batches = list(loader)
    observed = observe(routed, batches, harm=loss)
    levels = range(routed.num_switches)
    decide = [_own_decision(routed, level) for level in levels]
    shares = shares_of(observed, decide, routed.thresholds)
    takes = ways_taken(observed, decide, routed.thresholds)
    costs = routed_costs(routed, decide)
    own, full, size = _times(routed, batches)
    return RouteStats(
        samples=observed.num_samples,
        decide=tuple(decide),
        shares=(*shares, 1 - sum(shares)),
        harm=None if observed.harm is None else mean_of_those_who_leave(observed.harm, takes),
        accuracy=_accuracy(observed, takes),
        apart=apart_of(observed, takes),
        macs=costs.expected(shares, routed.thresholds) / costs.given,
        worst_macs=costs.worst / costs.given,
        mean_ms=float(own.mean()),
        p95_ms=float(own.quantile(0.95)),
        full_mean_ms=float(full.mean()),
        full_p95_ms=float(full.quantile(0.95)),
        batch=size,
        after=routed.after,
        thresholds=tuple(routed.thresholds),
        curves=tuple(_curve(observed, decide, takes, level) for level in levels),
        certificate=_certificate(routed),
        environment=environment(routed.device),
    )


def _own_decision(routed: RoutedModel, level: int) -> str:
    is_ending = isinstance(routed.parts.chain[level].light, Ending)
    return "label" if is_ending else routed.decision(level)


def _accuracy(observed: Observed, takes: Tensor) -> tuple[float, float] | None:
    right = observed.right
    if right is None or right.ndim != 2:
        return None
    return float(right.gather(0, takes[None]).mean()), float(right[-1].mean())


def _certificate(routed: RoutedModel) -> Certificate | None:
    """The one found, where thresholds and weights are still those it is of."""
    found: Certificate | None = routed.certificate
    if found is None or not found.is_of(routed.decide, routed.thresholds):
        return None
    return found if found.model == weights_digest(routed.body) else None


def _curve(observed: Observed, decide: Sequence[str], takes: Tensor, level: int) -> Curve:
    """The discrepancy of those who reach a switch, in the order of their scores."""
    reach = (takes >= level).nonzero()[:, 0]
    order = observed.scores[decide[level]][level][reach].argsort(stable=True)
    apart = observed.apart[level][reach][order]
    parts = apart.tensor_split(min(_BINS, len(apart))) if len(apart) else ()
    quantiles = torch.tensor(_BAND, dtype=torch.float64)
    bins = tuple(tuple(part.nan_to_num().quantile(quantiles).tolist()) for part in parts)
    left = float((takes[reach] == level).double().mean()) if len(reach) else 0.0
    return Curve(len(reach), left, bins)


def _times(routed: RoutedModel, batches: list[Any]) -> tuple[Tensor, Tensor, int]:
    """Milliseconds per sample of every batch, routed, and with all on the full way; in turns. And samples in the largest."""
    size = 0
    found: tuple[list[float], list[float]] = ([], [])
    with evaluating(routed), torch.no_grad(), streams_kept(), routed.acting() as parts:
        runs: tuple[nn.Module, nn.Module] = (routed, _FullWay(parts))
        for index, batch in enumerate([batches[0], *batches]):  # the first one twice: to warm up
            args, kwargs = arguments_of(batch, routed.device)
            first = next(t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
            size = max(size, len(first))
            for times, run in zip(found, runs, strict=True):
                start = time.perf_counter()
                run(*args, **kwargs)
                wait_for(routed.device)
                if index:
                    times.append((time.perf_counter() - start) * 1e3 / len(first))
    own, full = (torch.tensor(times, dtype=torch.float64) for times in found)
    return own, full, size


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


__all__ = ["RouteStats", "route_stats"]
