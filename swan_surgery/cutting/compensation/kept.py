"""Which positions of the reference's tensors the small model kept."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from swan_surgery.cutting.compensation.reads import Read
from swan_surgery.cutting.kept import positions_of
from swan_surgery.errors import InputError
from swan_surgery.models.provenance import Provenance, provenance_of
from swan_surgery.models.steps import Step, shapes_after


@dataclass(frozen=True)
class Kept:
    """Positions that stayed, by tensor and axis; axes that are not there stayed whole."""

    positions: Mapping[tuple[str, int], Tensor]

    def axis(self, tensor: str, axis: int) -> Tensor | None:
        """Of one axis; None where all stay."""
        return self.positions.get((tensor, axis))


def kept_between(small: nn.Module, reference: nn.Module) -> Kept:
    """What the small model kept of the reference, by the notes that both carry.

    Raises:
        InputError: the small model was not cut from the reference, or not from a model like it.
    """
    here, there = provenance_of(small), provenance_of(reference)
    positions = positions_of(here)
    for key, available in positions_of(there).items():
        own = positions.get(key)
        if own is None or not bool(torch.isin(own, available).all()):
            raise InputError(
                f"the reference has lost channels of {key[0]!r} that the small model has"
            )
        positions[key] = torch.searchsorted(available, own)
    if here is not None:
        _check_base(here, () if there is None else there.steps, reference)
    kept = Kept(positions)
    _check(small, reference, kept)
    return kept


def _check_base(small: Provenance, steps: tuple[Step, ...], reference: nn.Module) -> None:
    shapes = shapes_after(small.base.shapes, steps)
    for name, tensor in reference.named_parameters():
        if tuple(tensor.shape) != tuple(shapes.get(name, tensor.shape)):
            raise InputError(
                f"{name!r} has shape {tuple(tensor.shape)} in the reference, but "
                f"{tuple(shapes[name])} in the model that the small one was cut from"
            )


def _check(small: nn.Module, reference: nn.Module, kept: Kept) -> None:
    own = dict(reference.named_parameters())
    for name, parameter in small.named_parameters():
        if name not in own:
            if name.endswith("bias") and f"{name.removesuffix('bias')}weight" in own:
                continue  # for what closed channels added on average; the reference adds nothing there
            raise InputError(
                f"the reference has no parameter {name!r}; give the model it was cut from"
            )
        if (own[name].dtype, own[name].device) != (parameter.dtype, parameter.device):
            raise InputError(
                f"{name!r} is {parameter.dtype} on {parameter.device} in the small model, "
                f"{own[name].dtype} on {own[name].device} in the reference; bring them together first"
            )
        for axis, size in enumerate(parameter.shape):
            index = kept.axis(name, axis)
            wanted = own[name].shape[axis] if index is None else len(index)
            if own[name].ndim != parameter.ndim or size != wanted:
                raise InputError(
                    f"{name!r} has shape {tuple(parameter.shape)} in the small model and "
                    f"{tuple(own[name].shape)} in the reference, which the cut between them does not "
                    f"explain; give the plain model it was cut from (swan.unswanify(gated))"
                )


def kept_outputs(
    kept: Kept, one: Read, two: Read, *, small: nn.Module, reference: nn.Module
) -> Tensor | None:
    """Positions of the reference's output channels, [n_out of small]; None where it cannot be told."""
    name = one.key[0]
    p, q = small.get_parameter(name), reference.get_parameter(name)
    axis = _output_axis(one, p)
    if axis is None or axis != _output_axis(two, q):
        return None
    outs, available = _outputs(one), _outputs(two)
    first, second = _offset(one.weight, p, axis), _offset(two.weight, q, axis)
    index = kept.axis(name, axis)
    index = torch.arange(p.shape[axis]) if index is None else index
    index = index[first : first + outs] - second
    if len(index) != outs or int(index.min()) < 0 or int(index.max()) >= available:
        return None
    return index


def kept_inputs(kept: Kept, read: Read, small: nn.Module) -> Tensor | None:
    """Positions of the reference's inputs that a matrix product still reads; None where all stayed.

    And where it cannot be told: only a whole matrix [out, in] or [in, out] says so.
    """
    parameter = small.get_parameter(read.key[0])
    if read.settings is not None or parameter.ndim != 2:
        return None
    axis = _output_axis(read, parameter)
    if axis is None or parameter.shape[1 - axis] != read.weight.shape[0]:
        return None
    return kept.axis(read.key[0], 1 - axis)


def _output_axis(read: Read, parameter: Tensor) -> int | None:
    if read.settings is None:
        return _axis_of(read.weight, parameter)
    if not read.settings[3]:
        return 0
    return 1 if read.settings[5] == 1 else None


def _outputs(read: Read) -> int:
    if read.settings is None or read.settings[3]:
        return read.weight.shape[1]
    return read.weight.shape[0]


def _axis_of(view: Tensor, parameter: Tensor) -> int | None:
    """The axis of the parameter that the output axis (1) of a matrix runs along."""
    for axis, size in enumerate(parameter.shape):
        if parameter.stride(axis) == view.stride(1) and size >= view.shape[1]:
            return axis
    return None


def _offset(view: Tensor, parameter: Tensor, axis: int) -> int:
    away = int(view.storage_offset() - parameter.storage_offset())
    return away // int(parameter.stride(axis)) % parameter.shape[axis]
