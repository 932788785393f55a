"""What a gated model costs is worked out once, kept with it, and worked out anew when it changes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from swan_surgery.channels import ChannelMap, channel_map
from swan_surgery.costs.table import CostTable, Unit
from swan_surgery.errors import CostError, SwanError
from swan_surgery.gates import GatedModel
from swan_surgery.gates.checks import check_gated
from swan_surgery.models.architecture import structure_of


_CHANGED = "the model was changed since it was gated"
_ADVICE = "gate it anew: swan.swanify(swan.unswanify(gated), example_inputs)"


@dataclass(slots=True)
class _Kept:
    """A value, and what it was worked out from: the model's structure, and objects to be the same."""

    structure: tuple[object, ...]
    sources: tuple[object, ...]
    value: Any


def _kept(
    gated: GatedModel, name: str, make: Callable[[], object], *, source: object = None
) -> _Kept:
    """What `make()` gave for the model as it is, with its map, its example inputs and `source`."""
    structure = structure_of(gated.model)
    sources = (gated.channels, gated.example_inputs, source)
    entry = gated.kept.get(name)
    if (
        entry is None
        or any(old is not new for old, new in zip(entry.sources, sources, strict=True))
        or entry.structure != structure
    ):
        entry = gated.kept[name] = _Kept(structure, sources, make())
    assert isinstance(entry, _Kept)  # noqa: S101 - nobody else writes there
    return entry


def kept_table(
    gated: GatedModel, unit: Unit, make: Callable[[], CostTable], *, source: object = None
) -> CostTable:
    """The table that `make()` gave for the model as it is now, on the device of its gates.

    Args:
        gated: the gated model, which keeps the table.
        unit: what the table counts; a model has one of each.
        make: called where there is none, or where the model, its map, its example inputs or `source`
            is not what it was.
        source: what else the table is made of.

    Raises:
        ModelError: `gated` is not a gated model.
    """
    if type(gated) is not GatedModel:
        check_gated(gated)

    def checked() -> CostTable:
        check_gated(gated)  # looks at every module: not in every step
        return make()

    entry = _kept(gated, unit, checked, source=source)
    device = gated.gates.logits.device
    if entry.value.factors.device != device:
        entry.value = entry.value.to(device)
    table: CostTable = entry.value
    return table


def channels_now(gated: GatedModel) -> ChannelMap:
    """The channel map of the model and the example inputs as they are, in the units of the gates.

    It is `gated.channels` while they are as they were mapped. A new head has another width, other
    inputs cost something else: then the model is mapped anew.

    Raises:
        CostError: the units that the gates stand for are no longer there.
    """
    channels: ChannelMap = _kept(gated, "channels", lambda: _channels_now(gated)).value
    return channels


def _channels_now(gated: GatedModel) -> ChannelMap:
    same_inputs = gated.example_inputs is gated.mapped_inputs
    if same_inputs and structure_of(gated.model) == gated.mapped_structure:
        return gated.channels
    try:
        found = channel_map(
            gated.model,
            gated.own_inputs(),
            ignore=gated.ignored,
            free_outputs=gated.free_outputs,
        )
    except SwanError as err:
        raise CostError(f"{_CHANGED} and cannot be mapped anew ({err}); {_ADVICE}") from err
    by_slots = {frozenset(found.slots(unit)): unit for unit in range(found.num_units)}
    new = {}
    for unit in range(gated.channels.num_units):
        slots = gated.channels.slots(unit)
        place = by_slots.get(frozenset(slots))
        if place is None:
            tensor, axis, index = slots[0]
            raise CostError(
                f"{_CHANGED}: unit {unit} of its gates (among others position {index} on axis {axis} of "
                f"{tensor!r}) is no longer what it was; {_ADVICE}"
            )
        new[place] = unit
    return found.renumbered(new)


__all__ = ["channels_now", "kept_table"]
