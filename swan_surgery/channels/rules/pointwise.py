"""Rules for operations that work position by position, with broadcasting."""

from math import prod

import torch
from torch import Tensor

from swan_surgery.channels.labels.fields import (
    Fields,
    align,
    axes_of,
    axis_field,
    by_overlap,
    compact,
    merge,
)
from swan_surgery.channels.labels.labels import Labels
from swan_surgery.channels.labels.recording import Call, Contraction
from swan_surgery.channels.rules.on_meta import same_shape
from swan_surgery.channels.rules.registry import describe, facts_of, pin_inputs, rule


def join_aligned(
    operands: list[tuple[Tensor, Fields]], ndim: int, call: Call, labels: Labels
) -> Fields:
    """Join the fields of operands that broadcast to rank `ndim`; returns the result's fields."""
    scalars: list[tuple[int, Tensor]] = []
    wide: list[tuple[int, Tensor]] = []
    for operand, (_, fields) in enumerate(operands):
        for field in fields:
            aligned = align(field, ndim)
            (wide if axes_of(aligned) else scalars).append((operand, aligned))
    result = [field for _, field in scalars]
    for unsorted in by_overlap(wide):
        # The richest labels first: those of one head must not stand for all of them.
        group = sorted(unsorted, key=lambda member: -len(axes_of(member[1])))
        merged = group[0][1]
        for _, field in group[1:]:
            if field is not merged:
                labels.join(merged, field, call)
                merged = merge(merged, field)
        axes = axes_of(merged)
        present = {operand for operand, _ in group}
        for operand, (tensor, _) in enumerate(operands):
            if operand in present:
                continue
            if not axes_along(tensor, ndim, labels).isdisjoint(axes):
                labels.pin(merged, "meets data that belongs to no channel", call)
            elif len(axes) == 1:
                _adopt(tensor, merged, axes[0] - (ndim - tensor.ndim), labels)
        result.append(merged)
    return tuple(result)


def _adopt(tensor: Tensor, field: Tensor, axis: int, labels: Labels) -> None:
    """A constant that was made as wide as these channels is theirs, for whoever meets it next."""
    if axis < 0 or tensor.shape[axis] != field.numel() or field.numel() < 2:
        return
    if any(axis in axes_of(known) for known in labels.fields(tensor)):
        return
    vector = field.reshape(-1)
    labels.adopt(tensor, axis_field(vector, axis, tensor.ndim))
    for origin in labels.origins(tensor):
        _adopt(origin, vector, axis - (tensor.ndim - origin.ndim), labels)


def axes_along(tensor: Tensor, ndim: int, labels: Labels) -> frozenset[int]:
    """The axes, of a result of rank `ndim`, along which an operand holds data of its own."""
    return frozenset(axis + ndim - tensor.ndim for axis in labels.varying(tensor))


def _is_identity(call: Call) -> bool:
    return facts_of(call.op).overwrites and call.name.endswith("_")


# What torch does not tag as pointwise although it is, and in-place copies.
@rule(
    "pointwise", "hardswish", "_prelu_kernel", "native_dropout", "rsub", "where",
    "log_sigmoid_forward", "masked_fill", "rrelu_with_noise", "clamp", "dropout",
    "feature_dropout", "alpha_dropout", "lerp",
)  # fmt: skip
@rule("copy", overwrites=True)
@rule("fill", overwrites=True, fixes_numbers=True)
def pointwise(call: Call, labels: Labels) -> None:
    """Operands join position by position, with broadcasting; the result has their channels."""
    out = call.outputs[0]
    operands = [(tensor, labels.fields(tensor)) for tensor in call.inputs]
    if _is_identity(call):
        operands = operands[1:] or operands
    in_place = bool(call.inputs) and out is call.inputs[0]
    if all(not fields for _, fields in operands):
        if _is_identity(call) and labels.fields(out):
            operands = [(out, labels.fields(out)), *operands]
        else:
            _price_product(out, (), call, labels)
            varying = frozenset[int]().union(
                *(axes_along(tensor, out.ndim, labels) for tensor, _ in operands)
            )
            if len(varying) < out.ndim:
                for result in call.outputs:
                    labels.mark_harmless(result, varying)
                    labels.note_origins(result, [t for t, _ in operands if t is not result])
            elif in_place:
                labels.spoil(out)
            return
    fields = join_aligned(operands, out.ndim, call, labels)
    _price_product(out, fields, call, labels)
    if in_place:
        write(out, fields, call, labels)
    for result in call.outputs[1:] if in_place else call.outputs:
        if tuple(result.shape) == tuple(out.shape):
            labels.assign(result, fields)


