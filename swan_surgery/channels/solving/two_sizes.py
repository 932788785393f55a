"""Runs a model at two sizes of its inputs, and keeps the recordings that say something of their own."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from swan_surgery.channels.labels.recording import Recording
from swan_surgery.channels.solving.mapping import LabelledTensors, Solution, Trace
from swan_surgery.channels.solving.sizes import Pins, first_difference, free_labels, size_pins
from swan_surgery.models.inputs import Inputs, at_other_sizes, doubled


# Records a model on inputs in one mode; raises whatever the model raises.
Run = Callable[..., Recording]


@dataclass(frozen=True, slots=True)
class Runs:
    """The runs that a map is made of, and what is pinned by their differences.

    `witnesses` are runs at another size that say nothing new of labels.
    """

    traces: list[Trace]
    witnesses: list[Recording]
    pins: Pins


def solve_at_two_sizes(
    given: Trace,
    run: Run,
    settled: Callable[[Runs], Solution],
    labelled: LabelledTensors,
    *,
    larger: bool,
) -> tuple[Solution, str]:
    """Run train mode at another size than eval mode; where they differ, each at both.

    Args:
        given: eval mode at the given size.
        run: records the model on inputs in a mode.
        settled: what follows from runs.
        labelled: the labels of all runs.
        larger: whether other sizes should be larger.

    Returns:
        the solution, and why train mode did not run, if so.
    """
    others = tuple(at_other_sizes(given.inputs, larger=larger))
    trained = _first_taken(others, run, given, training=True)
    further = _further(given, trained, run, larger=not larger)
    if isinstance(trained, Trace) and further is None:
        others = (trained.inputs,)
        if not _differ(given, trained, labelled):
            solution = settled(Runs(_numbered([given, trained]), [], []))
            if _is_made_at(given, solution):
                return solution, ""
    same = (given.inputs, given.inputs.map(doubled))
    here = _first_taken(same, run, given, training=True)
    message = here if isinstance(here, str) and isinstance(trained, str) else ""
    elsewhere = _first_taken(others, run, given, training=False)
    pairs = [(given, elsewhere), (here, trained)]
    if further is not None:
        pairs.append((given, further))
    return settled(_each_at_both((given, here), pairs, labelled)), message


def _further(given: Trace, trained: Trace | str, run: Run, *, larger: bool) -> Trace | None:
    """Eval mode at a size on the other side that reaches parameters no other run does, if there is one.

    Which layer runs may hang on how large an image is: one that never ran would keep the width of what
    it reads.
    """
    missed = set(given.recording.unused)
    if isinstance(trained, Trace):
        missed &= set(trained.recording.unused)
    if not missed:
        return None
    found = _first_taken(at_other_sizes(given.inputs, larger=larger), run, given, training=False)
    if isinstance(found, Trace) and not missed <= set(found.recording.unused):
        return found
    return None


def _is_made_at(given: Trace, solution: Solution) -> bool:
    """Whether the given size makes all calls whose numbers are replaced."""
    frames = (op.frame for op in given.recording.ops if op.frame is not None)
    made = {(frame.call, frame.site) for frame in frames}
    return all(
        ((place.module, place.function, place.number), place.site) in made
        for place in solution.resizes
    )


def _each_at_both(
    here: Sequence[Trace | str],
    pairs: Sequence[tuple[Trace | str, Trace | str]],
    labelled: LabelledTensors,
) -> Runs:
    """The runs at the given size, and those at another that do something else to channels: these add pins.

    Args:
        here: both modes at the given size, or why one did not run.
        pairs: one of these, and the same mode at another size.
        labelled: the labels of all.
    """
    traces = [trace for trace in here if isinstance(trace, Trace)]
    witnesses, more = [], []
    for before, after in pairs:
        if not isinstance(after, Trace):
            continue
        before_ = before if isinstance(before, Trace) else None
        # Both ways: in one mode, a number that only one size multiplies by counts as well.
        if before_ and not any(
            _differ(*pair, labelled) for pair in ((before_, after), (after, before_))
        ):
            witnesses.append(after.recording)
        else:
            more.append((before_, replace(after, is_elsewhere=before_ is not None)))
    pins = size_pins(traces, more, labelled)
    return Runs(_numbered([*traces, *(after for _, after in more)]), witnesses, pins)


def _differ(one: Trace, two: Trace, labelled: LabelledTensors) -> bool:
    if first_difference(one.recording, two.recording) is None:
        return False
    # What stays anyhow, like a table of positions, may lie as it likes.
    free = free_labels([one], labelled)
    return first_difference(one.recording, two.recording, free) is not None


def _first_taken(
    candidates: Iterable[Inputs], run: Run, given: Trace, *, training: bool
) -> Trace | str:
    """The run on the first inputs that the model takes; else why it takes none."""
    message = ""
    for candidate in candidates:
        try:
            found = run(candidate, training=training)
        except Exception as err:  # noqa: BLE001 - the model's own code may raise anything
            message = f"{type(err).__name__}: {err}".splitlines()[0]
            continue
        if candidate is not given.inputs and not _takes(given.recording, found):
            message = "pixels become samples at another size"
            continue
        return Trace(training=training, recording=found, inputs=candidate)
    return message


def _takes(evaluated: Recording, other: Recording) -> bool:
    """Whether a model took inputs twice as many: `view(-1, 8, 4, 4)` takes pixels for samples."""
    pairs = zip(evaluated.lengths, other.lengths, strict=False)
    return all(after in (before, 2 * before) for before, after in pairs)


def _numbered(traces: list[Trace]) -> list[Trace]:
    return [replace(trace, number=number) for number, trace in enumerate(traces)]
