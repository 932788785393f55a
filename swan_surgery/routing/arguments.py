"""Arguments that are no tensors, in parts of a model: their values were fixed when the model was cut in two."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from swan_surgery.errors import InputError, PathError
from swan_surgery.models import Inputs
from swan_surgery.routing.stand_ins import RunningTrunk, Shape


def check_kinds(trunk: nn.Module, example: Inputs, args: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments with which the rest of a model, cut in two, would have run otherwise.

    Where the model runs as a graph, numbers before the switch are live; whether something is None is not.

    Raises:
        PathError: names the argument.
        InputError: the only argument has other axes than it had: a sample without its batch, say; or, where a model is
            cut as it runs, another size.
    """
    if isinstance(trunk, RunningTrunk):
        _check_sizes(trunk, args, kwargs)
    is_single = len(args) == len(example.args) == 1 and not kwargs and not example.kwargs
    if is_single and all(isinstance(own[0], Tensor) for own in (args, example.args)):
        _check_axes(args[0], example.args[0])
        return
    model = trunk.model if isinstance(trunk, RunningTrunk) else trunk
    signature = _signature(model)
    try:
        found = _values(signature.bind(*args, **kwargs))
    except TypeError:
        return  # the model itself says what is missing
    wanted = _values(signature.bind(*example.args, **example.kwargs))
    is_live = model is trunk
    for name, value in wanted.items():
        if not _alike(found[name], value, is_live=is_live):
            raise PathError(
                f"argument {name!r} is {_told(found[name])}, and was {_told(value)} when the switch was put in; the model "
                f"was cut in two for that: add a switch with example_inputs as they will be"
            )


def _check_sizes(trunk: RunningTrunk, args: Any, kwargs: Mapping[str, Any]) -> None:
    """Where a model is cut as it runs, its code behind the switch sees the example's sizes."""
    signature = _signature(trunk.model)
    try:
        found = _values(signature.bind(*args, **kwargs))
    except TypeError:
        return  # the model itself says what is missing
    given_args, given_kwargs = trunk.given
    wanted = _values(signature.bind(*given_args, **given_kwargs))
    for name, value in found.items():
        pairs = zip(tree_leaves(value), tree_leaves(wanted[name]), strict=False)
        for own, shape in pairs:
            if isinstance(own, Tensor) and isinstance(shape, Shape) and not shape.holds(own):
                raise InputError(
                    f"argument {name!r} is {list(own.shape)}, and a model that is cut as it runs takes inputs of the "
                    f"example's size, {list(shape.sizes)} for any batch; add a switch for inputs of this size"
                )


def _check_axes(given: Tensor, example: Tensor) -> None:
    if given.ndim != example.ndim:
        raise InputError(
            f"the input is {list(given.shape)}, {given.ndim} axes, and the example inputs had {example.ndim}; a routed "
            f"model runs on batches: model(x[None]) for one sample"
        )


def checked_thresholds(given: Any, count: int) -> list[float]:
    """Thresholds of a model with so many switches.

    Infinite ones send all inputs one way.

    Raises:
        InputError: not one number for each.
    """
    try:
        found = [float(own) for own in given]
    except (TypeError, ValueError):
        found = []
    if len(found) != count or any(map(math.isnan, found)):
        raise InputError(
            f"thresholds must be {count} number{'s' if count > 1 else ''}, one for each switch; got {given!r}"
        )
    return found


def _signature(model: nn.Module) -> inspect.Signature:
    """Of the forward that names its arguments: classes put in front of a model's own hand them on."""
    for kind in type(model).__mro__:
        if "forward" in vars(kind) and "forward" not in vars(model):
            found = inspect.signature(vars(kind)["forward"].__get__(model))
            if all(own.kind is not own.VAR_POSITIONAL for own in found.parameters.values()):
                return found
    return inspect.signature(model.forward)


def _values(bound: inspect.BoundArguments) -> dict[str, Any]:
    bound.apply_defaults()
    return bound.arguments


def _alike(found: Any, wanted: Any, *, is_live: bool) -> bool:
    one, shape = tree_flatten(found)
    two, other = tree_flatten(wanted)
    return shape == other and all(
        _is_alike(a, b, is_live=is_live) for a, b in zip(one, two, strict=True)
    )


def _is_alike(found: Any, wanted: Any, *, is_live: bool) -> bool:
    if isinstance(found, Tensor) or isinstance(wanted, Tensor):
        return isinstance(found, Tensor) and isinstance(wanted, Tensor)
    if found is None or wanted is None:
        return found is wanted
    return is_live or bool(found == wanted)


def _told(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


__all__ = ["check_kinds", "checked_thresholds"]
