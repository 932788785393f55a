"""`swap_activations`: other activations in a copy of a model, which starts as the same function."""

import difflib
import fnmatch
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from swan_surgery.activations.catalogue import (
    KINDS,
    ActivationSite,
    Kind,
    NotHereError,
    Start,
    kind_named,
)
from swan_surgery.activations.causality import check_statistics
from swan_surgery.activations.finding import Found, find_places, unshare_, within
from swan_surgery.activations.numbering import number_calls
from swan_surgery.activations.places import Kept, Place
from swan_surgery.activations.putting_in import Swap, activation_for, put_in_, replace_calls_
from swan_surgery.activations.step import SWAP, swap_of, swap_step
from swan_surgery.activations.verifying import verify_same
from swan_surgery.calls.swapping import redo_calls_, undo_calls_
from swan_surgery.environment.process_wide import without_warnings
from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import InputError, SwanWarning
from swan_surgery.gates.checks import check_changeable
from swan_surgery.models import Inputs, copy_of, without_collection
from swan_surgery.models.architecture import architecture_of
from swan_surgery.models.checks import checked_inputs, infer_inputs
from swan_surgery.models.provenance import Provenance, note_, provenance_of


def swap_activations(
    model: nn.Module,
    activation: str | Callable[[ActivationSite], nn.Module],
    example_inputs: Any = None,
    *,
    where: str | Iterable[str] = "*",
    start: Start = "identity",
) -> nn.Module:
    """Put another activation into a copy of a model; at first it computes what the model computes.

    Args:
        model: any module; it is not changed.
        activation: a name (`"fles"`, `"acon-c"`, `"smu"`, ...; a wrong one lists all), or a function that makes
            a module from an `ActivationSite`.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments; with data. May be
            left out where `swanify` may.
        where: names or glob patterns of activations as `swan.swaps(swapped)` lists them, or of modules
            that hold them (`"layer4.*"`).
        start: "identity": every activation starts as what was there, exactly; where it cannot, what was
            there stays. "blend": as f + b (g - f) with b per channel starting at 0, which any can.
            "fresh": at the activation's own start; the outputs change.

    Returns:
        A copy with the activations swapped. `print(swan.swaps(copy))` lists what was swapped, and what not
        and why. It goes through `swanify`, `prune`, `save` and `export` as any model does.

    Raises:
        ModelError: not an `nn.Module`, gated, scripted, quantized, or on the meta device.
        InputError: no such activation; `where` matches nothing; nothing could be swapped (says why); or
            statistics would leak from later tokens to earlier ones, or between samples.
        TraceError: the model cannot be run.
        VerificationError: the copy does not start as it should, as where an activation works in place on something
            that is read again.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
        >>> swapped = swan.swap_activations(net, "fles", torch.randn(1, 3, 8, 8))
        >>> print(swan.swaps(swapped))
        fles in place of 1 of 1 activations, starting as what was there
          1: ReLU, 8 channels
    """
    check_changeable(model)
    name, kind = kind_named(activation)
    if start not in ("identity", "blend", "fresh"):
        raise InputError(f"start={start!r}: there are 'identity', 'blend' and 'fresh'")
    given = example_inputs if example_inputs is not None else infer_inputs(model)[0]
    inputs = checked_inputs(model, given, to="swap activations")
    with without_collection(), torch.inference_mode(mode=False), streams_kept():
        swapped = _swapped(model, name, kind, inputs, _patterns(where), start)
        if start == "fresh":
            _verify_places(model, name, kind, inputs, _patterns(where))
        else:
            verify_same(model, swapped, inputs)
    return swapped


def _verify_places(
    model: nn.Module, activation: str, kind: Kind, inputs: Inputs, patterns: Sequence[str]
) -> None:
    """What starts anew computes something else; but the same places, blended in from nothing on, must not.

    Raises:
        VerificationError: what one of them was given is read again, and was changed in place.
    """
    with without_warnings():  # the real swap has told them
        try:
            blended = _swapped(model, activation, kind, inputs, patterns, "blend")
        except InputError:
            return  # nowhere are channels known to blend along
    verify_same(model, blended, inputs)


def _patterns(where: str | Iterable[str]) -> tuple[str, ...]:
    return (where,) if isinstance(where, str) else tuple(where)


def _swapped(
    model: nn.Module,
    activation: str,
    kind: Kind,
    inputs: Inputs,
    patterns: Sequence[str],
    start: Start,
) -> nn.Module:
    provenance = provenance_of(model) or Provenance(architecture_of(model))
    copy = unshare_(copy_of(model))
    replaced_before = undo_calls_(copy)
    done = [
        swap_of(own).place
        for step in provenance.steps
        if step.kind == SWAP
        for own in step.data["swapped"]
    ]
    found = find_places(copy, inputs, done=done)
    places, kept = _chosen(found, patterns)
    modules: dict[str, nn.Module] = {}
    for place in places:
        try:
            modules[place.name] = activation_for(copy, place, activation, kind, start)
        except NotHereError as err:
            kept.append(Kept(place.name, place.function, str(err)))
    kept += [Kept(place.name, place.function, "swapped before") for place in done]
    if not modules:
        raise InputError(_nothing(activation, kept))
    by_name = {place.name: place for place in places if place.name in modules}
    if kind.statistics != "none":
        check_statistics(copy, inputs, activation, found.activations)
    if kind.statistics == "batch":
        warnings.warn(
            f"{activation} takes its statistics between the samples of a batch: what it gives for one "
            f"depends on the others, in eval mode too; 'fles' takes them per sample",
            SwanWarning,
            stacklevel=4,
        )
    put_in_(copy, modules, by_name)
    numbers = number_calls(copy, inputs, [*by_name.values(), *done], found.shared)
    redo_calls_(copy, replaced_before)
    swaps = {name: Swap(place, numbers.get(name, {})) for name, place in by_name.items()}
    replace_calls_(copy, swaps)
    step = swap_step(copy, activation, start, swaps, kept, inputs)
    note_(copy, provenance.followed_by(step))
    return copy


def _chosen(found: Found, patterns: Sequence[str]) -> tuple[list[Place], list[Kept]]:
    names = [place.name for place in found.places] + [own.name for own in found.kept]
    for pattern in patterns if names else ():
        if not any(_matches(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
            raise InputError(
                f"where={pattern!r} matches none of the model's {len(names)} activations; nearest: "
                f"{', '.join(near or names[:3]) or 'it has none'}"
            )
    chosen = [p for p in found.places if any(_matches(p.name, own) for own in patterns)]
    left = [p for p in found.places if p not in chosen]
    kept = [own for own in found.kept if any(_matches(own.name, pattern) for pattern in patterns)]
    return chosen, [*kept, *(Kept(p.name, p.function, "not named in where=") for p in left)]


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or within(name, (pattern,))


def _nothing(activation: str, kept: Sequence[Kept]) -> str:
    whys = list(dict.fromkeys(f"{own.name} ({own.function}): {own.why}" for own in kept))
    lines = (
        "\n".join(f"  {why}" for why in whys[:8]) or "  the model runs no activation that is known"
    )
    return f"nothing could be swapped for {activation}:\n{lines}"


__all__ = ["KINDS", "swap_activations"]
