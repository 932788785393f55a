"""Rules for convolutions and matrix products: inputs meet weights, outputs take the weights' labels.

These are the operations that cost MACs, so each run of one is also recorded as a `Contraction`.
"""

from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from swan_surgery.channels.labels.fields import Fields, axes_of, axis_field, vector_along
from swan_surgery.channels.labels.labels import Labels
from swan_surgery.channels.labels.recording import Call, Contraction
from swan_surgery.channels.rules.on_meta import addmm_shape
from swan_surgery.channels.rules.pointwise import join_aligned
from swan_surgery.channels.rules.registry import pin_inputs, rule


_BATCHED = 3  # the rank of what bmm takes
_NO_CHANNELS = "reads data that belongs to no channel (the model's input, or a constant)"


def vector_of(tensor: Tensor, axis: int, call: Call, labels: Labels) -> Tensor | None:
    """Labels along one axis; channels that are entangled with another axis are pinned."""
    vector, tangled = vector_along(labels.fields(tensor), axis)
    for field in tangled:
        labels.pin(field, "channels are spread over several axes", call)
    return vector


def meet(data: Tensor | None, weight: Tensor | None, call: Call, labels: Labels) -> None:
    """The axis that is summed over: what one side calls a channel the other must call one too."""
    if data is not None and weight is not None:
        if data.shape != weight.shape:
            data, weight = torch.broadcast_tensors(data, weight)
        pinned = weight[(weight > 0) & (data <= 0)]
        if pinned.numel():
            labels.pin(pinned, _NO_CHANNELS, call)
        pinned = data[(data > 0) & (weight <= 0)]
        if pinned.numel():
            labels.pin(pinned, "is multiplied with data that belongs to no channel", call)
        both = (data > 0) & (weight > 0)
        labels.join(data[both], weight[both], call)
    elif weight is not None:
        labels.pin(weight, _NO_CHANNELS, call)
    elif data is not None:
        labels.pin(data, "is summed against data that belongs to no channel", call)


@rule("convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution")
def _(call: Call, labels: Labels) -> None:
    source, weight = call.inputs[0], call.inputs[1]
    bias, out = call.arg("bias"), call.outputs[0]
    groups, transposed = call.arg("groups", 1), bool(call.arg("transposed", default=False))
    channel_axis = out.ndim - weight.ndim + 1
    known = tuple(labels.alike(field, channel_axis, call) for field in labels.fields(source))
    for field in known:
        if axes_of(field) not in ((), (channel_axis,)):
            labels.pin(field, "channels lie on an axis the convolution slides over", call)
    data, _ = vector_along(known, channel_axis)
    rows, columns = (vector_of(weight, axis, call, labels) for axis in (0, 1))
    for field in labels.fields(weight):
        if axes_of(field) and min(axes_of(field)) > 1:
            labels.pin(field, "a position of the kernel", call)
    if transposed:
        made = _transposed_groups(data, rows, columns, groups, call, labels)
    else:
        made = plain_groups(data, rows, columns, groups, call, labels)
    if made is not None:
        labels.assign(out, (axis_field(made, channel_axis, out.ndim),))
        if bias is not None:
            join_bias(made, bias, call, labels)
    spatial = source.shape[channel_axis + 1 :] if transposed else out.shape[channel_axis + 1 :]
    batch = out.shape[0] if channel_axis == 1 else 1
    summed = rows if transposed else columns
    if groups > 1 and labels.is_depthwise(call):
        summed = None
    price(
        Contraction(
            call.name,
            call.module,
            batch * prod(weight.shape) * prod(spatial),
            (rows, columns),
            produced=made,
            reads=summed if data is None else data,
            summed=summed,
            num_out=out.shape[channel_axis],
            num_in=source.shape[channel_axis],
            gated=summed if labels.is_bare(weight) else None,
        ),
        labels,
    )


def plain_groups(
    data: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    groups: int,
    call: Call,
    labels: Labels,
) -> Tensor | None:
    """Weight (out, in/groups, ...). Returns the labels of the output channels."""
    if groups == 1:
        meet(data, columns, call, labels)
        return rows
    if not labels.is_depthwise(call):
        # in/groups > 1: every group reads the same positions, and writes the same positions.
        if data is not None and data.numel() % groups == 0:
            data = data.view(groups, -1)
        meet(data, columns, call, labels)
        _tie_groups(rows, groups, call, labels)
    else:
        _couple_depthwise(data, rows, groups, call, labels)
    return rows


def _transposed_groups(
    data: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    groups: int,
    call: Call,
    labels: Labels,
) -> Tensor | None:
    """Weight (in, out/groups, ...). Returns the labels of the output channels."""
    if groups == 1:
        meet(data, rows, call, labels)
        return columns
    per_group = call.outputs[0].shape[call.outputs[0].ndim - call.inputs[1].ndim + 1] // groups
    meet(data, rows, call, labels)
    if labels.is_depthwise(call):
        # One input channel per group: its outputs, one or several, belong to it.
        if columns is not None:
            labels.pin(columns, "a channel multiplier", call)
        return None if rows is None else rows.repeat_interleave(per_group)
    _tie_groups(rows, groups, call, labels)
    return None if columns is None else columns.repeat(groups)


def _tie_groups(rows: Tensor | None, groups: int, call: Call, labels: Labels) -> None:
    if rows is not None:
        blocks = rows.view(groups, -1)
        labels.join(blocks[:1], blocks, call)


def _couple_depthwise(
    data: Tensor | None, rows: Tensor | None, groups: int, call: Call, labels: Labels
) -> None:
    if rows is None:
        return
    if data is None:
        labels.pin(rows, _NO_CHANNELS, call)
        return
    blocks = rows.view(groups, -1)
    plain = blocks[data <= 0]
    if plain.numel():
        labels.pin(plain, _NO_CHANNELS, call)
    both = data > 0
    labels.join(data[both][:, None], blocks[both], call)


