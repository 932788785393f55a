"""The parts of a routed model as models of their own, for several devices."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from swan_surgery.routing.parts import Parts


@dataclass(frozen=True, slots=True)
class Front:
    """What stays of a routed model when it lies on several devices (`RoutedModel.split`).

    Attributes:
        front: trunk and switch: inputs -> (what crosses, predicted discrepancy).
        light: the light branch: what crosses -> output.
        full: the full branch: what crosses -> output.
        crossing_bytes: bytes that cross for one sample.
    """

    front: nn.Module
    light: nn.Module
    full: nn.Module
    crossing_bytes: int


class TrunkAndSwitch(nn.Module):
    """The part of a routed model that every input passes."""

    def __init__(self, trunk: nn.Module, switch: nn.Module) -> None:
        super().__init__()
        self.trunk, self.switch = trunk, switch

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What crosses, and what the switch says of it."""
        crossing = self.trunk(*args, **kwargs)
        return crossing, self.switch(crossing)


def fronts_of(parts: Parts, crossing_bytes: Sequence[int]) -> tuple[Front, ...]:
    """One entry per switch; `crossing_bytes`: of one sample at each."""
    return tuple(
        Front(TrunkAndSwitch(own.trunk, own.switch).train(own.training), own.light, own.full, size)
        for own, size in zip(parts.chain, crossing_bytes, strict=True)
    )
