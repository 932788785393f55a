"""Checks at the edge: is this a model that can be gated, and is it gated?"""

import warnings

import torch
from torch import Tensor, nn

from swan_surgery.errors import ModelError, SwanWarning
from swan_surgery.gates.gated_model import GatedModel
from swan_surgery.models.checks import check_is_module


def check_gated(gated: object) -> None:
    """Refuse anything but a gated model.

    Raises:
        ModelError: says what was seen and what to do.
    """
    inner = _wrapped(gated)
    if isinstance(inner, GatedModel):
        raise ModelError(
            f"the gated model is wrapped in {type(gated).__name__}; pass the model inside "
            f"(.module, or ._orig_mod of a compiled one)"
        )
    if not isinstance(gated, GatedModel):
        why = getattr(type(gated), "comes_last", None)
        advice = f"it {why}" if why else "call swan.swanify(model) first"
        raise ModelError(f"expected a gated model, got {type(gated).__name__}; {advice}")
    check_whole(gated)


def name_what_trains(model: nn.Module) -> None:
    """Lightning's Trainer would refuse a gated LightningModule, so say beforehand what it takes."""
    if not any(kind.__name__ == "LightningModule" for kind in type(model).__mro__):
        return
    inside = [
        name for name, child in model.named_children() if any(True for _ in child.parameters())
    ]
    lines = "; ".join(
        f"module.{n} = swan.swanify(module.{n}, its_inputs)" for n in inside or ["net"]
    )
    warnings.warn(
        f"{type(model).__name__} is gated as a network: it can be cut, but Lightning's Trainer takes "
        f"LightningModules alone. To train with it, gate what is inside, {lines}, and fit the module "
        f"with SwanCallback of swan_surgery.integrations.lightning",
        SwanWarning,
        stacklevel=3,
    )


def check_model(model: nn.Module) -> None:
    """Refuse what cannot be gated.

    Raises:
        ModelError: says what was seen and what to do.
    """
    check_is_module(model)
    if isinstance(model, GatedModel):
        raise ModelError("the model is gated already; train it, or swan.unswanify(model) first")
    if _wrapped(model) is not None:
        raise ModelError(
            f"the model is wrapped in {type(model).__name__}; pass the model inside (.module, or "
            f"._orig_mod of a compiled one) and wrap the gated model instead"
        )
    check_whole(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("the model is a TorchScript module; pass the nn.Module it was made from")
    for name, module in model.named_modules():
        origin = type(module).__module__
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                f"module {name!r} is a TorchScript module; pass the nn.Module it was made from"
            )
        if isinstance(module, GatedModel):
            raise ModelError(f"module {name!r} is gated already; swan.unswanify it first")
        if ".quantized" in origin or ".qat" in origin:
            raise ModelError(
                f"module {name!r} is quantized ({type(module).__name__}); prune first, then quantize"
            )
    quantized = [name for name, t in model.state_dict().items() if _is_quantized(t)]
    if quantized:
        raise ModelError(f"{quantized[0]!r} is a quantized tensor; prune first, then quantize")


def check_changeable(model: nn.Module) -> None:
    """Refuse what cannot be gated, cut in two or swapped: as `check_model`, and what is made of several forms of a model.

    Raises:
        ModelError: says what was seen and what to do.
    """
    check_model(model)
    assert isinstance(model, nn.Module)  # noqa: S101 - just checked
    for name, module in model.named_modules():
        why = getattr(type(module), "comes_last", None)
        if why is not None:
            raise ModelError(f"{f'module {name!r}' if name else 'the model'} {why}")


def check_whole(model: nn.Module) -> None:
    """Refuse models whose parameters lie in shards.

    Raises:
        ModelError: says what works.
    """
    shards = [
        name for name, own in model.named_modules() if _is_a(own, "FSDPModule", "FullySharded")
    ]
    pieces = [name for name, parameter in model.named_parameters() if _is_a(parameter, "DTensor")]
    if shards or pieces:
        what = (
            f"parameter {pieces[0]!r} is a DTensor" if pieces else f"module {shards[0]!r} is FSDP"
        )
        raise ModelError(
            f"the model is sharded ({what}), and its channels show on the whole alone: swanify it before. "
            f"DistributedDataParallel(gated) trains gates and weights, fully_shard(gated) weights; to "
            f"prune or save, load torch.distributed.checkpoint.state_dict.get_model_state_dict(gated, "
            f"options=StateDictOptions(full_state_dict=True)) into swan.swanify(model, ...)"
        )


def _is_a(value: object, *names: str) -> bool:
    """By name: torch.distributed is large, and not in every build."""
    return any(
        kind.__name__.startswith(names) and kind.__module__.startswith("torch.distributed")
        for kind in type(value).__mro__
    )


def _wrapped(model: object) -> object | None:
    """The model inside DataParallel, DistributedDataParallel or torch.compile; else None."""
    if isinstance(model, torch.jit.ScriptModule) or not isinstance(model, nn.Module):
        return None
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return model.get_submodule("module")
    return dict(model.named_children()).get("_orig_mod")


def _is_quantized(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_quantized
