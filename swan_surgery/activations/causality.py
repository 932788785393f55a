"""May an activation look at all positions of a sample, and does the first axis count samples? Tried out.

In a causal model no later token changes an earlier value. Means over tokens would. So the middle of each
axis of the inputs is changed in a run of the given model: where only what stands there and later changes,
the model is causal along that axis. The same with whole samples tells whether the axis that grows with
the batch is one of samples that know nothing of each other.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from swan_surgery.activations.finding import why_not_activation
from swan_surgery.activations.listening import listen
from swan_surgery.activations.places import Place
from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import InputError
from swan_surgery.models import Inputs, doubled


# Of the largest value: what rounding leaves.
_CHANGED = {torch.float64: 1e-10, torch.float32: 1e-5}
_WAYS_ON = (
    "'fles-token' scales each token by itself, 'fles-dg' by what it learnt, and 'acon-c', 'silu' and the "
    "like look at nothing else"
)


def check_statistics(
    model: nn.Module, inputs: Inputs, places: Sequence[Place], activation: str
) -> None:
    """Refuse statistics over positions that would carry something where the model carries nothing.

    Args:
        model: private; it is run.
        inputs: example inputs with data.
        places: where the activation would be put.
        activation: its name, for the message.

    Raises:
        InputError: later tokens would change earlier ones, or samples each other.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        _check_samples(model.eval(), inputs, places, activation)
        for size, axis in _axes_of(inputs):
            _check_tokens(model, inputs, size, axis, activation)
    finally:
        for module, training in modes:
            module.training = training


def _axes_of(inputs: Inputs) -> list[tuple[int, int]]:
    """(size, axis) of what may be tokens or pixels: all axes but the batch, and an image's channels."""
    found = {
        (tensor.shape[axis], axis)
        for tensor in _tensors(inputs)
        for axis in range(1 if tensor.ndim < 4 else 2, tensor.ndim)
        if tensor.shape[axis] > 2
    }
    return sorted(found)


def _tensors(inputs: Inputs) -> list[Tensor]:
    leaves = tree_leaves((inputs.args, dict(inputs.kwargs)))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _check_tokens(model: nn.Module, inputs: Inputs, size: int, axis: int, activation: str) -> None:
    middle = size // 2
    before = _values(model, inputs)
    after = _values(model, _changed(inputs, size, axis, middle))
    for (name, one), (_, two) in zip(before, after, strict=True):
        if one.shape != two.shape:
            return  # what the inputs hold decides what runs
        for own in range(1, one.ndim):
            moved = _moved(one, two, own)
            if one.shape[own] != size or not bool(moved[middle]):
                continue
            if not bool(moved[:middle].any()) and bool(moved[middle + 1 :].any()):
                raise InputError(
                    f"the model is causal: changing position {middle} of {size} on axis {axis} of the inputs "
                    f"changes no earlier value (seen at {name!r}), but the statistics of {activation!r} over "
                    f"positions would carry later ones back. {_WAYS_ON}"
                )


def _check_samples(
    model: nn.Module, inputs: Inputs, places: Sequence[Place], activation: str
) -> None:
    wanted = {place.axes.samples for place in places if place.axes is not None}
    tensors = [t for t in _tensors(inputs) if t.ndim]
    if wanted == {None} or not tensors:
        return
    twice = inputs.map(doubled)
    size = tensors[0].shape[0]
    before = _values(model, twice)
    for first, kept in ((0, slice(size, None)), (2 * size - 1, slice(0, size))):
        after = _values(model, _changed(twice, 2 * size, 0, first))
        for (name, one), (_, two) in zip(before, after, strict=True):
            half = one.shape[0] // 2 if one.ndim else 0
            if one.shape != two.shape or half * 2 != one.shape[0] or half % size:
                continue
            own = slice(half, None) if kept.start else slice(0, half)
            if not _same(one[own], two[own]):
                raise InputError(
                    f"the first axis of the example inputs is not one of samples: changing its entry {first} "
                    f"changes others (seen at {name!r}), so the statistics of {activation!r} could not be "
                    f"taken per sample. {_WAYS_ON}"
                )


def _values(model: nn.Module, inputs: Inputs) -> list[tuple[str, Tensor]]:
    """What all activations are given, by module."""
    activations = [
        name for name, module in model.named_modules() if name and why_not_activation(module) is None
    ]
    own = inputs.map(lambda tensor: tensor.clone())
    with torch.no_grad(), streams_kept(0):
        heard = listen(
            model,
            lambda: model(*own.args, **own.kwargs),
            activations=activations,
            note=lambda tensor: tensor.detach().clone(),
        )
    return [(met.runs[-1].module, met.given) for met in heard.met]


def _changed(inputs: Inputs, size: int, axis: int, position: int) -> Inputs:
    """Other values at one position of every axis of that size."""
    generator = torch.Generator().manual_seed(0)

    def change(tensor: Tensor) -> Tensor:
        if tensor.ndim <= axis or tensor.shape[axis] != size or tensor.dtype is torch.bool:
            return tensor
        other = tensor.clone()
        own = other.select(axis, position)
        if tensor.is_floating_point():
            noise = torch.randn(own.shape, generator=generator).to(own)
            own += noise * (1 + tensor.abs().max())
        else:  # tokens, masks: a neighbour that is in the vocabulary
            own += torch.where(own < tensor.max(), 1, -1) if int(tensor.max()) > 0 else 1
        return other

    return inputs.map(change)


def _same(one: Tensor, two: Tensor) -> bool:
    scale = float(one.abs().max()) if one.numel() else 0.0
    return bool(((one - two).abs() <= _CHANGED.get(one.dtype, 1e-2) * scale).all())


def _moved(one: Tensor, two: Tensor, axis: int) -> Tensor:
    """Per position of an axis, whether anything changed there."""
    scale = float(one.abs().max())
    changed = (one - two).abs() > _CHANGED.get(one.dtype, 1e-2) * scale
    return changed.movedim(axis, 0).flatten(1).any(dim=1)
