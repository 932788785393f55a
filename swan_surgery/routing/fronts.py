"""The parts of a routed model as models of their own, for several devices."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


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
