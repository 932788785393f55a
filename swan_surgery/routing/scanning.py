"""`scan_switches`: what a switch would save and change at several depths of a model."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from swan_surgery.gates.checks import check_changeable
from swan_surgery.models import copy_of
from swan_surgery.routing.adding import add_switch
from swan_surgery.routing.bounds import check_level
from swan_surgery.routing.placing import MACS, Placement, data_of, depths_of, placements


def scan_switches(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    after: Sequence[str] | None = None,
    macs: float = MACS,
    example_inputs: Any = None,
    **options: Any,
) -> tuple[Placement, ...]:
    """Try a switch at several depths and say how many inputs leave, and how far outputs move, at one mean cost.

    The light branches are as `add_switch` makes them, compensated and untrained; so it compares places, and no training
    of a network. Every other batch makes them, the rest judges.

    Args:
        model: any network; it is not changed.
        batches: what it is used on, held in memory; no labels needed.
        after: the modules to try; by default a few that run once and return one tensor, spread evenly.
        macs: mean MACs of an input, over those of the model, at which all are compared.
        example_inputs: as of `add_switch`; by default the first samples of the first batch.
        options: `light=`, `decide=`, `discrepancy=` and so on, as for `add_switch`.

    Raises:
        ModelError: not a plain `nn.Module`.
        InputError: no batch, no such module, or the model cannot be run.

    Example:
        >>> layers = [layer for _ in range(4) for layer in (nn.Linear(8, 8), nn.ReLU())]
        >>> places = swan.scan_switches(nn.Sequential(*layers), [torch.randn(64, 8)], decide="margin", light=0.1)
        >>> [place.after for place in places]
        ['0', '2', '4', '6']
    """
    check_changeable(model)
    check_level("macs", macs)
    data, inputs = data_of(model, batches, example_inputs)

    def make(name: str, making: Sequence[Any]) -> Any:
        return add_switch(model, name, example_inputs=inputs, batches=making, **options).eval()

    names = depths_of(copy_of(model).eval(), inputs) if after is None else tuple(after)
    return placements(names, make, data, macs=macs)


__all__ = ["scan_switches"]
