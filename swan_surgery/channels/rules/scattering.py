"""Rules for operations that write, add or pick rows at positions: along one axis, others stay."""

from torch import Tensor

from swan_surgery.channels.labels.fields import Fields, axes_of
from swan_surgery.channels.labels.labels import Labels
from swan_surgery.channels.labels.recording import Call
from swan_surgery.channels.rules.pointwise import axes_along, join_aligned, write
from swan_surgery.channels.rules.registry import facts_of, rule


@rule("index_copy", "index_fill")
@rule("index_add", counts=True, along_dim=True)
def _(call: Call, labels: Labels) -> None:
    """Rows of a source, or a number, at a vector of positions along `dim`."""
    index = call.arg("index")
    for field in labels.fields(index):
        labels.pin(field, "used as an index", call)
    _beside(call, [tensor for tensor in call.inputs if tensor is not index], labels)


@rule("gather", "scatter")
@rule("scatter_add", "scatter_reduce", counts=True, along_dim=True)
def _(call: Call, labels: Labels) -> None:
    """A position of its own for every value: channels beside `dim` meet, position by position."""
    _beside(call, list(call.inputs), labels)


def _beside(call: Call, tensors: list[Tensor], labels: Labels) -> None:
    out = call.outputs[0]
    axis = call.arg("dim") % max(out.ndim, 1)
    operands: list[tuple[Tensor, Fields]] = []
    for tensor in tensors:
        kept = []
        for field in labels.fields(tensor):
            own = axes_of(field)
            if axis in own:
                labels.pin(field, "written or read at positions along the channels", call)
            elif any(_differ(tensors, other) for other in own):
                labels.pin(field, "only some of the channels are written or read", call)
            else:
                kept.append(field)
        operands.append((tensor, tuple(kept)))
    fields = join_aligned(operands, out.ndim, call, labels)
    if out is call.inputs[0]:
        write(out, fields, call, labels)
        labels.spoil(out)
        return
    labels.assign(out, fields)
    if not fields:
        varying = frozenset[int]().union(*(axes_along(t, out.ndim, labels) for t in tensors))
        labels.mark_harmless(out, varying | {axis})


def _differ(tensors: list[Tensor], axis: int) -> bool:
    """Whether an axis is shorter in one operand than in another; numbers have none."""
    return len({tensor.shape[axis] for tensor in tensors if tensor.ndim > axis}) > 1


@rule("max_unpool2d", spatial_rank=2)
@rule("max_unpool3d", spatial_rank=3)
def _(call: Call, labels: Labels) -> None:
    out = call.outputs[0]
    spatial = set(range(out.ndim - facts_of(call.op).spatial_rank, out.ndim))
    operands: list[tuple[Tensor, Fields]] = []
    for tensor in call.inputs:
        fields = labels.fields(tensor)
        for field in fields:
            if set(axes_of(field)) & spatial:
                labels.pin(field, "pooled or resampled along the channels", call)
        kept = tuple(field for field in fields if not set(axes_of(field)) & spatial)
        operands.append((tensor, kept))
    labels.assign(out, join_aligned(operands, out.ndim, call, labels))
