"""Solves the recordings, rehearses the result, and pins what does not follow, until all does."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from swan_surgery.channels.labels.fields import Fields, axes_of
from swan_surgery.channels.labels.recording import Reason, Recording
from swan_surgery.channels.rehearsal.closing_patterns import closing_pattern, turn_of, turns
from swan_surgery.channels.rehearsal.numbers import (
    New,
    Place,
    Resizes,
    Scale,
    Scaled,
    is_explained_by_attributes,
    resize_all_,
    scaling,
)
from swan_surgery.channels.rehearsal.rehearsing import Diverged, Failure, Prediction, RehearsalMode
from swan_surgery.channels.runs.tracing import label_tensors, named_tensors, run_labelled
from swan_surgery.channels.solving.mapping import LabelledTensors, Solution, Trace, solve
from swan_surgery.errors import PathError
from swan_surgery.models.attributes import Followers, Hypotheses, follow_
from swan_surgery.models.slicing import cut_


_MAX_ROUNDS = 100


def rehearse(
    solution: Solution,
    trace: Trace,
    make_shell: Callable[[], nn.Module],
    turn: int,
    least: int,
    followers: Followers,
    resizes: Mapping[Place, New],
) -> list[Failure]:
    """Close some units, cut a shell, run it; returns the operations that did not follow."""
    component = torch.from_numpy(solution.component)
    stays = closing_pattern(solution, turn, least)
    unit_of = torch.cat([torch.tensor([-1]), component])
    unit_of[1] = 0
    # Units are components + 1, so that 0 and -1 keep their meaning.
    unit_of[2:] += 1
    stays_lut = torch.cat([torch.ones(2, dtype=torch.bool), torch.from_numpy(stays)])
    fixed = torch.zeros(2, dtype=torch.bool)
    prunable = torch.cat([fixed, torch.from_numpy(solution.prunable)])
    prediction = Prediction(unit_of, stays_lut, prunable)
    shell = make_shell()
    cuts: dict[str, dict[int, Tensor]] = {}
    fields: dict[str, Fields] = {}
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(shell)}
    for name, own in solution.labelled.fields.items():
        after = prediction.after(own, shapes[name])
        assert after is not None  # noqa: S101 - starting fields lie along one axis each
        fields[name] = after[0]
    for (name, axis, size), start in zip(
        solution.labelled.axes, solution.labelled.starts, strict=True
    ):
        keep = stays[solution.component[start : start + size]]
        if not keep.all():
            cuts.setdefault(name, {})[axis] = torch.from_numpy(np.flatnonzero(keep))
    cut_(shell, cuts)
    remains = torch.from_numpy(stays[solution.component])
    follow_(shell, followers, remains)
    resize_all_(shell, resizes, remains)
    shell.train(trace.training)
    mode = RehearsalMode(trace.recording.ops, prediction)
    mode.frames.left = iter(trace.recording.left)
    label_tensors(mode.labels, shell, fields)
    try:
        run_labelled(mode, shell, shell, trace.inputs.args, trace.inputs.kwargs)
    except PathError:
        # At that size the cut model says so itself. At the given one, a number was learned elsewhere.
        following = min(len(mode.labels.recording.ops), len(trace.recording.ops) - 1)
        return mode.failures + ([] if trace.is_elsewhere else [Failure(following)])
    except Diverged as diverged:
        return [*mode.failures, Failure(diverged.index)]
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, AssertionError):
        # The model's own Python code, or a check in front of an operation, refused the new width.
        following = min(len(mode.labels.recording.ops), len(trace.recording.ops) - 1)
        return [*mode.failures, Failure(following)]
    finally:
        # A cycle, while garbage collection is paused: every rehearsal would stay in memory.
        mode.frames.recover = None
    return mode.failures


def settle(
    traces: list[Trace],
    labelled: LabelledTensors,
    pins: list[tuple[Tensor, Reason]],
    make_shell: Callable[[], nn.Module],
    witnesses: Sequence[Recording] = (),
) -> Solution:
    """Solve and rehearse until every operation follows; what does not follow is pinned.

    `witnesses` are recordings at other sizes that say nothing else of labels than `traces` do.
    """
    solution = solve(traces, labelled, pins)
    hypotheses = Hypotheses()
    resizes = Resizes([*(trace.recording for trace in traces), *witnesses])
    model = make_shell()
    failing: tuple[int, int, int] | None = None
    for _ in range(_MAX_ROUNDS):
        failed = False
        hypotheses.busy.clear()
        rehearsals = [
            (trace, turn_of(turn, training=trace.training), least)
            for turn, least in turns(solution)
            for trace in traces
        ]
        # What failed comes first: that is where it shows whether the answer was right.
        rehearsals.sort(key=lambda item: (item[0].number, *item[1:]) != failing)
        for trace, turn, least in rehearsals:
            for failure in rehearse(
                solution,
                trace,
                make_shell,
                turn,
                least,
                hypotheses.accepted,
                resizes.accepted,
            ):
                closing = turn, least
                if _follows_by_code(
                    traces, trace, failure, solution, hypotheses, resizes, model, closing
                ):
                    failed = True
                    continue
                failed |= _answer(trace, failure, solution, pins, least)
            if failed:
                failing = (trace.number, turn, least)
                break  # what helps in one mode often helps in the other
        if not failed or not solution.prunable.any():
            solution.followers = hypotheses.accepted
            solution.resizes = resizes.accepted
            return solution
        solution = solve(traces, labelled, pins)
    everything = torch.arange(1, labelled.num_labels + 1)
    why = Reason("the forward code repeats widths in ways that cannot be followed", "forward", "")
    return solve(traces, labelled, [*pins, (everything, why)])


def _follows_by_code(
    traces: list[Trace],
    trace: Trace,
    failure: Failure,
    solution: Solution,
    hypotheses: Hypotheses,
    resizes: Resizes,
    model: nn.Module,
    closing: tuple[int, int],
) -> bool:
    """Whether there is an attribute or a number in the code to try for what did not follow."""
    if failure.labels_only:
        return False
    op = trace.recording.ops[failure.index]
    if op.module in hypotheses.busy:
        return True  # what was changed about the module in this round has not run yet
    if is_explained_by_attributes(op, failure):
        if (trace.number, failure.index) in hypotheses.active:
            resizes.forget(op.module)
        if _guess(trace, failure.index, solution, hypotheses, model):
            return True
    others = [other for other in traces if other.training != trace.training]
    twins = [op for other in others for op in other.recording.ops]

    def shrinks(labels: Tensor) -> bool:
        return bool(solution.prunable[solution.component[labels.clamp(min=0).numpy()]].any())

    scale = _scale(trace, failure.index, shrinks, solution, closing)
    if resizes.try_on(op, failure, twins, shrinks, scale, trace):
        return True
    fields = [f.reshape(-1) for own in (*op.inputs, *op.outputs) for f in own]
    # Nothing shrinks here, or pixels are counted: what was guessed for another operation is to blame.
    shrunk = any(map(shrinks, fields)) and not resizes.moves(op, failure)
    if shrunk or not hypotheses.reconsider(op.module):
        return False
    resizes.forget(op.module)
    return True


def _guess(
    trace: Trace, index: int, solution: Solution, hypotheses: Hypotheses, model: nn.Module
) -> bool:
    """An operation did not follow: maybe an attribute repeats a width that shrinks there."""
    op = trace.recording.ops[index]
    widths = [
        field.clamp(min=0).reshape(-1)
        for fields in (*op.outputs, *op.inputs)
        for field in fields
        if len(axes_of(field)) == 1
    ]
    shrinking = [w for w in widths if solution.prunable[solution.component[w.numpy()]].any()]
    return hypotheses.try_next((trace.number, index), model, op.module, shrinking)


def _scale(
    trace: Trace,
    index: int,
    shrinks: Callable[[Tensor], bool],
    solution: Solution,
    closing: tuple[int, int],
) -> Scale:
    """How a number in front of an operation may depend on the widths that its module met so far."""

    def scaled(full: float, seen: float) -> Scaled | None:
        remains = torch.from_numpy(closing_pattern(solution, *closing)[solution.component])
        module = trace.recording.ops[index].module
        known: set[bytes] = set()
        for op in reversed(trace.recording.ops[: index + 1]):
            for field in (f for own in (*op.inputs, *op.outputs) for f in own):
                labels = field.reshape(-1)
                if op.module != module or len(axes_of(field)) != 1 or not shrinks(labels):
                    continue
                if (key := labels.numpy().tobytes()) not in known:
                    known.add(key)
                    if (found := scaling(full, seen, labels, remains)) is not None:
                        return found
        return None

    return scaled


def _answer(
    trace: Trace,
    failure: Failure,
    solution: Solution,
    pins: list[tuple[Tensor, Reason]],
    least: int,
) -> bool:
    """An operation did not follow: try its next way of tying, else pin what enters it.

    Returns False where nothing needs to change: only pinned channels met differently.
    """
    index = failure.index
    op = trace.recording.ops[index]
    if trace.choices.get(index, 0) + 1 < len(op.ties):
        trace.choices[index] = trace.choices.get(index, 0) + 1
        return True
    reason = Reason("the forward code repeats this width, or depends on it", op.name, op.module)
    if op.beside_fill:
        beside = torch.cat(op.beside_fill)
        if solution.prunable[solution.component[beside.numpy()]].any():
            pins.append((beside, Reason("meets padding of a fixed width", op.name, op.module)))
            return True
    fields_here = [f for fields in (*op.inputs, *op.outputs) for f in fields]
    touched = [f[f > 0].reshape(-1) for f in fields_here]
    if least == 1:
        pairs = [f for f in touched if f.numel() == 2]
        touched = pairs or touched
    labels = torch.cat(touched) if touched else torch.zeros(0, dtype=torch.int64)
    if labels.numel() and solution.prunable[solution.component[labels.numpy()]].any():
        pins.append((labels, reason))
        return True
    if failure.labels_only:
        return False
    earlier = [r for r in trace.recording.ops[: index + 1] if r.module == op.module]
    wide = [f[f > 0].reshape(-1) for r in earlier for fields in r.inputs for f in fields]
    labels = torch.cat(wide) if wide else torch.zeros(0, dtype=torch.int64)
    if not (labels.numel() and solution.prunable[solution.component[labels.numpy()]].any()):
        labels = torch.arange(1, solution.labelled.num_labels + 1)
    pins.append((labels, reason))
    return True
