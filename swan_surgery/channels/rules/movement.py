"""Rules for operations that only move data: the operation itself is executed on the labels.

No index arithmetic of our own: views, transposes, concatenations, slices, shuffles and pads come out
exact for every stride, offset and interleaving.
"""

from math import prod

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from swan_surgery.channels.labels.fields import (
    FILL,
    PLAIN,
    Fields,
    axes_of,
    axis_field,
    compact,
    reshaped,
    vector_along,
)
from swan_surgery.channels.labels.labels import Labels
from swan_surgery.channels.labels.recording import Call
from swan_surgery.channels.rules.on_meta import indexed
from swan_surgery.channels.rules.pointwise import join_aligned
from swan_surgery.channels.rules.registry import facts_of, pin_inputs, rule


@rule(
    "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "select", "unbind", "alias",
    "flip", "roll", "repeat", "pixel_unshuffle", "unfold", "movedim", "diagonal", "swapaxes",
    "index_select", "flatten", "unflatten", "repeat_interleave", "tile", "rot90",
)  # fmt: skip
@rule("view", "_unsafe_view", is_reshape=True, spreads=True)
@rule("_reshape_alias", is_reshape=True)
@rule("reshape", "pixel_shuffle", spreads=True)
@rule("channel_shuffle", "native_channel_shuffle", shuffles=True)
@rule("index", by_position=True, on_meta={"Tensor": indexed})
def _(call: Call, labels: Labels) -> None:
    source = call.inputs[0]
    _note_aliases(call, labels)
    if call.op is torch.ops.aten.view.dtype:  # a closed channel may be -0.0
        pin_inputs(call, labels, "its bits are read as another type")
        return
    indices = call.inputs[1:]
    for index in indices:
        for field in labels.fields(index):
            labels.pin(field, "used as an index", call)
    if not labels.fields(source):
        if not indices:
            _note_constant(call, labels)
        return
    if any(index.is_meta for index in indices):
        pin_inputs(call, labels, "indexed with values that are not known while planning")
        return
    _move(source, call, labels)


def _note_aliases(call: Call, labels: Labels) -> None:
    source = call.inputs[0]
    for out in call.outputs:
        if call.op.is_view:
            labels.note_view(source, out)
        if labels.is_bare(source):
            labels.mark_bare(out)


def _note_constant(call: Call, labels: Labels) -> None:
    """Where nothing is labelled: along which axes the outputs are constant."""
    source = call.inputs[0]
    if labels.is_harmless(source):
        for out in call.outputs:
            labels.mark_harmless(out)
    elif labels.is_marked(source) or call.name in ("aten.expand", "aten.repeat"):
        varying = labels.varying(source)
        sizes = [n if axis in varying else 1 for axis, n in enumerate(source.shape)]
        positions = torch.arange(1, prod(sizes) + 1).view(sizes)
        for out, moved in zip(call.outputs, _execute(positions, call), strict=True):
            labels.mark_harmless(out, frozenset(axes_of(compact(moved))))


def _move(source: Tensor, call: Call, labels: Labels) -> None:
    results: list[list[Tensor]] = [[] for _ in call.outputs]
    for field in labels.fields(source):
        before = axes_of(field)
        if call.op is torch.ops.aten.squeeze.default and before:
            labels.pin(field, "squeeze() without an axis would drop a width of one", call)
        for index, moved in enumerate(_execute(field, call)):
            result = compact(moved)
            if len(axes_of(result)) > len(before) and call.index in labels.within_heads:
                result = labels.collapse(result, call)
            if labels.is_probe:
                if len(axes_of(result)) > len(before):
                    labels.splits.append((call.index, result))
            else:
                result = _tied(field, result, call, labels)
            results[index].append(result)
    for out, fields in zip(call.outputs, results, strict=True):
        labels.assign(out, tuple(fields))


