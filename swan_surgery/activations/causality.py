"""May an activation look at all positions of a sample, and does the first axis count samples? Tried out.

In a causal model no later token changes an earlier value. Means over tokens would. So the middle of each
axis of each input is changed in a run of the given model: where only what stands there and later changes,
the model is causal along that axis. The same with whole samples tells whether the axis that grows with
the batch is one of samples that know nothing of each other.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from swan_surgery.activations.listening import listen
from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import InputError
from swan_surgery.models import Inputs, doubled
from swan_surgery.models.modes import evaluating


# Of the largest value: what rounding leaves.
_CHANGED = {torch.float64: 1e-10, torch.float32: 1e-5}
# Positions: one in the middle, one before, one behind.
_FEWEST = 3
_WAYS_ON = (
    "'fles-token' scales each token by itself, 'fles-dg' by what it learnt, and 'acon-c', 'silu' and the "
    "like look at nothing else"
)


def check_statistics(
    model: nn.Module, inputs: Inputs, activation: str, modules: Sequence[str]
) -> None:
    """Refuse statistics over positions that would carry something where the model carries nothing.

    Args:
        model: private; it is run.
        inputs: example inputs with data.
        activation: what would be put in, for the message.
        modules: names of all activation modules.

    Raises:
        InputError: later tokens would change earlier ones, or samples each other; or texts are too short
            to tell.
    """
    with evaluating(model):
        trials = _Trials(model, inputs, activation, modules)
        trials.of_samples()
        for number, axis in _axes_of(inputs, activation):
            trials.of_tokens(number, axis)


def _axes_of(inputs: Inputs, activation: str) -> list[tuple[int, int]]:
    """(tensor, axis) of what may be tokens or pixels: all axes but the batch, and an image's channels.

    Each tensor by itself: a decoder is causal in its own tokens, and not in those of the encoder.
    """
    found = []
    for number, tensor in enumerate(_tensors(inputs)):
        is_text = tensor.ndim == 2 and not tensor.is_floating_point()
        if is_text and tensor.shape[1] < _FEWEST:
            raise InputError(
                f"a text of {tensor.shape[1]} tokens does not tell whether the model is causal, and "
                f"{activation!r} takes statistics over tokens: pass example inputs of {_FEWEST} or more"
            )
        first = 1 if tensor.ndim < 4 else 2
        found += [
            (number, axis) for axis in range(first, tensor.ndim) if tensor.shape[axis] >= _FEWEST
        ]
    return found


def _tensors(inputs: Inputs) -> list[Tensor]:
    leaves = tree_leaves((inputs.args, dict(inputs.kwargs)))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


class _Trials:
    """Runs of one model on changed inputs, seen at what its activations are given."""

    def __init__(
        self, model: nn.Module, inputs: Inputs, activation: str, modules: Sequence[str]
    ) -> None:
        self._model, self._inputs = model, inputs
        self._activation, self._modules = activation, modules
        self._before = self._values(inputs)

    def of_tokens(self, number: int, axis: int) -> None:
        """Refuse if the middle of an axis of an input changes what is there and later, and nothing else."""
        size = _tensors(self._inputs)[number].shape[axis]
        middle = size // 2
        after = self._values(_changed(self._inputs, size, axis, middle, only=number))
        for (name, one), (_, two) in zip(self._before, after, strict=False):
            if one.shape != two.shape:
                return  # what the inputs hold decides what runs
            for own in range(1, one.ndim):
                if one.shape[own] == size and _is_causal(_moved(one, two, own), middle):
                    raise InputError(
                        f"the model is causal: changing position {middle} of {size} on axis {axis} of the "
                        f"inputs changes no earlier value (seen at {name!r}), but the statistics of "
                        f"{self._activation!r} over positions would carry later ones back. {_WAYS_ON}"
                    )

    def of_samples(self) -> None:
        """Refuse if samples along the first axis of the inputs change each other."""
        tensors = [tensor for tensor in _tensors(self._inputs) if tensor.ndim]
        if not tensors:
            return
        twice = self._inputs.map(doubled)
        size = tensors[0].shape[0]
        try:
            before = self._values(twice)
        except Exception:  # noqa: BLE001 - models refuse a batch in all sorts of ways
            return  # then no axis of samples is known, and nothing is swapped
        for entry in (0, 2 * size - 1):
            after = self._values(_changed(twice, 2 * size, 0, entry))
            for (name, once), (_, one), (_, two) in zip(self._before, before, after, strict=False):
                if _other_half_moved(once, one, two, is_first=entry == 0):
                    raise InputError(
                        f"the first axis of the example inputs is not one of samples: changing its entry "
                        f"{entry} changes others (seen at {name!r}), so the statistics of "
                        f"{self._activation!r} could not be taken per sample. {_WAYS_ON}"
                    )

    def _values(self, inputs: Inputs) -> list[tuple[str, Tensor]]:
        """What all activations are given, by module."""
        own = inputs.map(lambda tensor: tensor.clone())
        with torch.no_grad(), streams_kept(0):
            heard = listen(
                self._model,
                lambda: self._model(*own.args, **own.kwargs),
                activations=self._modules,
                note=lambda tensor: tensor.detach().clone(),
            )
        return [(met.runs[-1].module, met.given) for met in heard.met]


def _is_causal(moved: Tensor, middle: int) -> bool:
    is_later = bool(moved[middle]) and bool(moved[middle + 1 :].any())
    return is_later and not bool(moved[:middle].any())


def _other_half_moved(once: Tensor, one: Tensor, two: Tensor, *, is_first: bool) -> bool:
    """Whether the samples that were not changed were, along the axis that is twice as long as `once`."""
    if one.shape != two.shape or once.ndim != one.ndim:
        return False
    for axis in range(one.ndim):
        half = once.shape[axis]
        if one.shape[axis] == 2 * half:
            start = half if is_first else 0
            return bool(_moved(one, two, axis)[start : start + half].any())
    return False


def _changed(
    inputs: Inputs, size: int, axis: int, position: int, *, only: int | None = None
) -> Inputs:
    """Other values at one position of every axis of that size, or of that of one tensor."""
    generator, numbers = torch.Generator().manual_seed(0), itertools.count()

    def change(tensor: Tensor) -> Tensor:
        if next(numbers) != only and only is not None:
            return tensor
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


def _moved(one: Tensor, two: Tensor, axis: int) -> Tensor:
    """Per position of an axis, whether anything changed there."""
    scale = float(one.abs().max())
    changed = (one - two).abs() > _CHANGED.get(one.dtype, 1e-2) * scale
    return changed.movedim(axis, 0).flatten(1).any(dim=1)
