"""`load`: a saved model, rebuilt from a new instance of the class it was cut out of."""

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from swan_surgery.artifacts.adaptive import PREFIX, rebuilt_adaptive
from swan_surgery.artifacts.folders import read_with_buffers
from swan_surgery.artifacts.structures import decode, map_digest, unpack
from swan_surgery.environment.writing import as_path
from swan_surgery.errors import ArtifactError, InputError, SwanError
from swan_surgery.gates import GatedModel
from swan_surgery.gates.checks import check_model
from swan_surgery.gates.conversion import swanify
from swan_surgery.models import Inputs, as_inputs, copy_of
from swan_surgery.models.architecture import all_tensors, architecture_of, difference
from swan_surgery.models.provenance import Provenance, note_
from swan_surgery.models.steps import apply_step, check_steps, shapes_after
from swan_surgery.routing.losses import Discrepancy
from swan_surgery.routing.routed_model import RoutedModel
from swan_surgery.routing.settings import OWN, own_discrepancy, routed_of_json


_LAYOUTS = {
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}


def load(
    path: str | PathLike[str],
    model: nn.Module,
    *,
    example_inputs: Any = None,
    discrepancy: Discrepancy | None = None,
    positive: Callable[[Any], Tensor] | None = None,
) -> nn.Module:
    """Rebuild a saved model; nothing in the file is executed.

    Args:
        path: a file written by `swan.save`, or a folder written by `swan.save_pretrained`.
        model: the base model, newly built as it was before `swanify`; its weights do not matter and
            it is not changed. It may lie on the meta device; the result is then on the CPU,
            otherwise where the model is. For a routed model with a light branch of your own a new routed
            model made by the same call of `swan.add_switch`.
        example_inputs: for a gated or an adaptive model, if those in the file are not to be used.
        discrepancy: of a routed model that has a function of yours, which no file can hold.
        positive: likewise; of no other models, as the discrepancy.

    Returns:
        The model as it was saved: bitwise the same outputs.

    Raises:
        ArtifactError: no such file, damaged, by a newer version, or saved from another model.
        InputError: a function that what was saved does not take.
        ModelError: `model` is not a plain `nn.Module`.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> gated = swan.swanify(net, torch.zeros(1, 3))
        >>> swan.save(gated, folder / "training.swan")
        >>> gated = swan.load(folder / "training.swan", net)
        >>> gated.gates.num_units
        8
    """
    like = model if isinstance(model, RoutedModel) else None
    model = model if like is None else like.parts
    check_model(model)
    path = as_path(path, "swan.load(path, model)")
    header, tensors = read_with_buffers(path)
    _check_functions(header, discrepancy=discrepancy, positive=positive)
    private = copy_of(model)
    try:
        found = _rebuilt(path, header, tensors, private, example_inputs)
        if "routing" not in header:
            return found
        discrepancy = discrepancy or (like and own_discrepancy(like))
        positive = positive or (like and like.positive)
        return routed_of_json(header["routing"], found, discrepancy=discrepancy, positive=positive)
    except ArtifactError:
        raise
    except Exception as err:  # checked where it matters; whatever else a header may lead to
        raise ArtifactError(f"{path} holds what swan.save does not write: {err!r}") from err


def _check_functions(header: Mapping[str, Any], *, discrepancy: object, positive: object) -> None:
    """Refuse functions that what was saved would not use."""
    routing = header.get("routing")
    if routing is None and (discrepancy is not None or positive is not None):
        raise InputError("discrepancy= and positive= are of routed models, and the file holds none")
    if discrepancy is not None and routing is not None and routing["discrepancy"] != OWN:
        raise InputError(
            f"the routed model was saved with the discrepancy {routing['discrepancy']!r}: leave discrepancy= out"
        )


