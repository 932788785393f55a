"""Solves the recordings, rehearses the result, and pins what does not follow, until all does."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from swan_surgery.channels.labels.recording import Reason, Recording
from swan_surgery.channels.rehearsal.closing_patterns import closing_pattern, turn_of, turns
from swan_surgery.channels.rehearsal.failures import Failure
from swan_surgery.channels.rehearsal.numbers import Resizes, is_explained_by_attributes
from swan_surgery.channels.rehearsal.reading import Readings
from swan_surgery.channels.rehearsal.running import rehearse
from swan_surgery.channels.rehearsal.scaling import scale_at
from swan_surgery.channels.rehearsal.suspects import (
    Went,
    along_one_axis,
    met_by,
    nearest_before,
    reason_for,
    went_in,
    widths_of,
)
from swan_surgery.channels.solving.arrays import Flags
from swan_surgery.channels.solving.mapping import LabelledTensors, Solution, Trace, solve
from swan_surgery.models.attributes import Hypotheses, Where


# After so many rounds nothing new is tried: what does not follow is pinned.
_MAX_ROUNDS = 100
# And after so many, the rest is: every round pins something or tries something new, or there is a fault.
_MAX_SETTLING = 1000
_UNSETTLED = "what follows it never settled; please report this model"


@dataclass(slots=True)
class _State:
    """What was learned so far; `reach` is how often what lies before a place had to be pinned."""

    solution: Solution
    pins: list[tuple[Tensor, Reason]]
    readings: Readings
    resizes: Resizes
    hypotheses: Hypotheses = field(default_factory=Hypotheses)
    reach: Counter[Where] = field(default_factory=Counter)

    def can_go(self, labels: Tensor) -> bool:
        """Whether any of some labels may go as things stand."""
        solution = self.solution
        return bool(solution.prunable[solution.component[labels.clamp(min=0).numpy()]].any())

    def all_that(self, went: Went) -> list[Tensor]:
        """All labels that went in a rehearsal; all that may go, if it differed although none did."""
        labels = torch.arange(1, self.solution.labelled.num_labels + 1)
        chosen = [label for label in labels.split(1) if went(label)]
        return chosen or [label for label in labels.split(1) if self.can_go(label)]


def settle(
    traces: list[Trace],
    labelled: LabelledTensors,
    pins: list[tuple[Tensor, Reason]],
    readings: Readings,
    witnesses: Sequence[Recording] = (),
) -> Solution:
    """Solve and rehearse until every operation follows; what does not follow is pinned.

    `readings` tell what the code of the model reads in these traces. `witnesses` are recordings at other
    sizes that say nothing else of labels than `traces` do.
    """
    resizes = Resizes([*(trace.recording for trace in traces), *witnesses])
    state = _State(solve(traces, labelled, pins), pins, readings, resizes)
    resizes.share_all_heads(traces)
    failing: tuple[int, int, int] | None = None
    for number in count():
        failed = False
        state.hypotheses.busy.clear()
        for trace, turn, least in _rehearsals(state, failing):
            stays = closing_pattern(state.solution, turn, least)
            went = went_in(state.solution.component, state.solution.prunable & ~stays)
            for failure in rehearse(
                state.solution,
                trace,
                readings.make_shell,
                stays,
                state.hypotheses.accepted,
                state.resizes.accepted,
            ):
                tries = number < _MAX_ROUNDS
                if tries and _follows_by_code(state, traces, trace, failure, went, stays):
                    failed = True
                elif not (failed and failure.is_tentative):
                    failed |= _answer(state, trace, failure, went, least)
            if failed:
                failing = (trace.number, turn, least)
                break  # what helps in one mode often helps in the other
        if not failed or not state.solution.prunable.any():
            break
        state.solution = solve(traces, labelled, pins)
        if number == _MAX_SETTLING:
            _give_up(state)
    state.solution.followers = state.hypotheses.accepted
    state.solution.resizes = state.resizes.accepted
    return state.solution


def _rehearsals(
    state: _State, failing: tuple[int, int, int] | None
) -> list[tuple[Trace, int, int]]:
    """Every run with every pattern; what failed comes first: there it shows whether the answer was right."""
    rehearsals = [
        (trace, turn_of(turn, training=trace.training), least)
        for turn, least in turns(state.solution)
        for trace in state.solution.traces
    ]
    return sorted(rehearsals, key=lambda item: (item[0].number, *item[1:]) != failing)


def _give_up(state: _State) -> None:
    rest = torch.cat(state.all_that(state.can_go))
    state.pins.append((rest, Reason(_UNSETTLED, "forward", "")))
    state.solution = solve(state.solution.traces, state.solution.labelled, state.pins)


def _where(trace: Trace, failure: Failure) -> Where:
    raised = failure.raised
    return trace.number, failure.index, f"{raised.module} {raised.line}" if raised else ""


def _follows_by_code(
    state: _State, traces: list[Trace], trace: Trace, failure: Failure, went: Went, stays: Flags
) -> bool:
    """Whether there is an attribute or a number in the code to try for what did not follow."""
    if failure.labels_only:
        return False
    hypotheses, resizes = state.hypotheses, state.resizes
    suspect = state.can_go if failure.raised is None else went
    op = along_one_axis(trace.recording.ops[failure.index], state.solution)
    module = op.module if failure.raised is None else failure.raised.module
    if module in hypotheses.busy:
        return True  # what was changed about the module in this round has not run yet
    where = _where(trace, failure)
    is_tried = where in hypotheses.active
    if is_tried or failure.raised is not None or is_explained_by_attributes(op, failure):
        if is_tried:
            resizes.forget(module)
        widths = widths_of(trace, failure, state.solution, suspect)
        proposed = state.readings.proposed(trace, module, failure.index)
        if hypotheses.try_next(where, module, widths, proposed):
            return True
    if failure.raised is None:
        others = [other for other in traces if other.training != trace.training]
        twins = [own for other in others for own in other.recording.ops]
        remains = torch.from_numpy(stays[state.solution.component])
        scale = scale_at(trace, failure.index, state.can_go, remains)
        if resizes.try_on(op, failure, twins, state.can_go, scale, trace):
            return True
    # Nothing went there, or pixels are counted: what was guessed for another operation is to blame.
    met = met_by(trace, failure, state.solution.labelled, suspect)
    moves = failure.raised is None and resizes.moves(op, failure)
    if (met and not moves) or not hypotheses.reconsider(module):
        return False
    resizes.forget(module)
    return True


def _answer(state: _State, trace: Trace, failure: Failure, went: Went, least: int) -> bool:
    """Something did not follow: try its next way of tying, else pin what it meets.

    Returns False where nothing needs to change: only pinned channels met differently.
    """
    index = failure.index
    op = trace.recording.ops[index]
    if failure.raised is None and trace.choices.get(index, 0) + 1 < len(op.ties):
        trace.choices[index] = trace.choices.get(index, 0) + 1
        return True
    if failure.raised is None and op.beside_fill:
        beside = torch.cat(op.beside_fill)
        if state.can_go(beside):
            why = Reason("meets padding of a fixed width", op.name, op.module)
            state.pins.append((beside, why))
            return True
    suspect = state.can_go if failure.raised is None else went
    met = met_by(trace, failure, state.solution.labelled, suspect)
    if not met and failure.labels_only:
        return False
    if not met:
        where = _where(trace, failure)
        met = nearest_before(trace, failure, went, 2 ** state.reach[where]) or state.all_that(went)
        state.reach[where] += 1
    if not met:
        return False  # whatever failed, no channel can go
    labels = [field[field > 0].reshape(-1) for field in met]
    if least == 1:
        # Axes of two are closed apart: at width one they alone are to blame, while any of them can go.
        labels = [own for own in labels if own.numel() == 2 and state.can_go(own)] or labels
    state.pins.append((torch.cat(labels), reason_for(failure, op)))
    return True
