"""Checks at the edge: is this a model that can be gated, is it gated, what does it take as input?"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from swan_surgery.channels import Inputs
from swan_surgery.errors import InputError, ModelError
from swan_surgery.gates import GatedModel


_IMAGE_SIZES = (224, 299)


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
        raise ModelError(
            f"expected a gated model, got {type(gated).__name__}; call swan.swanify(model) first"
        )


def check_model(model: object) -> None:
    """Refuse what cannot be gated.

    Raises:
        ModelError: says what was seen and what to do.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, GatedModel):
        raise ModelError("the model is gated already; train it, or swan.unswanify(model) first")
    if _wrapped(model) is not None:
        raise ModelError(
            f"the model is wrapped in {type(model).__name__}; pass the model inside (.module, or "
            f"._orig_mod of a compiled one) and wrap the gated model instead"
        )
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


def check_data(model: nn.Module, inputs: Inputs | None = None, *, to: str) -> None:
    """Refuse models and inputs on the `meta` device, which have shapes but no data.

    Args:
        model: any module.
        inputs: what it would be run on.
        to: what cannot be done, as in "count MACs".

    Raises:
        ModelError: a parameter or buffer lies on `meta`.
        InputError: a tensor of the inputs does.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    empty = [name for name, tensor in tensors if tensor.is_meta]
    if empty:
        raise ModelError(
            f"cannot {to}: {empty[0]!r} and {len(empty) - 1} other tensors of "
            f"{type(model).__name__} lie on the meta device and hold no data. Materialise the model "
            f"first (model.to_empty(device='cpu'), then load_state_dict); swan.channel_map needs none"
        )
    leaves = () if inputs is None else tree_leaves((inputs.args, dict(inputs.kwargs)))
    if inputs is not None and any(isinstance(x, Tensor) and x.is_meta for x in leaves):
        raise InputError(
            f"cannot {to}: the example inputs ({described(inputs)}) lie on the meta device and hold "
            f"no data; pass real tensors"
        )


def check_arguments(model: nn.Module, inputs: Inputs) -> None:
    """Refuse example inputs that the model's forward has no place for, or that leave one empty.

    Raises:
        InputError: says what forward takes and what was given.
    """
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # written in C, or replaced by what has no signature
        return
    try:
        signature.bind(*inputs.args, **inputs.kwargs)
    except TypeError as err:
        takes = ", ".join(
            f"{p.name}=..." if p.default is not p.empty else str(p.replace(annotation=p.empty))
            for p in signature.parameters.values()
        )
        raise InputError(
            f"the example inputs do not fit {type(model).__name__}.forward({takes}): {err}; "
            f"given: {described(inputs) or 'nothing'}"
        ) from err


def described(inputs: Inputs) -> str:
    """Types and shapes of the inputs, as in `float32[2, 3, 8, 8], mask=bool[2, 8]`."""
    named = [f"{name}={_described(value)}" for name, value in inputs.kwargs.items()]
    return ", ".join([*map(_described, inputs.args), *named])


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype}{list(value.shape)}".removeprefix("torch.")
    if isinstance(value, (list, tuple)) and value:
        return f"{type(value).__name__} of {_described(value[0])}"
    return type(value).__name__


def _wrapped(model: object) -> object | None:
    """The model inside DataParallel, DistributedDataParallel or torch.compile; else None."""
    if isinstance(model, torch.jit.ScriptModule) or not isinstance(model, nn.Module):
        return None
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return model.get_submodule("module")
    return dict(model.named_children()).get("_orig_mod")


def _is_quantized(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_quantized


def infer_inputs(model: nn.Module) -> list[Inputs]:
    """Example inputs guessed from the first layer, best guess first.

    Raises:
        InputError: the first layer is neither a 2-d convolution nor linear; says what to pass.
    """
    reference = next(iter(model.parameters()), None)
    like = torch.empty(0) if reference is None else reference
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]]
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            shapes = [(1, module.in_channels, size, size) for size in _IMAGE_SIZES]
        elif isinstance(module, nn.Linear):
            shapes = [(1, module.in_features)]
        elif isinstance(module, (nn.Embedding, nn.Conv1d, nn.Conv3d, nn.RNNBase)):
            break
        else:
            continue
        return [Inputs((torch.randn(s, generator=generator).to(like),), {}) for s in shapes]
    raise InputError(
        f"example inputs cannot be inferred for {type(model).__name__}: its first layer is not a "
        f"2-d convolution or linear; pass example_inputs=(tensor, ...)"
    )