def _rebuilt(
    path: Path,
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    result: nn.Module,
    example_inputs: Any,
) -> nn.Module:
    """`result`: a private copy of the base model."""
    provenance = Provenance.from_json(unpack(header["provenance"]))
    try:
        check_steps(provenance.steps, written_by=header["library"])
    except ArtifactError as err:
        raise ArtifactError(f"{path}: {err}") from None
    differs = difference(provenance.base, architecture_of(result))
    if differs is not None:
        is_parts = "routing" in header and not provenance.steps
        raise ArtifactError(
            f"{path} was saved from another model: {differs}; pass model= "
            + (
                "a routed model made by the same call of swan.add_switch"
                if is_parts
                else f"as it was before swanify, a new {provenance.base.name}"
            )
        )
    shapes = shapes_after(provenance.base.shapes, provenance.steps)
    for step in provenance.steps:
        result = apply_step(result, step)
    kind = header["kind"]
    beside = {"gated": ("gates/", "inputs/"), "adaptive": (PREFIX, "inputs/")}.get(kind, ())
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(beside)}
    _fill_(result, own, header, shapes)
    for name, width in header["bare_norms"].items():
        norm = result.get_submodule(name)
        if not isinstance(norm, _InstanceNorm) or norm.affine or not 0 < width <= norm.num_features:
            raise ArtifactError(
                f"{path} sets the width of {name!r} to {width!r}, which it cannot have"
            )
        norm.num_features = int(width)
    frozen = set(header["frozen"])
    for name, parameter in result.named_parameters():
        parameter.requires_grad_(name not in frozen)
    result.train(bool(header["training"]))
    for name in header["other_mode"]:
        result.get_submodule(name).training = not header["training"]
    note_(result, provenance)
    if kind == "gated":
        return _gated(path, header["gating"], tensors, result, example_inputs)
    if kind == "adaptive":
        part = header["adaptive"]
        given = _inputs(part, tensors) if example_inputs is None else as_inputs(example_inputs)
        return rebuilt_adaptive(path, part, tensors, result, given)
    return result


def _fill_(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Put tensors where they belong, ties included, on the device of what was there."""
    aliases, layouts = header["aliases"], header["layouts"]
    names = [name for name, _ in all_tensors(model)]
    if set(names) != {*tensors, *aliases}:
        odd = set(names) ^ {*tensors, *aliases}
        raise ArtifactError(f"the file and the model differ in the tensor {min(odd)!r}")
    done: dict[str, Tensor] = {}
    for name in names:
        source = aliases.get(name, name)
        owner = model.get_submodule(name.rpartition(".")[0])
        slots: Any = owner._parameters  # noqa: SLF001 - its store
        key = name.rpartition(".")[2]
        if key not in slots:
            slots = owner._buffers  # noqa: SLF001
        if source not in done:
            old: Tensor = slots[key]
            new = tensors[source]
            if tuple(new.shape) != shapes[source]:
                raise ArtifactError(
                    f"{source!r} has shape {tuple(new.shape)}, not {shapes[source]}"
                )
            # A copy, because it lies where torch puts tensors: kernels round by alignment.
            new = new.to("cpu" if old.is_meta else old.device, copy=True)
            if source in layouts:
                new = new.contiguous(memory_format=_LAYOUTS[layouts[source]])
            done[source] = nn.Parameter(new, False) if isinstance(old, nn.Parameter) else new  # noqa: FBT003
        slots[key] = done[source]


def _gated(
    path: Path,
    gating: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    base: nn.Module,
    example_inputs: Any,
) -> GatedModel:
    inputs = _inputs(gating, tensors) if example_inputs is None else as_inputs(example_inputs)
    try:
        gated = swanify(
            base,
            inputs,
            ignore=gating["ignore"],
            free_outputs=gating.get("free_outputs", ()),
            in_place=gating["in_place"],
        )
    except SwanError as err:
        raise ArtifactError(f"{path}: the model could not be gated again: {err}") from err
    if map_digest(gated.channels) != gating["map"]:
        raise ArtifactError(
            f"{path}: this version maps other units than the one that saved it; load it with "
            f"swan_surgery as named in the file, prune there, and save the pruned model"
        )
    state = {n.removeprefix("gates/"): t for n, t in tensors.items() if n.startswith("gates/")}
    gated.gates.load_state_dict(state)
    gated.gates.mode = gating["mode"]
    gated.gates.min_width = gating["min_width"]
    # The base model has its modes already.
    gated.training = gated.gates.training = bool(gating["training"])
    gated.sites.train(bool(gating["training"]))
    return gated


def _inputs(gating: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Inputs:
    if gating["inputs"] is None:
        raise InputError("the example inputs could not be saved: pass example_inputs to load")
    given = [n for n in tensors if n.startswith("inputs/")]
    by_index = sorted(given, key=lambda name: int(name.partition("/")[2]))
    args, kwargs = decode(gating["inputs"], [tensors[name] for name in by_index])
    return Inputs(args, kwargs)


__all__ = ["load"]
