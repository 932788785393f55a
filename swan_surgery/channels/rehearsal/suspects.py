"""Which channels are to blame for a failure: those that meet it, else the nearest before it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from swan_surgery.channels.labels.fields import axes_of
from swan_surgery.channels.labels.recording import OpRecord, Reason
from swan_surgery.channels.rehearsal.failures import Failure
from swan_surgery.channels.solving.arrays import Flags, Ints
from swan_surgery.channels.solving.mapping import LabelledTensors, Solution, Trace


# Whether any of some labels went in the rehearsal that failed.
Went = Callable[[Tensor], bool]


def went_in(component: Ints, gone: Flags) -> Went:
    """Whether labels belong to components that are gone; `component` is a label's."""
    lost = torch.from_numpy(gone[component])
    lost[0] = False  # no channel

    def went(labels: Tensor) -> bool:
        return bool(lost[labels.clamp(min=0)].any())

    return went


def widths_of(trace: Trace, failure: Failure, solution: Solution, went: Went) -> list[Tensor]:
    """Label vectors that a number in the code may repeat, the likeliest first.

    Of several vectors of the same components, one.
    """
    op = along_one_axis(trace.recording.ops[failure.index], solution)
    fields = [field for own in (*op.outputs, *op.inputs) for field in own]
    if failure.raised is not None:
        at_hand = [field for held in _at_hand(trace, failure) for field in held]
        fields = [*at_hand, *_own(failure, solution.labelled), *fields]
    vectors = {id(f): f.clamp(min=0).reshape(-1) for f in fields if len(axes_of(f)) == 1}
    # Heads folded into the batch, or flattened with their channels: an attribute may tell how many.
    single = [solution.one_of_each(vector) for vector in vectors.values() if went(vector)]
    found: dict[bytes, Tensor] = {}
    for vector in (*vectors.values(), *(one for one in single if one is not None)):
        if went(vector):
            found.setdefault(solution.component[vector.numpy()].tobytes(), vector)
    return list(found.values())


def along_one_axis(op: OpRecord, solution: Solution) -> OpRecord:
    """The operation with what was split and tied, groups x channels, on the axis that may shrink."""

    def narrowed(field: Tensor) -> Tensor:
        component = torch.from_numpy(solution.component[field.clamp(min=0).numpy()])
        for axis in axes_of(field) if len(axes_of(field)) > 1 else ():
            first = component.narrow(axis, 0, 1)
            if torch.equal(first.expand_as(component), component):
                component, field = first, field.narrow(axis, 0, 1)
        return field

    inputs, outputs = (
        tuple(tuple(map(narrowed, fields)) for fields in own) for own in (op.inputs, op.outputs)
    )
    return replace(op, inputs=inputs, outputs=outputs)


def met_by(trace: Trace, failure: Failure, labelled: LabelledTensors, went: Went) -> list[Tensor]:
    """Labels that met the failure, field by field; none if nothing that went did.

    Of functions that call one another, the innermost that holds any: `rearrange(q, ...)` raised for q.
    """
    if failure.raised is None:
        op = trace.recording.ops[failure.index]
        met = [field for own in (*op.inputs, *op.outputs) for field in own]
        return met if any(map(went, met)) else []
    held = ([f for f in fields if went(f)] for fields in _at_hand(trace, failure))
    return next(filter(None, held), []) or [f for f in _own(failure, labelled) if went(f)]


def nearest_before(trace: Trace, failure: Failure, went: Went, count: int) -> list[Tensor]:
    """What went at the last `count` operations before a failure where anything did.

    In the module that failed, else in the one around it, and so on.
    """
    op = trace.recording.ops[failure.index]
    module = op.module if failure.raised is None else failure.raised.module
    for scope in _scopes(module):
        found: list[Tensor] = []
        met = 0
        for earlier in reversed(trace.recording.ops[: failure.index + 1]):
            if scope and not f"{earlier.module}.".startswith(f"{scope}."):
                continue
            fields = [f for own in (*earlier.inputs, *earlier.outputs) for f in own if went(f)]
            found += fields
            met += bool(fields)
            if met == count:
                break
        if found:
            return found
    return []


def reason_for(failure: Failure, op: OpRecord) -> Reason:
    """Why channels that meet a failure stay."""
    raised = failure.raised
    if raised is None:
        text = "the forward code repeats this width, or depends on it"
        return Reason(text, op.name, op.module)
    at = f" at {raised.line}" if raised.line else ""
    return Reason(f"the code refuses another width ({raised.error}{at})", "forward", raised.module)


def _at_hand(trace: Trace, failure: Failure) -> Iterator[list[Tensor]]:
    """Fields of the tensors that the code held where it raised, the innermost function first."""
    for held in failure.raised.at_hand if failure.raised else ():
        yield [f for index, number in held for f in trace.recording.ops[index].outputs[number]]


def _own(failure: Failure, labelled: LabelledTensors) -> Iterator[Tensor]:
    """Fields of the parameters and buffers of the module that raised."""
    for name, fields in labelled.fields.items():
        if failure.raised is not None and name.rpartition(".")[0] == failure.raised.module:
            yield from fields


def _scopes(module: str) -> Iterable[str]:
    while module:
        yield module
        module = module.rpartition(".")[0]
    yield ""
