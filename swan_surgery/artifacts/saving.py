"""`save`: a pruned, plain or gated model to one file."""

from dataclasses import asdict
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from swan_surgery.adaptive import AdaptiveModel
from swan_surgery.artifacts.adaptive import adaptive_part
from swan_surgery.artifacts.container import write
from swan_surgery.artifacts.structures import encode, map_digest, pack
from swan_surgery.environment.machine import own_version
from swan_surgery.environment.writing import as_path
from swan_surgery.errors import InputError, ModelError
from swan_surgery.gates import GatedModel
from swan_surgery.gates.checks import check_model, check_whole
from swan_surgery.models.architecture import all_tensors, architecture_of, shapes_of
from swan_surgery.models.checks import check_data, check_is_module
from swan_surgery.models.provenance import Provenance, provenance_of
from swan_surgery.models.steps import shapes_after
from swan_surgery.routing.routed_model import RoutedModel
from swan_surgery.routing.settings import routing_to_json


_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


def save(model: nn.Module, path: str | PathLike[str]) -> None:
    """Write a model to one file from which `swan.load` rebuilds it; no pickle, no code.

    The file is safetensors with a JSON header: the class and settings of the base model, the plan of
    every cut, and a checksum. Weights, buffers, dtypes, memory formats, ties, `requires_grad` and the
    training mode come back as they are. Written whole or not at all.

    Args:
        model: what `swan.prune` returned, trained on or not; a gated or routed model in the middle of its
            training; what `swan.adapt` or `swan.compact` returned; or any plain model.
        path: usually ends in `.swan` or `.safetensors`; an existing file is replaced.

    Raises:
        ModelError: not a model, or on the meta device.
        InputError: the model was changed after the cut, or keeps state that is no tensor.
        WritingError: the file could not be written; an older one is as it was.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> gated = swan.swanify(net, torch.zeros(1, 3))
        >>> gated.close("0", [1, 3, 5, 7])
        >>> swan.save(swan.prune(gated), folder / "small.swan")
        >>> swan.load(folder / "small.swan", net)[0]
        Linear(in_features=3, out_features=4, bias=True)
    """
    header, tensors = contents(model)
    write(as_path(path, "swan.save(model, path)"), header, tensors)


def contents(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file."""
    check_is_module(model)
    if isinstance(model, RoutedModel):
        header, tensors = contents(model.body)
        return {**header, "routing": routing_to_json(model)}, tensors
    if isinstance(model, GatedModel):
        check_whole(model)
        header, tensors = _plain(model.model)
        gating, own = _gating(model)
        return {**header, "kind": "gated", "gating": gating}, {**tensors, **own}
    if isinstance(model, AdaptiveModel):
        header, tensors = _plain(model.dense_model())
        part, own = adaptive_part(model)
        return {**header, "kind": "adaptive", "adaptive": part}, {**tensors, **own}
    check_model(model)
    for name, own in model.named_modules():
        if isinstance(own, AdaptiveModel):
            raise ModelError(
                f"module {name!r} is adaptive, and a file of the model around it would forget how it runs; save "
                f"model.get_submodule({name!r}) by itself, and the rest as a state dict"
            )
    return _plain(model)


def _plain(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    check_data(model, to="save")
    stateful = [k for k, value in model.state_dict().items() if not isinstance(value, Tensor)]
    if stateful:
        raise InputError(
            f"{stateful[0]!r} in the state of {type(model).__name__} is no tensor and cannot be saved"
        )
    provenance = provenance_of(model) or Provenance(architecture_of(model))
    _check_unchanged(model, provenance)
    tensors, aliases, layouts = _distinct(model)
    header = {
        "library": own_version(),
        "torch": torch.__version__,
        "kind": "model",
        "class": provenance.base.name,
        "params": sum(p.numel() for p in model.parameters()),
        "macs": None if provenance.macs is None else asdict(provenance.macs),
        "training": model.training,
        "other_mode": [n for n, m in model.named_modules() if m.training != model.training],
        "aliases": aliases,
        "layouts": layouts,
        "frozen": [n for n, p in model.named_parameters() if not p.requires_grad],
        "bare_norms": {
            name: module.num_features
            for name, module in model.named_modules()
            if isinstance(module, _InstanceNorm) and not module.affine
        },
        "provenance": pack(provenance.to_json()),
    }
    return header, tensors


def _check_unchanged(model: nn.Module, provenance: Provenance) -> None:
    wanted = shapes_after(provenance.base.shapes, provenance.steps)
    found = shapes_of(model)
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            raise InputError(
                f"{name!r} has shape {found.get(name)}, but {wanted.get(name)} after the cut: the model "
                f"was changed since, and could not be rebuilt; save it before such changes, or take "
                f"safetensors.torch.save_model for the weights alone"
            )


def _distinct(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str], dict[str, str]]:
    """Every tensor once and contiguous; the other names of tied ones; memory formats."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    layouts: dict[str, str] = {}
    first: dict[int, str] = {}
    memories: set[int] = set()
    for name, tensor in all_tensors(model):
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        layout = _LAYOUTS.get(tensor.ndim)
        if (
            layout is not None
            and not tensor.is_contiguous()
            and tensor.is_contiguous(memory_format=layout)
        ):
            layouts[name] = str(layout).removeprefix("torch.")
        memory = tensor.untyped_storage()
        is_whole = memory.nbytes() == tensor.numel() * tensor.element_size()
        tensors[name] = tensor.detach()
        if not (tensor.is_contiguous() and is_whole and memory.data_ptr() not in memories):
            # Two views of one memory are two tensors in the file.
            tensors[name] = tensors[name].clone(memory_format=torch.contiguous_format)
        memories.add(memory.data_ptr())
    return tensors, aliases, layouts


def _gating(gated: GatedModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    inputs, given = encode((gated.example_inputs.args, dict(gated.example_inputs.kwargs)))
    bank = gated.gates
    tensors = {f"gates/{name}": t.detach().contiguous() for name, t in bank.state_dict().items()}
    tensors |= {f"inputs/{index}": t.detach().clone().contiguous() for index, t in enumerate(given)}
    gating = {
        "ignore": list(gated.ignored),
        "free_outputs": list(gated.free_outputs),
        "in_place": gated.runs_in_place,
        "mode": bank.mode,
        "min_width": bank.min_width,
        "training": gated.training,
        "map": map_digest(gated.channels),
        "inputs": inputs,
    }
    return gating, tensors
