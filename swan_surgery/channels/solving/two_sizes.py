"""Runs a model at two sizes of its inputs, and keeps the recordings that say something of their own."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from swan_surgery.channels.labels.recording import Recording
from swan_surgery.channels.solving.mapping import LabelledTensors, Trace
from swan_surgery.channels.solving.sizes import Pins, first_difference, free_labels, size_pins
from swan_surgery.models.inputs import at_other_sizes, doubled


@dataclass(frozen=True, slots=True)
class Runs:
    """The runs that a map is made of, what is pinned by their differences, and why train mode did not run.

    `witnesses` are runs at another size that say nothing new of labels.
    """

    traces: list[Trace]
    witnesses: list[Recording]
    pins: Pins
    message: str


def at_two_sizes(
    evaluated: Trace, run: Callable[..., Trace | str], labelled: LabelledTensors, *, larger: bool
) -> Runs:
    """Train mode is run at another size than eval mode; only where the two differ, each at both."""
    inputs = evaluated.inputs
    others = tuple(at_other_sizes(inputs, larger=larger))
    trained = run(others, training=True)
    if isinstance(trained, Trace):
        others = (trained.inputs,)
        if not _differ(evaluated, trained, labelled):
            return Runs(_numbered([evaluated, trained]), [], [], "")
    here = run((inputs, inputs.map(doubled)), training=True)
    traces = [trace for trace in (evaluated, here) if isinstance(trace, Trace)]
    witnesses, more = [], []
    for before, after in ((evaluated, run(others, training=False)), (here, trained)):
        if not isinstance(after, Trace):
            continue
        before_ = before if isinstance(before, Trace) else None
        if before_ and not _differ(before_, after, labelled):
            witnesses.append(after.recording)
        else:
            more.append((before_, after))
    pins = size_pins(traces, more, labelled)
    message = here if isinstance(here, str) and not isinstance(trained, Trace) else ""
    return Runs(_numbered([*traces, *(after for _, after in more)]), witnesses, pins, message)


def _differ(one: Trace, two: Trace, labelled: LabelledTensors) -> bool:
    if first_difference(one.recording, two.recording) is None:
        return False
    # What stays anyhow, like a table of positions, may lie as it likes.
    free = free_labels([one], labelled)
    return first_difference(one.recording, two.recording, free) is not None


def takes(evaluated: Recording, other: Recording) -> bool:
    """Whether a model took inputs twice as many: `view(-1, 8, 4, 4)` takes pixels for samples."""
    pairs = zip(evaluated.lengths, other.lengths, strict=False)
    return all(after in (before, 2 * before) for before, after in pairs)


def _numbered(traces: list[Trace]) -> list[Trace]:
    return [replace(trace, number=number) for number, trace in enumerate(traces)]
