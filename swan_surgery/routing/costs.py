"""What a routed model costs: its parts, the mean at given shares, and the worst case."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from swan_surgery.costs.macs import count_macs
from swan_surgery.costs.params import count_params
from swan_surgery.models import Inputs
from swan_surgery.routing.parts import Parts
from swan_surgery.routing.routed_model import RoutedModel


@dataclass(frozen=True, slots=True)
class RoutedCosts:
    """MACs and parameters of the parts, for one input of the example's size.

    Attributes:
        given: MACs of the given model: all trunks and the full branch.
        trunks: MACs of the trunk at each switch (from the switch before).
        switches: MACs of each switch.
        lights: MACs of each light branch.
        full: MACs of the last full branch.
        light_params: parameters of each light branch.
        rest_params: parameters of what each light branch stands for.
        decide: how each switch decides: one that decides by the margin runs its light branch first.
        batch: samples in the example inputs, on which the parts were counted.
    """

    given: float
    trunks: tuple[float, ...]
    switches: tuple[float, ...]
    lights: tuple[float, ...]
    full: float
    light_params: tuple[int, ...]
    rest_params: tuple[int, ...]
    decide: tuple[str, ...]
    batch: int

    def expected(self, shares: Sequence[float], thresholds: Sequence[float] | None = None) -> float:
        """Mean MACs of one input.

        Args:
            shares: of all inputs that leave at each switch; what the full way takes is the rest.
            thresholds: of the switches: at -inf one does not run. By default all run.
        """
        ways = zip(self.trunks, self.switches, self.lights, strict=True)
        macs = [*(own for level in ways for own in level), self.full]
        runs = running_shares(self.decide, shares, thresholds).values()
        return sum(own * share for own, share in zip(macs, runs, strict=True))

    @property
    def worst(self) -> float:
        """MACs of an input that takes the full way."""
        return self.expected([0.0] * len(self.trunks))


def routed_costs(routed: RoutedModel, decide: Sequence[str] | None = None) -> RoutedCosts:
    """Count the parts of a routed model; `decide`: other ways of deciding than those in force."""
    inputs = routed.own_inputs()
    crossings = routed.crossings()
    chain = routed.parts.chain
    given = [inputs, *(Inputs((crossing,), {}) for crossing in crossings)]
    batch = crossings[0].shape[0]

    def macs(part: nn.Module, at: Inputs) -> float:
        return count_macs(part, at) / batch

    trunks = [macs(own.trunk, at) for own, at in zip(chain, given, strict=False)]
    full = macs(routed.parts.last, given[-1])
    behind = list(zip(chain, given[1:], strict=True))
    ways = decide or [routed.decision(level) for level in range(len(chain))]
    return RoutedCosts(
        given=sum(trunks) + full,
        trunks=tuple(trunks),
        switches=tuple(macs(own.switch, at) for own, at in behind),
        lights=tuple(macs(own.light, at) for own, at in behind),
        full=full,
        light_params=tuple(count_params(own.light) for own in chain),
        rest_params=tuple(_rest_params(own) for own in chain),
        decide=tuple(ways),
        batch=batch,
    )


def _rest_params(own: Parts) -> int:
    inner = own.full
    if not isinstance(inner, Parts):
        return count_params(inner)
    return count_params(inner.trunk) + _rest_params(inner)


def running_shares(
    decide: Sequence[str], shares: Sequence[float], thresholds: Sequence[float] | None = None
) -> dict[str, float]:
    """How often each part runs, by its name in `Parts`; trunk, switch and light branch of each switch, then the full one.

    Args:
        decide: how each switch decides: by the margin, the light branch runs for all, and the switch for none.
        shares: of all inputs that leave at each switch.
        thresholds: of the switches: at -inf nothing leaves, and neither switch nor light branch runs.
    """
    found: dict[str, float] = {}
    reaching, inside = 1.0, ""
    limits = [0.0] * len(decide) if thresholds is None else thresholds
    for way, share, limit in zip(decide, shares, limits, strict=False):
        looking = 0.0 if limit == float("-inf") else reaching
        found[f"{inside}trunk"] = reaching
        found[f"{inside}switch"] = 0.0 if way == "margin" else looking
        found[f"{inside}light"] = looking if way == "margin" else share
        reaching, inside = max(reaching - share, 0.0), f"{inside}full."
    return found | {inside.removesuffix("."): reaching}


__all__ = ["RoutedCosts", "routed_costs", "running_shares"]
