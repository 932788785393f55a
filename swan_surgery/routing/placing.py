"""Behind which module a switch does the least harm: a few depths tried, at the same mean cost."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swan_surgery.environment.notebooks import html_table
from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import BudgetError, InputError, SwanError
from swan_surgery.models import Inputs
from swan_surgery.models.batches import batches_in, first_samples
from swan_surgery.models.checks import checked_inputs
from swan_surgery.routing.calibrating import calibrate_switch
from swan_surgery.routing.observing import observe
from swan_surgery.routing.routed_model import RoutedModel
from swan_surgery.routing.takes import apart_of, ways_taken


# Of the given model's: the mean cost at which places are compared.
MACS = 0.75
_SAMPLES = 4
_DEPTHS = 4
_FEWEST = 3


@dataclass(frozen=True, slots=True)
class Placement:
    """A switch behind one module, with its threshold set for the mean cost asked for.

    Attributes:
        after: the module.
        share: of the samples that leave there.
        macs: mean MACs of a sample, over those of the given model.
        apart: mean discrepancy to the full branch, over all samples.
        refused: why there can be no switch, or none as cheap as that; the figures are then NaN.
    """

    after: str
    share: float
    macs: float
    apart: float
    refused: str = ""

    def __str__(self) -> str:
        if self.refused:
            return f"{self.after}: {self.refused}"
        return (
            f"{self.after}: {self.share:.1%} leave, {self.macs:.1%} of the MACs, {self.apart:.3g} from the full way "
            f"in the mean"
        )


class Scan(tuple[Placement, ...]):
    """Places in the order in which they were tried; a notebook shows them as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(map(str, self))

    def _repr_html_(self) -> str:
        rows, notes = place_rows(self), place_notes(self)
        return html_table("Places for a switch", PLACES_HEADER, rows, notes=notes)


PLACES_HEADER = ("switch behind", "discrepancy", "leave", "MACs")


def place_rows(found: Sequence[Placement]) -> list[tuple[str, ...]]:
    """A row for each place."""
    return [
        (own.after, "-", "-", "-")
        if own.refused
        else (own.after, f"{own.apart:.3g}", f"{own.share:.1%}", f"{own.macs:.1%}")
        for own in found
    ]


def place_notes(found: Sequence[Placement]) -> list[str]:
    """Why there is no switch, for each place where there can be none."""
    return [str(own) for own in found if own.refused]


def data_of(
    model: nn.Module, batches: Iterable[Any] | None, example_inputs: Any
) -> tuple[list[Any], Inputs]:
    """The batches, held in memory, and example inputs: the first samples of them, if none are given.

    Raises:
        InputError: no batches, or inputs that the model does not take.
    """
    if batches is None:
        raise InputError(
            "several depths are compared on data: pass batches= (no labels are needed)"
        )
    data = list(batches_in(batches, None))
    if not data:
        raise InputError("the loader yielded no batch")
    given = first_samples(data[0], _SAMPLES) if example_inputs is None else example_inputs
    return data, checked_inputs(model, given, to="add a switch")


def depths_of(model: nn.Module, inputs: Inputs) -> tuple[str, ...]:
    """Modules behind which a switch may stand, in the order in which they run: a few, spread evenly.

    Those that run once and return one tensor with the samples in front; the outermost ones, or those inside them where
    these are fewer than three.
    """
    order: list[str] = []
    fits: dict[str, bool] = {}
    names = {id(module): name for name, module in model.named_modules() if name}
    batch = next(
        (v.shape[0] for v in (*inputs.args, *inputs.kwargs.values()) if isinstance(v, Tensor)), 0
    )

    def behind(module: nn.Module, _args: Any, output: Any) -> None:
        name = names[id(module)]
        is_one = isinstance(output, Tensor) and output.ndim > 1 and output.shape[0] == batch
        fits[name] = is_one and name not in fits
        order.append(name)

    modules = [module for module in model.modules() if id(module) in names]
    handles = [module.register_forward_hook(behind) for module in modules]
    try:
        with torch.no_grad(), streams_kept():
            inputs.run(model)
    finally:
        for handle in handles:
            handle.remove()
    chosen: list[str] = []
    for depth in range(1, 1 + max((name.count(".") + 1 for name in order), default=0)):
        chosen = [n for n in order if fits[n] and _is_at(n, depth, fits)]
        if len(chosen) > _FEWEST:
            break
    inner = chosen[:-1]  # behind the last one there is nothing to save
    picked = torch.linspace(0, len(inner) - 1, min(_DEPTHS, len(inner))).round().long().tolist()
    return tuple(inner[index] for index in dict.fromkeys(picked))


def _is_at(name: str, depth: int, fits: dict[str, bool]) -> bool:
    """At this depth, or above it and without modules inside."""
    level = name.count(".") + 1
    return level == depth or (
        level < depth and not any(other.startswith(f"{name}.") for other in fits)
    )


def placements(
    names: Sequence[str],
    make: Callable[[str, Sequence[Any]], RoutedModel],
    batches: Sequence[Any],
    *,
    macs: float = MACS,
) -> Scan:
    """Try switches at several places, at the same mean cost.

    Args:
        names: the modules.
        make: (name, batches) -> a model with a switch there, its light branch made with these batches.
        batches: every other one makes light branches, the rest judges them (one batch does both).
        macs: mean MACs of a sample, over those of the given model.
    """
    making, judging = batches[::2], batches[1::2] or batches
    return Scan(_tried(name, make, making, judging, macs) for name in names)


def _tried(
    name: str,
    make: Callable[[str, Sequence[Any]], RoutedModel],
    making: Sequence[Any],
    judging: Sequence[Any],
    macs: float,
) -> Placement:
    nan = float("nan")
    try:
        routed = make(name, making)
        calibrate_switch(routed, judging, macs=macs)
    except BudgetError as err:
        return Placement(name, nan, nan, nan, str(err))
    except SwanError as err:
        return Placement(name, nan, nan, nan, f"no switch can stand there: {err}")
    observed = observe(routed, judging)
    takes = ways_taken(observed, routed.decide, routed.thresholds)
    certificate = routed.certificate
    return Placement(name, certificate.shares[0], certificate.macs, apart_of(observed, takes))


def least_apart(found: Sequence[Placement]) -> Placement:
    """The one nearest to the full way.

    Raises:
        InputError: none can have a switch; lists why.
    """
    possible = [own for own in found if not own.refused]
    if not possible:
        lines = "\n".join(f"  {own}" for own in found) or "  it has no modules to try"
        raise InputError(f"no place for a switch was found; name one with after=\n{lines}")
    return min(possible, key=lambda own: own.apart)


__all__ = [
    "MACS",
    "PLACES_HEADER",
    "Placement",
    "Scan",
    "data_of",
    "depths_of",
    "least_apart",
    "place_notes",
    "place_rows",
    "placements",
]