def _tied(field: Tensor, result: Tensor, call: Call, labels: Labels) -> Tensor:
    """Tie what a movement split, so that what is left can be moved the same way."""
    before, after = axes_of(field), axes_of(result)
    if not after and before:
        labels.pin(result, "a single channel is picked by its position", call)
    if len(before) == 1 and (len(after) > 2 or call.name == "aten.pixel_shuffle"):
        result = labels.tie_to_first(result, call)
    elif len(after) > 1 and (len(before) < len(after) or facts_of(call.op).spreads):
        labels.tie(result, call)
    if facts_of(call.op).shuffles and before == (1,):
        block = field.shape[1] // call.arg("groups")
        labels.tie_by([_tied_blocks(field, 1, block)], call)
    return result


def _execute(field: Tensor, call: Call) -> list[Tensor]:
    if facts_of(call.op).is_reshape:
        return [reshaped(field, call.inputs[0].shape, call.outputs[0].shape)]
    field = field.expand(call.inputs[0].shape)
    # Positions may lie on a GPU, where a model runs that no shell of it stands in for; labels do not.
    args, kwargs = call.args[1:], call.kwargs
    if len(call.inputs) > 1:
        args, kwargs = tree_map_only(Tensor, Tensor.cpu, (args, kwargs))
    moved = call.op(field, *args, **kwargs)
    return list(moved) if isinstance(moved, (list, tuple)) else [moved]


@rule("as_strided")
def _(call: Call, labels: Labels) -> None:
    source, out = call.inputs[0], call.outputs[0]
    if source.shape != out.shape:
        pin_inputs(call, labels, "read with strides of its own")
        return
    _note_aliases(call, labels)  # only the memory format changes
    if labels.is_marked(source):
        labels.mark_harmless(out, labels.varying(source))
    labels.assign(out, labels.fields(source))


@rule("embedding")
def _(call: Call, labels: Labels) -> None:
    table, positions = call.inputs[:2]
    out = call.outputs[0]
    for field in labels.fields(positions):
        labels.pin(field, "used as an index", call)
    vector, tangled = vector_along(labels.fields(table), 1)
    for field in (*tangled, *(f for f in labels.fields(table) if axes_of(f) == (0,))):
        labels.pin(field, "rows that are looked up", call)
    if vector is not None:
        labels.assign(out, (axis_field(vector, out.ndim - 1, out.ndim),))


@rule("index_put", by_position=True)
@rule("_index_put_impl")
def _(call: Call, labels: Labels) -> None:
    source, *indices, values = call.inputs
    out = call.outputs[0]
    places = call.arg("indices")
    axes = frozenset(axis for axis, index in enumerate(places) if index is not None)
    for index in indices:
        for field in labels.fields(index):
            labels.pin(field, "used as an index", call)
    # One index along the first axis: values line up with what they are written into.
    lines_up = axes == {0} and indices[0].ndim == 1 and values.ndim <= out.ndim
    for tensor in (source, values):
        for field in labels.fields(tensor):
            hit = axes & {axis + out.ndim - tensor.ndim for axis in axes_of(field)}
            if not lines_up or hit:
                labels.pin(field, "written at positions along the channels", call)
    if not lines_up:
        labels.spoil(out)
        return
    fields = join_aligned(
        [(source, labels.fields(source)), (values, labels.fields(values))], out.ndim, call, labels
    )
    labels.spoil(out)
    labels.assign(out, fields)


@rule("split", "split_with_sizes", "chunk", "slice", "narrow", "split_copy")
@rule("unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk")
def _(call: Call, labels: Labels) -> None:
    source = call.inputs[0]
    _note_aliases(call, labels)
    if not labels.fields(source):
        _note_constant(call, labels)
        return
    _move(source, call, labels)
    axis = call.arg("dim", 0) % source.ndim
    for out in (out for out in call.outputs if not out.shape[axis]):
        # Nothing is left to move; the other axes are as long as before.
        beside = tuple(f for f in labels.fields(source) if axis not in axes_of(f))
        labels.assign(out, beside)
    lengths = {out.shape[axis] for out in call.outputs}
    for field in labels.fields(source):
        size = field.shape[axis]
        if size == 1 or (length := min(lengths)) in (0, size) or len(lengths) > 1:
            continue
        blocks = _tied_blocks(field, axis, length)
        if call.name == "aten.slice":
            labels.tie_by([[], blocks] if blocks else [[]], call)
        else:
            labels.tie_by([blocks], call)