def join_bias(made: Tensor, bias: Tensor, call: Call, labels: Labels) -> None:
    """A bias has the channels of what it is added to; one without labels keeps them all."""
    own, _ = vector_along(labels.fields(bias), bias.ndim - 1)
    if own is not None:
        labels.join(made, own, call)
    elif made.numel() > 1:
        labels.pin(made, "its bias has no channel labels", call)


def price(contraction: Contraction, labels: Labels) -> None:
    """Record it: take the lengths of the labelled axes out of `factor`, which holds all MACs so far."""
    known = tuple(axis for axis in contraction.axes if axis is not None)
    factor = contraction.factor // max(prod(axis.numel() for axis in known), 1)
    labels.contract(replace(contraction, factor=factor, axes=known))


@rule("baddbmm", "linear")
@rule("mm", "bmm", counts=True)
@rule("addmm", counts=True, on_meta={"default": addmm_shape})
def _(call: Call, labels: Labels) -> None:
    out = call.outputs[0]
    tensors = list(call.inputs)
    bias = None
    if call.name in ("aten.addmm", "aten.baddbmm"):
        bias, left, right = tensors[:3]
        right_fields = labels.fields(right)
    elif call.name == "aten.linear":
        left, right = tensors[:2]
        bias = tensors[2] if len(tensors) > 2 else None
        right_fields = tuple(f.transpose(-1, -2) for f in labels.fields(right))
    else:
        left, right = tensors[:2]
        right_fields = labels.fields(right)
    inner_size = left.shape[-1]
    rank = out.ndim
    left_fields = labels.fields(left)
    is_layer = labels.is_derived(left) or labels.is_derived(right)
    labels.mixes_activations |= not is_layer
    if labels.is_probe:
        left_fields, right_fields = (_by_head(f, labels) for f in (left_fields, right_fields))
    if labels.is_derived(right) and not labels.is_derived(left):
        left_fields = tuple(labels.alike(f, left.ndim - 1, call) for f in left_fields)
    for field in (*left_fields, *right_fields):
        if len(axes_of(field)) > 1:
            labels.pin(field, "channels are spread over several axes", call)
    summed_left, _ = vector_along(left_fields, left.ndim - 1)
    summed_right, _ = vector_along(right_fields, right.ndim - 2)
    meet(summed_left, summed_right, call, labels)
    rows = _outer(left_fields, left.ndim - 1)
    columns = _outer(right_fields, right.ndim - 2)
    fields = _combine(rows, columns, call, labels)
    if bias is not None and (fields or labels.fields(bias)):
        fields = join_aligned([(out, fields), (bias, labels.fields(bias))], rank, call, labels)
    labels.assign(out, fields)
    inner = summed_right if summed_right is not None else summed_left
    outer = tuple(f.reshape(-1) for f in _one_per_axis(fields, call, labels))
    produced = vector_along(columns, rank - 1)[0] if is_layer else None
    price(
        Contraction(
            call.name,
            call.module,
            out.numel() * inner_size,
            (inner, *outer),
            produced=produced,
            reads=inner,
            summed=inner,
            num_out=out.shape[-1],
            num_in=inner_size,
            is_layer=is_layer,
            of_weights=labels.is_derived(left) and labels.is_derived(right),
            gated=_bare_labels((left, summed_left), (right, summed_right), labels),
        ),
        labels,
    )


def _bare_labels(*operands_and_labels: Any) -> Tensor | None:
    """The summed labels of the operand that is a parameter, if one is."""
    *operands, labels = operands_and_labels
    return next(
        (own for tensor, own in operands if own is not None and labels.is_bare(tensor)), None
    )


def _by_head(fields: Fields, labels: Labels) -> Fields:
    """In a probe: channels spread over a batch axis and a matrix axis are heads on the batch axis."""
    result = []
    for field in fields:
        if field.ndim == _BATCHED and len(axes_of(field)) == 2 and axes_of(field)[0] == 0:
            first = field.narrow(axes_of(field)[1], 0, 1)
            labels.heads.append((first.expand_as(field), field))
            result.append(first)
        else:
            result.append(field)
    return tuple(result)


def _combine(rows: Fields, columns: Fields, call: Call, labels: Labels) -> Fields:
    """Rows and columns keep their labels side by side; labels of a common batch axis join."""
    result = list(rows)
    for column in columns:
        twin = next((f for f in rows if axes_of(f) == axes_of(column)), None)
        if twin is None:
            result.append(column)
        else:
            labels.join(twin, column, call)
            if labels.is_probe:
                labels.heads.append((twin, column))
    return tuple(result)


def _outer(fields: Fields, summed: int) -> Fields:
    """The fields that survive the sum: those on axes of the batch, of rows or of columns."""
    return tuple(f for f in fields if len(axes_of(f)) == 1 and axes_of(f) != (summed,))


def _one_per_axis(fields: Fields, call: Call, labels: Labels) -> Fields:
    """An axis that holds the labels of two others, flattened, has one length to price."""
    by_axis: dict[tuple[int, ...], list[Tensor]] = {}
    for field in fields:
        by_axis.setdefault(axes_of(field), []).append(field)
    for own in by_axis.values():
        for field in own if len(own) > 1 else ():
            labels.pin(field, "channels of two kinds lie on one axis", call)
    return tuple(own[0] for own in by_axis.values())


@rule("addmv", "einsum", "_trilinear")
@rule("mv", "dot", counts=True)
def _(call: Call, labels: Labels) -> None:
    pin_inputs(call, labels, "a matrix-vector product")
