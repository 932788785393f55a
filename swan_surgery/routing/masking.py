"""The mask of a switch layer: gates of this library on the channels that cross, and none elsewhere."""

import torch
from torch import Tensor, nn

from swan_surgery.channels import PINNED, ChannelMap, channel_map
from swan_surgery.cutting.pruning import prune
from swan_surgery.errors import ModelError, NoGateableChannelsError
from swan_surgery.gates import GatedModel
from swan_surgery.gates.conversion import swanify
from swan_surgery.models import Inputs, copy_of
from swan_surgery.routing.parts import Parts
from swan_surgery.routing.routed_model import RoutedModel


class _Marked(nn.Module):
    """A trunk whose output is multiplied channel by channel: what the marks are coupled with crosses."""

    def __init__(self, trunk: nn.Module, channels: int, axis: int) -> None:
        super().__init__()
        self.trunk, self.axis = trunk, axis
        self.marks = nn.Parameter(torch.ones(channels))

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """What crosses."""
        found: Tensor = self.trunk(*args, **kwargs)
        shape = [1] * found.ndim
        shape[self.axis] = -1
        return found * self.marks.view(shape).to(found.dtype)


def masked(parts: Parts, inputs: Inputs) -> GatedModel:
    """The parts, gated in place, with gates on what crosses alone.

    Raises:
        NoGateableChannelsError: no channel that crosses may go; says why.
    """
    ignored = _elsewhere(parts, inputs)
    return swanify(parts, inputs, ignore=ignored, in_place=True)


def _elsewhere(parts: Parts, inputs: Inputs) -> list[str]:
    """The layers none of whose output channels crosses."""
    probe = copy_of(parts)
    assert isinstance(probe, Parts)  # noqa: S101 - a copy of one
    names, prefixes = [], [""]
    for own in probe.chain:
        own.trunk = _Marked(own.trunk, own.switch.channels, own.switch.axis)
        names.append(f"{prefixes[-1]}trunk.marks")
        prefixes.append(f"{prefixes[-1]}full.")
    found = channel_map(probe, inputs)
    crossing = {unit for name in names for unit in found.units_on(name, 0)} - {PINNED}
    if not crossing:
        raise NoGateableChannelsError(
            f"no channel that crosses may go: {_why(found)}; add the switch without mask=True, or behind another module"
        )
    ignored = []
    for layer in found.layers:
        if crossing & set(layer.out_units):
            continue
        ignored.append(_unmarked(layer.name, prefixes))
    return ignored


def _unmarked(name: str, prefixes: list[str]) -> str:
    for prefix in reversed(prefixes):
        if name.startswith(f"{prefix}trunk.trunk"):
            return f"{prefix}trunk{name.removeprefix(f'{prefix}trunk.trunk')}"
    return name


def _why(found: ChannelMap) -> str:
    return next((str(pin) for pin in found.pins), "they are coupled with what must stay")


def cut_mask(routed: RoutedModel, **options: object) -> RoutedModel:
    """Cut the channels that the mask closed from trunk, switch and both branches, exactly; fewer bytes cross.

    Args:
        routed: with a mask (`mask=True`), trained; it is not changed.
        options: `macs=`, `params=`, `round_to=`, `verify=` and so on, as for `swan.prune`.

    Returns:
        A routed model without gates; it computes what the closed mask computed. Thresholds stay.

    Raises:
        ModelError: no mask.
        VerificationError: the cut model computes something else.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> routed = swan.add_switch(net, "1", example_inputs=torch.randn(4, 3), light=0.5, mask=True)
        >>> routed.gated.gates.logits.data[:3] = -3.0
        >>> small = swan.cut_mask(routed)
        >>> small.crossing_bytes()[0] / routed.crossing_bytes()[0]
        0.625
    """
    if not isinstance(routed, RoutedModel):
        raise ModelError(
            f"expected a routed model, got {type(routed).__name__}; call swan.add_switch first"
        )
    small = prune(routed.gated, **options)  # type: ignore[arg-type]  # handed on as they are
    assert isinstance(small, Parts)  # noqa: S101 - a cut keeps the class
    return with_body(routed, small)


def with_body(routed: RoutedModel, body: Parts | GatedModel) -> RoutedModel:
    """Another routed model with the same settings and other parts."""
    found = RoutedModel(
        body,
        after=routed.after,
        decide=routed.decide,
        example_inputs=routed.example_inputs,
        way=routed.way,
        discrepancy=routed.discrepancy,
        positive=routed.positive,
        frozen=routed.frozen,
    )
    found.thresholds = list(routed.thresholds)
    found.certificate = routed.certificate
    return found.train(routed.training)


__all__ = ["cut_mask", "masked", "with_body"]