def _tied_blocks(field: Tensor, axis: int, length: int) -> list[tuple[Tensor, Tensor]]:
    """Join position i of the first block with position i of every other block of that length."""
    size = field.shape[axis]
    if size % length:
        return []
    first = field.narrow(axis, 0, length)
    joins = []
    for start in range(length, size, length):
        other = field.narrow(axis, start, length)
        both = (first > 0) & (other > 0)
        joins.append((first[both], other[both]))
    return joins


@rule("cat", "concat")
def _(call: Call, labels: Labels) -> None:
    axis = call.arg("dim", 0) % call.outputs[0].ndim
    tensors = [t for t in call.inputs if t.ndim == call.outputs[0].ndim and t.shape[axis]]
    if len(tensors) == 1:
        labels.assign(call.outputs[0], labels.fields(tensors[0]))
        return
    if any(_lies_along(f, t, axis) for t in tensors for f in labels.fields(t)):
        along = [_along(tensor, axis, labels) for tensor in tensors]
        shape = _broadcast([f.shape for f in along], axis)
        wide = [f.expand([*shape[:axis], f.shape[axis], *shape[axis + 1 :]]) for f in along]
        fields: Fields = (compact(torch.cat(wide, axis)),)
    else:
        fields = ()
    across = [
        (t, tuple(f for f in labels.fields(t) if axes_of(f) and axis not in axes_of(f)))
        for t in tensors
    ]
    labels.assign(
        call.outputs[0], (*fields, *join_aligned(across, call.outputs[0].ndim, call, labels))
    )


def _lies_along(field: Tensor, tensor: Tensor, axis: int) -> bool:
    """Whether a field belongs to the axis; that of a single channel does if the axis has length 1."""
    axes = axes_of(field)
    return axis in axes or (not axes and tensor.shape[axis] == 1)


def _along(tensor: Tensor, axis: int, labels: Labels) -> Tensor:
    """The field of one part of a concat, at full length along the axis."""
    for field in labels.fields(tensor):
        if axis in axes_of(field):
            return field
    scalar = next((f for f in labels.fields(tensor) if not axes_of(f)), None)
    shape = [tensor.shape[axis] if a == axis else 1 for a in range(tensor.ndim)]
    if scalar is not None and tensor.shape[axis] == 1:
        return scalar
    return torch.full(shape, FILL if labels.is_harmless(tensor) else PLAIN)


def _broadcast(shapes: list[torch.Size], axis: int) -> list[int]:
    return [1 if a == axis else max(s[a] for s in shapes) for a in range(len(shapes[0]))]


@rule("stack")
def _(call: Call, labels: Labels) -> None:
    out = call.outputs[0]
    axis = call.arg("dim", 0) % out.ndim
    lifted = [(t.unsqueeze(axis), t) for t in call.inputs]
    operands = []
    for wide, tensor in lifted:
        if labels.is_harmless(tensor):
            labels.mark_harmless(wide)
        operands.append((wide, tuple(f.unsqueeze(axis) for f in labels.fields(tensor))))
    labels.assign(out, join_aligned(operands, out.ndim, call, labels))


@rule("constant_pad_nd")
def _(call: Call, labels: Labels) -> None:
    source, out = call.inputs[0], call.outputs[0]
    pads = list(call.arg("pad"))
    fill = FILL if call.arg("value", 0) == 0 else PLAIN
    fields = []
    for field in labels.fields(source):
        # Only the axes that carry labels grow: a border of constants belongs to every channel.
        own = [
            amount if _lies_along(field, source, source.ndim - 1 - i // 2) else 0
            for i, amount in enumerate(pads)
        ]
        if not axes_of(field) and any(own):
            labels.pin(field, "a single channel is padded", call)
        fields.append(torch.constant_pad_nd(field, own, fill))
    labels.assign(out, tuple(fields))
    if labels.is_harmless(source):
        longer = {source.ndim - 1 - i // 2 for i, amount in enumerate(pads) if amount}
        labels.mark_harmless(out, frozenset(longer))
