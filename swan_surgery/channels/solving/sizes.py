"""Two recordings of a model at two sizes of its inputs: do channels mean the same in both?

What a model does to channels must not hang on how many pixels, words or samples it is given. Most
models run the same operations on the same labels at every size; where one does not, the channels that
meet others at another size, or are counted in another way, are pinned.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from swan_surgery.calls.functions import SCALING
from swan_surgery.channels.labels.fields import Fields, axes_of
from swan_surgery.channels.labels.recording import OpRecord, Reason, Recording, Weighting
from swan_surgery.channels.rules.registry import facts_named
from swan_surgery.channels.solving.mapping import LabelledTensors, Trace, solve


Pins = list[tuple[Tensor, Reason]]


def free_labels(traces: Sequence[Trace], labelled: LabelledTensors) -> Tensor:
    """By label whether it could go, bool of shape (num_labels + 1,)."""
    solution = solve(list(traces), labelled, ())
    return torch.from_numpy(solution.prunable[solution.component])


def first_difference(one: Recording, two: Recording, free: Tensor | None = None) -> OpRecord | None:
    """The first operation of `two` that does something else to channels; None if all do the same.

    Operations that work position by position may be others in another mode (dropout); what they
    make of labels shows in what follows them. With `free`, only labels count that could go.
    """
    first, second = list(_steps(one, free)), list(_steps(two, free))
    for before, after in zip(first, second, strict=False):
        if not _is_same_step(before, after, free):
            return after
    if len(first) != len(second):
        return second[len(first)] if len(second) > len(first) else first[len(second)]
    by_call = {weighting.frame.call: weighting for weighting in one.weightings}
    for weighting in two.weightings:
        if not _counts_the_same(by_call.get(weighting.frame.call), weighting):
            return two.ops[weighting.index]
    return _first_other_call(one, two, free)


def _first_other_call(one: Recording, two: Recording, free: Tensor | None) -> OpRecord | None:
    """The first call of a torch function, of those that gates and numbers are told by, made elsewhere."""
    first, second = _calls(one, free), _calls(two, free)
    scaling, others = set(map(_place, second[True])), second[False]
    for before in first[True]:
        if _place(before) not in scaling:
            return before
    for before, after in zip(first[False], others, strict=False):
        if _place(before) != _place(after):
            return after
    longer = max(first[False], others, key=len)
    return longer[min(len(first[False]), len(others))] if len(first[False]) != len(others) else None


def _calls(recording: Recording, free: Tensor | None) -> dict[bool, list[OpRecord]]:
    """Operations on labels that tracked functions made; True: those that only scale."""
    found: dict[bool, list[OpRecord]] = {False: [], True: []}
    for op in recording.ops:
        if op.frame is not None and any(map(any, (_of(op.inputs, free), _of(op.outputs, free)))):
            found[op.frame.function in SCALING].append(op)
    return found


def _place(op: OpRecord) -> tuple[tuple[str, str, int], str] | None:
    return None if op.frame is None else (op.frame.call, op.frame.site)


def _steps(recording: Recording, free: Tensor | None) -> Iterator[OpRecord]:
    for op in recording.ops:
        inputs, outputs = _of(op.inputs, free), _of(op.outputs, free)
        if not op.is_pointwise and any(map(any, (inputs, outputs))) and not _keeps(inputs, outputs):
            yield op


def _keeps(inputs: tuple[Fields, ...], outputs: tuple[Fields, ...]) -> bool:
    """Whether an operation hands labels on as they are, as a slice of pixels does."""
    labelled = [own for own in inputs if own]
    return len(labelled) == 1 and all(_same_fields((own,), (labelled[0],)) for own in outputs)


def _of(fields: tuple[Fields, ...], free: Tensor | None) -> tuple[Fields, ...]:
    if free is None:
        return fields
    return tuple(tuple(f for f in own if bool(free[f.clamp(min=0)].any())) for own in fields)


def _is_same_step(one: OpRecord, two: OpRecord, free: Tensor | None) -> bool:
    return (
        one.module == two.module
        and (one.name == two.name or (_is_reshape(one) and _is_reshape(two)))
        and len(one.ties) == len(two.ties)
        and _same_fields(_of(one.inputs, free), _of(two.inputs, free))
        and _same_results(_of(one.outputs, free), _of(two.outputs, free))
    )


def _same_results(one: tuple[Fields, ...], two: tuple[Fields, ...]) -> bool:
    """Beside the first, only results count that carry channels in both.

    Batch-norm hands out the statistics of the batch in train mode alone; whatever reads them is a step.
    """
    if len(one) != len(two):
        return False
    both = [place for place in range(len(one)) if not place or (one[place] and two[place])]
    return _same_fields(tuple(one[p] for p in both), tuple(two[p] for p in both))


def _is_reshape(op: OpRecord) -> bool:
    return facts_named(op.packet).is_reshape


def _same_fields(one: tuple[Fields, ...], two: tuple[Fields, ...]) -> bool:
    return len(one) == len(two) and all(
        len(own) == len(other) and all(map(_is_alike, own, other))
        for own, other in zip(one, two, strict=True)
    )


def _is_alike(one: Tensor, two: Tensor) -> bool:
    """Equal but for how often labels repeat: samples or pixels may lie on the same axis."""
    if _is_equal(one, two):
        return True
    return one.ndim == two.ndim and _is_equal(_unrepeated(one), _unrepeated(two))


def _unrepeated(field: Tensor) -> Tensor:
    """The field without repetitions of the whole along an axis, and then of single positions."""
    for axis in axes_of(field):
        size = field.shape[axis]
        for period in range(1, size):
            if size % period == 0 and torch.equal(
                field.narrow(axis, 0, size - period), field.narrow(axis, period, size - period)
            ):
                field = field.narrow(axis, 0, period)
                break
        size = field.shape[axis]
        rows = field.movedim(axis, 0).reshape(size, -1)
        changes = (rows[1:] != rows[:-1]).any(1)
        if changes.all():
            continue
        starts = [0, *(changes.nonzero().reshape(-1) + 1).tolist()]
        run = starts[1] if len(starts) > 1 else size
        if starts == list(range(0, size, run)):
            field = field.index_select(axis, torch.tensor(starts))
    return field


def _is_equal(one: Tensor, two: Tensor) -> bool:
    return one is two or (one.shape == two.shape and torch.equal(one, two))


def _counts_the_same(one: Weighting | None, two: Weighting) -> bool:
    return one is not None and one.frame.site == two.frame.site and _is_equal(one.field, two.field)


def size_pins(
    traces: Sequence[Trace], others: Sequence[tuple[Trace | None, Trace]], labelled: LabelledTensors
) -> Pins:
    """Pins for what is another at another size.

    Args:
        traces: the runs at the given size.
        others: those at another size that do something else to channels, each with the run in the
            same mode at the given size, if there is one.
        labelled: the labels of all.
    """
    pins: Pins = []
    for before, after in others:
        differs = None if before is None else first_difference(before.recording, after.recording)
        op, module = ("forward", "") if differs is None else (differs.name, differs.module)
        why = Reason("meets other channels at another size or number of inputs", op, module)
        merged = _merged(traces, [*traces, after], labelled)
        if merged.numel():
            pins.append((merged, why))
        known = [] if before is None else before.recording.weightings
        by_call = {weighting.frame.call: weighting for weighting in known}
        for weighting in after.recording.weightings:
            if not _counts_the_same(by_call.get(weighting.frame.call), weighting):
                text = "a statistic over other positions at another size or number of inputs"
                pins.append(
                    (
                        weighting.field.reshape(-1),
                        Reason(text, weighting.op, weighting.frame.module),
                    )
                )
    return pins


def _merged(traces: Sequence[Trace], more: Sequence[Trace], labelled: LabelledTensors) -> Tensor:
    """Labels that could go by the first runs, and meet those of other units in one of the others."""
    few, many = solve(list(traces), labelled, ()), solve(list(more), labelled, ())
    free = np.flatnonzero(few.prunable[few.component])
    pairs = np.unique(np.stack([many.component[free], few.component[free]], 1), axis=0)
    found, counts = np.unique(pairs[:, 0], return_counts=True)
    hit = np.isin(many.component[free], found[counts > 1])
    return torch.from_numpy(free[hit])
