"""A swap as a step of a model's provenance: what was put where, and how it is done to a fresh model."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from swan_surgery.activations.catalogue import NotHereError, kind_named
from swan_surgery.activations.finding import unshare_
from swan_surgery.activations.places import Axes, Kept, Place
from swan_surgery.activations.pointwise import FUNCTIONS
from swan_surgery.activations.putting_in import (
    Swap,
    activation_for,
    put_in_,
    replace_calls_,
    to_json,
)
from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import ArtifactError
from swan_surgery.models import Inputs, copy_of
from swan_surgery.models.architecture import shapes_of
from swan_surgery.models.provenance import inputs_noted
from swan_surgery.models.steps import Shapes, Step, StepKind, register_step


SWAP = "swap"
_VERSION = 1


def swap_step(
    model: nn.Module,
    activation: str,
    start: str,
    swaps: Mapping[str, Swap],
    kept: Sequence[Kept],
    inputs: Inputs,
) -> Step:
    """The step that put activations into a model."""
    data = {
        "activation": activation,
        "start": start,
        "swapped": [to_json(swap) for swap in swaps.values()],
        "kept": [[own.name, own.function, own.why] for own in kept],
        "tensors": _shapes_inside(model, swaps),
        **inputs_noted(inputs),
    }
    return Step(SWAP, _VERSION, data)


def _shapes_inside(model: nn.Module, swaps: Mapping[str, Swap]) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in shapes_of(model).items() if _inside(name, swaps)}


def _inside(tensor: str, names: Mapping[str, Any]) -> bool:
    parts = tensor.split(".")
    return any(".".join(parts[:length]) in names for length in range(1, len(parts)))


def swap_of(data: Mapping[str, Any]) -> Swap:
    """Read what `to_json` wrote."""
    axes = data["axes"]
    settings = {str(name): value for name, value in data["settings"].items()}
    place = Place(
        str(data["name"]),
        str(data["owner"]),
        str(data["function"]),
        str(data["site"]),
        int(data["time"]),
        settings,
        int(data["channels"]),
        None if axes is None else Axes(int(axes[0]), None if axes[1] is None else int(axes[1])),
    )
    return Swap(place, {bool(training): int(number) for training, number in data["numbers"]})


def _apply(model: nn.Module, step: Step) -> nn.Module:
    copy = unshare_(copy_of(model))
    swaps = {own.place.name: own for own in map(swap_of, step.data["swapped"])}
    name, kind = kind_named(str(step.data["activation"]), error=ArtifactError)
    modules: dict[str, nn.Module] = {}
    with streams_kept():
        for swap in swaps.values():
            _check(copy, swap.place)
            try:
                modules[swap.place.name] = activation_for(
                    copy, swap.place, name, kind, step.data["start"]
                )
            except NotHereError as err:
                raise ArtifactError(f"{swap.place.name!r} cannot become {name}: {err}") from err
    put_in_(copy, modules, {name: own.place for name, own in swaps.items()})
    if _shapes_inside(copy, swaps) != {n: tuple(own) for n, own in step.data["tensors"].items()}:
        raise ArtifactError(f"the file holds other tensors than {name} has at its places")
    replace_calls_(copy, swaps)
    return copy


def _check(model: nn.Module, place: Place) -> None:
    """Nothing may be put where no activation is."""
    if place.is_call and place.function not in FUNCTIONS:
        raise ArtifactError(
            f"the file swaps the function {place.function!r}, which is no activation"
        )
    if place.is_call and hasattr(model.get_submodule(place.owner), place.leaf):
        raise ArtifactError(
            f"the file puts an activation over {place.name!r}, which is something else"
        )


def _reshape(shapes: Shapes, step: Step) -> Shapes:
    names = {str(own["name"]): None for own in step.data["swapped"]}
    kept = {name: shape for name, shape in shapes.items() if not _inside(name, names)}
    made = {str(n): tuple(map(int, shape)) for n, shape in step.data["tensors"].items()}
    return {**kept, **made}


register_step(SWAP, StepKind(_VERSION, _apply, _reshape))


__all__ = ["SWAP", "swap_of", "swap_step"]
