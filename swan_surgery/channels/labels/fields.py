"""Label fields: integer tensors that ride along with a tensor and name the channel at each position.

A field has the rank of the tensor it belongs to, the tensor's size on the axes where the label
changes, and size 1 elsewhere. Labels are positive; `PLAIN` marks positions that hold data of no
channel, `FILL` positions that an operation filled with a constant (zero padding).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


PLAIN = 0
FILL = -1

Fields = tuple[Tensor, ...]


def axes_of(field: Tensor) -> tuple[int, ...]:
    """The axes along which the label changes."""
    return tuple(axis for axis, size in enumerate(field.shape) if size > 1)


def compact(field: Tensor) -> Tensor:
    """Shrink to size 1 every axis along which the label does not change."""
    for axis in range(field.ndim):
        if field.shape[axis] > 1:
            first = field.narrow(axis, 0, 1)
            if field.stride(axis) == 0 or torch.equal(first.expand_as(field), field):
                field = first
    return field


def axis_field(labels: Tensor, axis: int, ndim: int) -> Tensor:
    """A field of rank `ndim` whose labels, shape (n,), lie along `axis`."""
    return labels.view([-1 if a == axis else 1 for a in range(ndim)])


def align(field: Tensor, ndim: int) -> Tensor:
    """Prepend axes of size 1, as broadcasting does."""
    return field.view((1,) * (ndim - field.ndim) + tuple(field.shape))


def merge(first: Tensor, second: Tensor) -> Tensor:
    """Per position, the label where one of the two has a label; else PLAIN before FILL."""
    first, second = torch.broadcast_tensors(first, second)
    either = torch.where(first > 0, first, second)
    return torch.where((either <= 0) & (first != second), PLAIN, either)


def has_labels(field: Tensor) -> bool:
    """Whether any position belongs to a channel."""
    return bool((field > 0).any())


def by_overlap(fields: list[tuple[int, Tensor]]) -> list[list[tuple[int, Tensor]]]:
    """Group (operand, field) pairs whose fields change along a common axis."""
    groups: list[tuple[set[int], list[tuple[int, Tensor]]]] = []
    for operand, field in fields:
        axes = set(axes_of(field))
        members = [(operand, field)]
        apart = []
        for other_axes, other in groups:
            if axes & other_axes:
                axes |= other_axes
                members = other + members
            else:
                apart.append((other_axes, other))
        groups = [*apart, (axes, members)]
    return [members for _, members in groups]


def vector_along(fields: Fields, axis: int) -> tuple[Tensor | None, list[Tensor]]:
    """The labels along `axis` and the fields that entangle it with other axes.

    Returns:
        labels of shape (n,) of the field that changes along `axis` alone (None if there is none),
        and the fields that change along `axis` and at least one other axis.
    """
    vector = None
    tangled = []
    for field in fields:
        axes = axes_of(field)
        if axes == (axis,):
            vector = field.reshape(-1)
        elif axis in axes:
            tangled.append(field)
    return vector, tangled


def reshaped(field: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """The field of a tensor of shape `before` that is viewed as `after`, written out where it varies alone.

    Axes that become others together are a group of their own: (2, 197, 768) viewed as (394, 768) is
    two groups, and labels along the last axis need no copy for every row.
    """
    own, result = list(field.shape), []
    for into, out in _groups(before, after):
        varies = any(own[axis] > 1 for axis in into)
        for axis in into if varies else ():
            own[axis] = before[axis]
        result += [after[axis] if varies else 1 for axis in out]
    return field.expand(own).reshape(result)


def _groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[range, range]]:
    """Axes of two shapes of one size, in order, in the smallest groups that hold as many elements."""
    if 0 in before:
        return [(range(len(before)), range(len(after)))]
    groups = []
    first = second = 0
    while first < len(before) or second < len(after):
        starts, own, other = (first, second), 1, 1
        while True:
            if own <= other and first < len(before):
                own, first = own * before[first], first + 1
            else:
                other, second = other * after[second], second + 1
            if own == other:
                break
        groups.append((range(starts[0], first), range(starts[1], second)))
    return groups
