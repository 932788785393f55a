"""Thresholds that meet a target on what was observed: a harm, a share or a cost."""

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

from swan_surgery.errors import BudgetError, InputError
from swan_surgery.routing.bounds import p_value, upper
from swan_surgery.routing.costs import RoutedCosts, routed_costs
from swan_surgery.routing.observing import Observed
from swan_surgery.routing.parts import Ending
from swan_surgery.routing.routed_model import Decide, RoutedModel


def ways_of(routed: RoutedModel, observed: Observed, level: int) -> tuple[Decide, ...]:
    """The ways of deciding that a switch may take.

    Raises:
        InputError: a margin, and outputs that are no class scores.
    """
    own: Decide = routed.decide[level]
    if isinstance(routed.parts.chain[level].light, Ending):
        return ("label",)
    if own != "auto":
        if own not in observed.scores:
            raise InputError(
                f'decide={own!r} needs class scores [B, classes, ...] as the only output; take decide="predicted"'
            )
        return (own,)
    return tuple(way for way in ("predicted", "margin") if way in observed.scores)


# Of a score, in float32 and another order of sums.
_ROUNDING = 1e-4
_Found = tuple[list[Decide], list[float], float]


class Finder:
    """Looks for thresholds on what was observed."""

    def __init__(self, routed: RoutedModel, observed: Observed) -> None:
        self.routed, self.observed = routed, observed
        self.levels = range(routed.num_switches)
        self.ways = [ways_of(routed, observed, level) for level in self.levels]
        self._costs: dict[tuple[str, ...], RoutedCosts] = {}

    def costs(self, decide: Sequence[str]) -> RoutedCosts:
        """Of the parts, with the switches deciding in these ways."""
        key = tuple(decide)
        if key not in self._costs:
            self._costs[key] = routed_costs(self.routed, key)
        return self._costs[key]

    def _cheapest(self, thresholds_for: Callable[[Sequence[Decide]], list[float] | None]) -> _Found:
        found: list[tuple[float, list[Decide], list[float]]] = []
        for ways in product(*self.ways):
            reached = thresholds_for(ways)
            if reached is not None:
                shares = shares_of(self.observed, ways, reached)
                found.append((self.costs(ways).expected(shares, reached), list(ways), reached))
        if not found:
            raise self._unreachable
        _, decide, thresholds = min(found, key=lambda entry: entry[0])
        return decide, thresholds, 1.0

    def for_harm(self, harm: float, delta: float) -> _Found:
        """The largest thresholds that pass the test, with harm and doubt in equal parts."""
        observed, count = self.observed, len(self.levels)
        assert observed.harm is not None  # noqa: S101 - checked before
        found: dict[tuple[int, str], float] = {}
        bounds: dict[tuple[int, str], float] = {}
        for level in self.levels:
            own = delta / (count * len(self.ways[level]))
            for way in self.ways[level]:
                scores, losses = observed.scores[way][level], observed.harm[level]
                threshold = largest_threshold(
                    scores, losses, harm / count, own, counts=observed.counts
                )
                total = float(losses[scores <= threshold].sum())
                found[level, way] = threshold
                bounds[level, way] = upper(total, observed.num_samples, own, counts=observed.counts)
        decide, thresholds, _ = self._cheapest(
            lambda ways: [found[level, way] for level, way in enumerate(ways)]
        )
        return decide, thresholds, sum(bounds[level, way] for level, way in enumerate(decide))

    def for_share(self, share: float) -> _Found:
        """Thresholds at which as many leave, the same part of those who reach each switch."""
        part = 1 - (1 - share) ** (1 / len(self.levels))
        return self._fewest(lambda ways: self._at_part(ways, part))

    def for_macs(self, macs: float) -> _Found:
        """As few leave as the mean cost allows."""
        if not 0 < macs <= 1:
            raise InputError(f"macs must be a share in (0, 1]; got {macs}")
        reachable: list[float] = []

        def thresholds_for(ways: Sequence[Decide]) -> list[float] | None:
            def cost(part: float) -> float:
                reached = self._at_part(ways, part)
                shares = shares_of(self.observed, ways, reached)
                return self.costs(ways).expected(shares, reached) / self.costs(ways).given

            reachable.append(cost(1.0))
            if cost(1.0) > macs:
                return None
            low, high = 0.0, 1.0
            for _ in range(30):
                middle = (low + high) / 2
                low, high = (low, middle) if cost(middle) <= macs else (middle, high)
            return self._at_part(ways, high)

        try:
            # What keeps most inputs on the full way within the cost.
            return self._fewest(thresholds_for)
        except BudgetError:
            least = min(reachable)
            raise BudgetError(
                f"mean MACs of {macs:.1%} cannot be met: with every input on the light branch it is {least:.1%} of the "
                f"given model's; switch earlier, or take a smaller light branch",
                unit="MACs",
                least=least,
                most=1.0,
            ) from None

    def _fewest(self, thresholds_for: Callable[[Sequence[Decide]], list[float] | None]) -> _Found:
        """Among ways that meet a cost: the one whose leaving samples are the least apart from the full branch."""
        found: list[tuple[float, list[Decide], list[float]]] = []
        for ways in product(*self.ways):
            reached = thresholds_for(ways)
            if reached is not None:
                found.append((self._loss(ways, reached), list(ways), reached))
        if not found:
            raise self._unreachable
        _, decide, thresholds = min(found, key=lambda entry: entry[0])
        return decide, thresholds, 1.0

    def _loss(self, decide: Sequence[Decide], thresholds: Sequence[float]) -> float:
        own = self.observed.apart if self.observed.harm is None else self.observed.harm
        total, staying = 0.0, torch.ones(own.shape[1], dtype=torch.bool)
        for level, (way, threshold) in enumerate(zip(decide, thresholds, strict=True)):
            leaves = staying & (self.observed.scores[way][level] <= threshold)
            total += float(own[level][leaves].sum())
            staying &= ~leaves
        return total

    def _at_part(self, ways: Sequence[Decide], part: float) -> list[float]:
        staying = torch.ones(self.observed.num_samples, dtype=torch.bool)
        thresholds = []
        for level, way in enumerate(ways):
            scores = self.observed.scores[way][level]
            own = scores[staying].sort().values
            count = round(part * len(own))
            thresholds.append(_behind(own, count - 1) if count else float("-inf"))
            staying &= scores > thresholds[-1]
        return thresholds

    @property
    def _unreachable(self) -> BudgetError:
        return BudgetError("no way of deciding meets the target", unit="MACs")


