"""Rules that a user may name for an operation of their own, and how its multiply-adds are recorded."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor

from swan_surgery.channels.labels.fields import axes_of
from swan_surgery.channels.labels.labels import Labels, Rule
from swan_surgery.channels.labels.recording import Call, Contraction
from swan_surgery.channels.rules.mixing import reduce
from swan_surgery.channels.rules.op_facts import MacsFormula
from swan_surgery.channels.rules.pointwise import pointwise
from swan_surgery.channels.rules.registry import as_tuple


@dataclass(frozen=True, slots=True)
class ReadyMade:
    """A rule by name; `takes_axes`: which axes it is about may be said."""

    takes_axes: bool
    counts: bool
    by_place: bool


READY_MADE: Mapping[str, ReadyMade] = {
    "pointwise": ReadyMade(takes_axes=False, counts=False, by_place=False),
    # Of an operation that nobody knows, the worst: equal values tell places and how many there are.
    "reduction": ReadyMade(takes_axes=True, counts=True, by_place=True),
    "keeps_axis": ReadyMade(takes_axes=True, counts=False, by_place=False),
}


def ready_made_rule(name: str, axes: tuple[int, ...] | None) -> Rule:
    """The rule of that name, about these axes (None: its usual ones)."""
    if name == "pointwise":
        return pointwise
    if name == "reduction":
        return _reduction(axes)
    return _keeping((1,) if axes is None else axes)


def _reduction(axes: tuple[int, ...] | None) -> Rule:
    def apply(call: Call, labels: Labels) -> None:
        reduce(call, labels, as_tuple(call.arg("dim")) if axes is None else axes)

    return apply


def _keeping(axes: tuple[int, ...]) -> Rule:
    """The first tensor's axes stay as they are; all others may be mixed, as by a filter."""

    def apply(call: Call, labels: Labels) -> None:
        source = call.inputs[0]
        kept = {axis % source.ndim for axis in axes}
        fields = []
        for field in labels.fields(source):
            if not set(axes_of(field)) <= kept:
                labels.pin(field, "mixed along the channels", call)
            else:
                fields.append(field)
                _pin_beside(field, call, labels)
        for out in call.outputs:
            if out.ndim == source.ndim:
                labels.assign(out, tuple(fields))
                if labels.is_harmless(source):
                    labels.mark_harmless(out, frozenset(range(out.ndim)) - kept)
                continue
            for field in fields:
                labels.pin(field, "a result of another rank", call)

    return apply


def _pin_beside(field: Tensor, call: Call, labels: Labels) -> None:
    """Another operand that is as long as the channels somewhere may hold something for each."""
    for other in call.inputs[1:]:
        for own in labels.fields(other):
            labels.pin(own, "an operand of a filter", call)
        if other.numel() > 1 and any(field.shape[axis] in other.shape for axis in axes_of(field)):
            labels.pin(field, "filtered with an operand of the same length", call)


def priced(rule: Rule, macs: MacsFormula) -> Rule:
    """The rule, which also records multiply-adds: they shrink with every labelled axis of the result.

    A rule that records contractions of its own is left to it.
    """

    def apply(call: Call, labels: Labels) -> None:
        before = len(labels.recording.contractions)
        rule(call, labels)
        if len(labels.recording.contractions) > before:
            return
        out = call.outputs[0]
        axes = {axes_of(f): f.reshape(-1) for f in labels.fields(out) if len(axes_of(f)) == 1}
        total = macs(*shapes_of(call))
        labels.contract(
            Contraction(
                call.name,
                call.module,
                total // max(prod(vector.numel() for vector in axes.values()), 1),
                tuple(axes.values()),
                produced=None,
                reads=None,
                summed=None,
                num_out=out.shape[-1] if out.ndim else 1,
                num_in=1,
                is_layer=False,
            )
        )

    return apply


def shapes_of(call: Call) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The shapes of all tensors that enter an operation, and of all that it returns."""
    return [tuple(t.shape) for t in call.inputs], [tuple(t.shape) for t in call.outputs]