@rule("_to_copy", "contiguous")
def _(call: Call, labels: Labels) -> None:
    if labels.is_bare(call.inputs[0]):
        labels.mark_bare(call.outputs[0])
    pointwise(call, labels)


@rule("bucketize", counts=True)
def _(call: Call, labels: Labels) -> None:
    # Each value by itself is placed among the boundaries, all of which count for it.
    values = call.arg("self")
    for field in labels.fields(call.arg("boundaries")):
        labels.pin(field, "boundaries that values are placed between", call)
    if isinstance(values, Tensor):  # or a number
        labels.assign(call.outputs[0], labels.fields(values))


# Tagged by torch, so the rule is theirs without an entry.
for _name in ("add", "sub", "mul", "div"):
    describe(_name, on_meta={"Tensor": same_shape(getattr(torch.ops.aten, _name).Tensor)})
for _name in ("gelu", "relu", "silu", "hardswish", "sigmoid"):
    describe(_name, on_meta={"default": same_shape(getattr(torch.ops.aten, _name).default)})
# No steps of a model. torch detaches what a factory returns where somebody else holds it, and
# whether reshape clones depends on strides, which a narrower model may have others of.
describe("detach", "clone", is_step=False)


def _price_product(out: Tensor, fields: Fields, call: Call, labels: Labels) -> None:
    """An einsum that sums over axes of size one multiplies position by position: one MAC each."""
    if labels.frame is None or labels.frame.function != "einsum" or call.name != "aten.mul":
        return
    if labels.priced is labels.frame:
        return  # of several operands, the first product is the one that counts
    axes = {axes_of(field): field.reshape(-1) for field in fields if len(axes_of(field)) == 1}
    factor = out.numel() // prod(vector.numel() for vector in axes.values())
    labels.contract(
        Contraction(
            call.name,
            call.module,
            factor,
            tuple(axes.values()),
            produced=None,
            reads=None,
            summed=None,
            num_out=out.shape[-1],
            num_in=1,
            is_layer=False,
        )
    )


def write(out: Tensor, fields: Fields, call: Call, labels: Labels) -> None:
    """The result lands in a tensor that existed: fine if it had these channels, or stands alone."""
    before = labels.fields(out)
    alone = {axes_of(f) for f in before} ^ {axes_of(f) for f in fields}
    if alone and labels.shares_memory(out):
        # What else shares the memory knows nothing of these; the others have joined.
        for field in (*before, *fields):
            if axes_of(field) in alone:
                labels.pin(field, "written in place into a part of another tensor", call)
    if alone:
        labels.spoil(out)
    labels.assign(out, tuple(compact(f) for f in fields))


@rule(
    "zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "rand", "randn",
    "new_empty_strided", "scalar_tensor",
)  # fmt: skip
@rule("empty", "empty_strided", "new_empty", unfilled=True)
def _(call: Call, labels: Labels) -> None:
    for tensor in call.outputs:
        labels.mark_harmless(tensor)


@rule(
    "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "bernoulli",
    "uniform", "normal", "zero",
)  # fmt: skip
def _(call: Call, labels: Labels) -> None:
    for tensor in call.outputs:
        if not labels.fields(tensor):
            labels.mark_harmless(tensor)
            if call.inputs and call.inputs[0].shape == tensor.shape:
                labels.assign(tensor, labels.fields(call.inputs[0]))


@rule("arange", "linspace", "eye", "lift_fresh", "sym_size")
@rule("_local_scalar_dense", by_value=True)
def _(call: Call, labels: Labels) -> None:
    if call.name == "aten._local_scalar_dense":
        pin_inputs(call, labels, "their values leave torch")
    for tensor in call.outputs:
        if tensor.numel() == 1 or torch.numel(tensor) == 0:
            labels.mark_harmless(tensor)
