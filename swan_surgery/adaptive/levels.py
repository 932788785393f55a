"""What a block looks like at one width: views of its tensors, and statistics of its own."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from swan_surgery.adaptive.candidates import NestedGroup
from swan_surgery.adaptive.matrices import matrix_of


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_OWN = ("weight", "bias")  # of a reader, once a level has its own


@dataclass(frozen=True, slots=True)
class Narrowing:
    """What one level keeps: the first positions of some axes, by tensor name inside the block.

    Attributes:
        kept: tensor -> ((axis, length), ...).
        open_inputs: reader -> how many of its inputs are open.
    """

    kept: Mapping[str, tuple[tuple[int, int], ...]]
    open_inputs: Mapping[str, int]

    def view(self, name: str, tensor: Tensor) -> Tensor:
        """The part of a tensor that this level uses: no copy."""
        for axis, length in self.kept.get(name, ()):
            tensor = tensor.narrow(axis, 0, length)
        return tensor


def narrowing(groups: Sequence[NestedGroup], counts: Sequence[int], block: str) -> Narrowing:
    """What a level keeps of a block: so many units of each of its groups."""
    kept: dict[str, list[tuple[int, int]]] = {}
    inputs = {}
    start = len(block) + 1 if block else 0
    for group, count in zip(groups, counts, strict=True):
        for own in group.axes:
            kept.setdefault(own.tensor[start:], []).append((own.axis, count * own.run))
        runs = {own.tensor: own.run for own in group.axes if own.axis == 1}
        for reader in group.readers:
            inputs[reader[start:]] = count * runs[f"{reader}.weight"]
    return Narrowing({name: tuple(axes) for name, axes in kept.items()}, inputs)


def norms_of(block: nn.Module) -> dict[str, _BatchNorm]:
    """The batch-norms of a block that keep running statistics."""
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def num_taps(reader: nn.Module) -> int:
    """Positions of a convolution's kernel; 1 for a linear layer."""
    weight = reader.weight
    assert isinstance(weight, Tensor)  # noqa: S101 - readers are convolutions and linear layers
    return prod(weight.shape[2:])


class LevelStatistics(nn.Module):
    """Batch-norm statistics of one level, the means of what its readers no longer get, and readers of its own.

    A mean stands for every input and every position of the kernel, [inputs, taps]: at the border of a
    zero-padded image a tap reads zeros as well, and so is its mean.
    """

    def __init__(
        self, block: nn.Module, readers: Iterable[str], level: Narrowing | None = None
    ) -> None:
        """Without a level, of the means alone: batch-norms then keep their own statistics."""
        super().__init__()
        norms = {} if level is None else norms_of(block)
        self.norms = tuple(norms)
        self.readers = tuple(readers)
        weights: list[Any] = [block.get_submodule(own).weight for own in self.readers]
        self._learns = tuple(own.requires_grad for own in weights)
        for index, (name, norm) in enumerate(norms.items()):
            for statistic in STATISTICS:
                own = getattr(norm, statistic)
                if own is not None and level is not None:
                    own = level.view(f"{name}.{statistic}", own)
                    self.register_buffer(f"norm_{index}_{statistic}", own.detach().clone())
        for index, name in enumerate(self.readers):
            weight = matrix_of(block.get_submodule(name))
            taps = num_taps(block.get_submodule(name))
            mean = torch.zeros(weight.shape[1], taps, dtype=weight.dtype, device=weight.device)
            self.register_buffer(f"mean_{index}", mean)

    def norm(self, name: str) -> dict[str, Tensor]:
        """The statistics of a batch-norm, at this level's width."""
        prefix = f"norm_{self.norms.index(name)}_"
        return {k.removeprefix(prefix): t for k, t in self.named_buffers() if k.startswith(prefix)}

    def own_readers_(self, tensors: Mapping[str, Tensor]) -> None:
        """From now on every reader has a weight and a bias of its own at this level.

        `tensors`: with their values, by name, as the level runs them.
        """
        for index, name in enumerate(self.readers):
            for kind in _OWN:
                given = tensors[f"{name}.{kind}" if name else kind]
                own = nn.Parameter(given.detach().clone(), requires_grad=given.requires_grad)
                self.register_parameter(f"{kind}_{index}", own)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any
    ) -> None:
        """A state that has readers of its own makes places for them, as before they were solved for there are none."""
        for index, reader in enumerate(self.readers):
            for name in (f"{kind}_{index}" for kind in _OWN):
                given = state_dict.get(f"{prefix}{name}")
                if given is not None and name not in self._parameters:
                    made = self.mean(reader).new_empty(given.shape)
                    learns = self._learns[index]
                    self.register_parameter(name, nn.Parameter(made, requires_grad=learns))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def own(self, reader: str) -> tuple[Tensor, Tensor] | None:
        """Weight and bias of a reader, as wide as this level; None where they are the full one's."""
        if not self.has_own:
            return None
        index = self.readers.index(reader)
        weight, bias = (getattr(self, f"{kind}_{index}") for kind in _OWN)
        return weight, bias

    @property
    def has_own(self) -> bool:
        """Whether readers have weights of their own here."""
        return bool(self._parameters)

    def mean(self, reader: str) -> Tensor:
        """What a reader gets on average, [inputs, taps]."""
        found: Tensor = getattr(self, f"mean_{self.readers.index(reader)}")
        return found


def closed_bias(weight: Tensor, means: Tensor, is_open: Tensor) -> Tensor:
    """What closed inputs add to a reader's output on average: [K, outputs] for K masks.

    Args:
        weight: [outputs, inputs, ...].
        means: [K or 1, inputs, taps].
        is_open: [K, inputs]: 0 where an input is closed.
    """
    closed = means * (1 - is_open.to(means.dtype))[:, :, None]
    return closed.flatten(1) @ weight.flatten(1).T


def mean_outputs(weight: Tensor, mean: Tensor) -> Tensor:
    """What each input adds to a reader's outputs on average: [outputs, inputs]."""
    return (weight.flatten(2) if weight.ndim > 2 else weight[:, :, None]).mul(mean).sum(2)


__all__ = [
    "STATISTICS",
    "LevelStatistics",
    "Narrowing",
    "closed_bias",
    "mean_outputs",
    "narrowing",
    "norms_of",
    "num_taps",
]
