"""Checks at the edge: do a model and its example inputs hold data, and fit each other?"""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from swan_surgery.errors import InputError, ModelError
from swan_surgery.models import Inputs, as_inputs


_IMAGE_SIZES = (224, 299)


def check_is_module(model: Any) -> None:
    """Refuse what is no module, or has parameters without a shape; of a result that holds one, `swan.compress`'s, name it.

    Raises:
        ModelError: says what was seen.
    """
    if isinstance(model, nn.Module):
        parameters: Iterable[tuple[str, Any]] = model.named_parameters()
        lazy = [name for name, own in parameters if is_lazy(own)]
        if lazy:
            raise ModelError(
                f"{lazy[0]!r} has no shape yet (a lazy module); run the model once on real inputs first"
            )
        return
    if isinstance(model, type) and issubclass(model, nn.Module):
        name = model.__name__
        raise ModelError(
            f"expected a model, got its class {name}; pass one, as {name}(...) makes it"
        )
    holds = isinstance(getattr(model, "model", None), nn.Module)
    hint = "; pass its .model" if holds else ""
    raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}{hint}")


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


def checked_inputs(model: nn.Module, example_inputs: Any, *, to: str) -> Inputs:
    """Example inputs that hold data and fit, where the model is; `to` as in `check_data`.

    Inputs from elsewhere are moved, unless one of them lies with the model: then all lie as is meant
    (lengths of texts, say, which torch wants on the CPU).

    Raises:
        ModelError: a parameter or buffer lies on `meta`.
        InputError: a tensor of the inputs does, they are none, or do not fit `forward`.
    """
    inputs = as_inputs(example_inputs)
    check_data(model, inputs, to=to)
    check_arguments(model, inputs)
    places = {t.device for t in (*model.parameters(), *model.buffers())}
    leaves = tree_leaves((inputs.args, dict(inputs.kwargs)))
    if len(places) != 1 or any(isinstance(x, Tensor) and x.device in places for x in leaves):
        return inputs
    (device,) = places
    return inputs.map(lambda tensor: tensor.to(device))


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
        numbers = inputs.args if all(type(own) is int for own in inputs.args) else ()
        shape = f"; a shape is no input: torch.zeros{numbers} has it" if len(numbers) > 1 else ""
        raise InputError(
            f"the example inputs do not fit {type(model).__name__}.forward({takes}): {err}; "
            f"given: {described(inputs) or 'nothing'}{shape}"
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