def largest_threshold(
    scores: Tensor, losses: Tensor, harm: float, delta: float, *, counts: bool
) -> float:
    """The largest of the scores at which the test still passes; -inf where none does.

    Args:
        scores: [N].
        losses: [N], between 0 and 1.
        harm: what the mean of 1{score <= t} loss shall be at most.
        delta: with what probability it may be more.
        counts: losses are 0 or 1.
    """
    order = scores.argsort(stable=True)
    ordered, totals = scores[order], losses[order].cumsum(0)
    # Samples of one score leave together.
    ends = torch.cat([ordered[1:] != ordered[:-1], torch.ones(1, dtype=torch.bool)]).nonzero()[:, 0]
    low, high = -1, len(ends) - 1  # the test passes at `low`
    while low < high:
        middle = (low + high + 1) // 2
        total = float(totals[ends[middle]])
        if p_value(total, len(scores), harm, counts=counts) <= delta:
            low = middle
        else:
            high = middle - 1
    return _behind(ordered, int(ends[low])) if low >= 0 else float("-inf")


def _behind(ordered: Tensor, place: int) -> float:
    """A threshold behind a sample and as far before the next, so that rounding moves neither across.

    On the sample it does what its score would, and so do all thresholds in between: the guarantee is the same.
    """
    last = float(ordered[place])
    if place + 1 < len(ordered):
        return (last + float(ordered[place + 1])) / 2
    return last + _ROUNDING * abs(last)


def shares_of(
    observed: Observed, decide: Sequence[str], thresholds: Sequence[float]
) -> list[float]:
    """Which parts of the samples leave at each switch."""
    staying = torch.ones(observed.num_samples, dtype=torch.bool)
    shares = []
    for level, (way, threshold) in enumerate(zip(decide, thresholds, strict=True)):
        leaves = staying & (observed.scores[way][level] <= threshold)
        shares.append(float(leaves.double().mean()))
        staying &= ~leaves
    return shares


def harmed_by(
    observed: Observed, decide: Sequence[str], thresholds: Sequence[float]
) -> tuple[float, ...]:
    """The losses of all that may leave at each switch, summed; none without labels."""
    if observed.harm is None:
        return ()
    pairs = zip(decide, thresholds, strict=True)
    return tuple(
        float(observed.harm[level][observed.scores[way][level] <= threshold].sum())
        for level, (way, threshold) in enumerate(pairs)
    )


__all__ = ["Finder", "harmed_by", "largest_threshold", "shares_of", "ways_of"]
