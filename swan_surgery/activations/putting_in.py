"""Puts activations into a private model: in place of modules, and of calls of functions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swan_surgery.activations.catalogue import ActivationSite, Kind, Start, build
from swan_surgery.activations.places import Place
from swan_surgery.activations.pointwise import Function, as_module
from swan_surgery.calls.swapping import swap_call_


@dataclass(frozen=True, slots=True)
class Swap:
    """One activation that was swapped: where, and the numbers of the calls by mode (training or not)."""

    place: Place
    numbers: Mapping[bool, int]


def activation_for(
    model: nn.Module, place: Place, activation: str, kind: Kind, start: Start
) -> nn.Module:
    """The activation for a place of a model, on the device and in the type of what surrounds it.

    Raises:
        NotHereError: it cannot be put there.
    """
    old = None if place.is_call else model.get_submodule(place.name)
    base = Function(place.function, place.settings) if old is None else as_module(old)
    like = next(model.parameters(), torch.zeros(0))
    site = ActivationSite(place.name, base, place.channels, place.axes, start)
    made = build(activation, kind, site, place.why_no_axis)
    holder = model.get_submodule(place.owner if place.is_call else place.holder)
    made.train(holder.training)
    device = torch.device("cpu") if like.is_meta else like.device
    return made.to(device=device, dtype=_kind_of(holder, like))


def _kind_of(holder: nn.Module, like: Tensor) -> torch.dtype:
    """The type of the parameters near by: parts of a model may be in half precision."""
    own = (p.dtype for p in holder.parameters() if p.is_floating_point())
    return next(own, like.dtype if like.is_floating_point() else torch.get_default_dtype())


def put_in_(
    model: nn.Module, modules: Mapping[str, nn.Module], places: Mapping[str, Place]
) -> None:
    """Put modules where they belong; calls run as before until `replace_calls_`."""
    for name, module in modules.items():
        place = places[name]
        holder = model.get_submodule(place.owner if place.is_call else place.holder)
        holder._modules[place.leaf] = module  # noqa: SLF001 - as torch's setattr
        for owner in (holder, model.get_submodule(place.owner)):
            if hasattr(owner, "activation_relu_or_gelu"):
                # torch's fused encoder layers compute one of the two without asking the module.
                vars(owner)["activation_relu_or_gelu"] = 0


def replace_calls_(model: nn.Module, swaps: Mapping[str, Swap]) -> None:
    """Run the modules in place of the calls they stand for."""
    for swap in swaps.values():
        place = swap.place
        for training, number in swap.numbers.items():
            owner = model.get_submodule(place.owner)
            call = (place.function, number)
            swap_call_(owner, call, place.leaf, training=training, site=place.site)


def to_json(swap: Swap) -> dict[str, Any]:
    """Plain JSON."""
    place = swap.place
    axes = None if place.axes is None else [place.axes.channels, place.axes.samples]
    return {
        "name": place.name,
        "owner": place.owner,
        "function": place.function,
        "site": place.site,
        "time": place.time,
        "settings": dict(place.settings),
        "channels": place.channels,
        "axes": axes,
        "numbers": [[training, number] for training, number in swap.numbers.items()],
    }
