"""What was swapped in a model, and what not and why, read from the note that it carries."""

from dataclasses import dataclass

from torch import nn

from swan_surgery.activations.places import Kept, Place
from swan_surgery.activations.step import SWAP, swap_of
from swan_surgery.errors import InputError
from swan_surgery.models.provenance import provenance_of


_STARTS = {
    "identity": "starting as what was there",
    "blend": "blended in from nothing on",
    "fresh": "starting anew",
}


@dataclass(frozen=True, slots=True)
class Swaps:
    """One swap of the activations of a model.

    Attributes:
        activation: what was put in.
        start: how it started.
        swapped: where.
        kept: what stayed, and why.
    """

    activation: str
    start: str
    swapped: tuple[Place, ...]
    kept: tuple[Kept, ...]

    def __str__(self) -> str:
        total = len(self.swapped) + len(self.kept)
        counts = f"{len(self.swapped)} of {total} activations"
        lines = [f"{self.activation} in place of {counts}, {_STARTS[self.start]}"]
        for place in self.swapped:
            what = f"{place.function}()" if place.is_call else place.function
            width = f", {place.channels} channels" if place.channels else ""
            lines.append(f"  {place.name}: {what}{width}")
        lines += [f"  {own.name}: {own.function} stays: {own.why}" for own in self.kept]
        return "\n".join(lines)


def swaps(model: nn.Module) -> Swaps:
    """What the last `swap_activations` of a model did, read from the note that the model carries.

    Raises:
        InputError: nothing was swapped in it.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2), nn.Sigmoid())
        >>> print(swan.swaps(swan.swap_activations(net, "smu", torch.randn(2, 3))))
        smu in place of 1 of 2 activations, starting as what was there
          1: GELU, 8 channels
          3: Sigmoid stays: it is not 0 at 0
    """
    provenance = provenance_of(model)
    steps = [] if provenance is None else [own for own in provenance.steps if own.kind == SWAP]
    if not steps:
        raise InputError(f"no activation of this {type(model).__name__} was swapped")
    data = steps[-1].data
    return Swaps(
        str(data["activation"]),
        str(data["start"]),
        tuple(swap_of(own).place for own in data["swapped"]),
        tuple(Kept(str(name), str(function), str(why)) for name, function, why in data["kept"]),
    )
