"""Builds the channel map: record both modes, join, rehearse, pin what does not follow, repeat."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from swan_surgery.channels.fields import Fields, axis_field
from swan_surgery.channels.recording import Labels, Reason, Recording
from swan_surgery.channels.rehearsal import Diverged, Prediction, RehearsalMode
from swan_surgery.channels.stand_ins import Inputs
from swan_surgery.channels.tracing import (
    LabelMode,
    label_tensors,
    named_tensors,
    pin_outputs,
    run_labelled,
)
from swan_surgery.slicing import cut_


_MAX_ROUNDS = 100
_NARROW = 64
Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(slots=True)
class LabelledTensors:
    """The starting labels: one per position on every axis longer than 1, numbered in order."""

    num_labels: int
    starts: Ints
    axes: list[tuple[str, int, int]]
    fields: dict[str, Fields]

    def owner(self, label: int) -> tuple[str, int, int]:
        """The (tensor, axis, index) a label stands for."""
        which = int(np.searchsorted(self.starts, label, side="right")) - 1
        name, axis, _ = self.axes[which]
        return name, axis, label - int(self.starts[which])


def start_labels(model: nn.Module) -> LabelledTensors:
    """Number every position of every axis of every parameter and buffer."""
    following = 1
    starts, axes, fields = [], [], {}
    for name, tensor in named_tensors(model):
        own = []
        for axis, size in enumerate(tensor.shape):
            if size > 1:
                own.append(axis_field(torch.arange(following, following + size), axis, tensor.ndim))
                starts.append(following)
                axes.append((name, axis, size))
                following += size
        fields[name] = tuple(own)
    return LabelledTensors(following - 1, np.asarray(starts, dtype=np.int64), axes, fields)


@dataclass(slots=True)
class Trace:
    """One recorded mode, and which alternative of each tie is in force."""

    training: bool
    recording: Recording
    choices: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class Solution:
    """Labels sorted into components; a component is prunable or pinned for a reason."""

    component: Ints
    prunable: np.ndarray[Any, np.dtype[np.bool_]]
    reason: Ints
    reasons: list[Reason]
    labelled: LabelledTensors
    traces: list[Trace]


def record(
    model: nn.Module, inputs: Inputs, labelled: LabelledTensors, *, training: bool
) -> Recording:
    """Run the stand-in once in one mode and return what the labels say."""
    model.train(training)
    labels = Labels(Recording())
    label_tensors(labels, model, labelled.fields)
    mode = LabelMode(labels)
    output = run_labelled(mode, model, model, inputs.args, inputs.kwargs)
    pin_outputs(labels, output)
    return labels.recording


def solve(
    traces: list[Trace],
    labelled: LabelledTensors,
    extra_pins: Sequence[tuple[Tensor, Reason]],
) -> Solution:
    """Connected components of all joins; pins spread over their component."""
    size = labelled.num_labels + 1
    firsts, seconds = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for trace in traces:
        joins = list(trace.recording.joins)
        for index, op in enumerate(trace.recording.ops):
            if op.ties:
                joins += op.ties[min(trace.choices.get(index, 0), len(op.ties) - 1)]
        firsts += [first.numpy() for first, _ in joins]
        seconds += [second.numpy() for _, second in joins]
    first, second = np.concatenate(firsts), np.concatenate(seconds)
    graph = coo_matrix((np.ones(len(first), np.int8), (first, second)), shape=(size, size))
    count, component = connected_components(graph, directed=False)
    component = _in_order(component.astype(np.int64))

    reasons: list[Reason] = []
    reason = np.full(count, -1, np.int64)
    produced = np.zeros(count, bool)
    read = np.zeros(count, bool)
    all_pins = [pin for trace in traces for pin in trace.recording.pins]
    for labels, why in [*all_pins, *extra_pins]:
        hit = np.unique(component[labels.numpy()])
        reason[hit[reason[hit] < 0]] = len(reasons)
        reasons.append(why)
    for trace in traces:
        for contraction in trace.recording.contractions:
            for labels, flags in ((contraction.produced, produced), (contraction.summed, read)):
                if labels is not None:
                    own = labels.numpy()
                    flags[component[own[own > 0]]] = True
    for trace in traces:
        for contraction in trace.recording.contractions:
            if contraction.produced is not None and contraction.produced.numel() > 1:
                own = np.unique(component[contraction.produced.numpy()])
                if len(own) == 1 and reason[own[0]] < 0:
                    reason[own[0]] = len(reasons)
                    text = "all channels of this width are tied to one another"
                    reasons.append(Reason(text, contraction.op, contraction.module))
    unread = produced & ~read & (reason < 0)
    reason[unread] = len(reasons)
    reasons.append(Reason("no layer reads these channels", "none", ""))
    reason[component[0]] = len(reasons)
    reasons.append(Reason("no channel", "none", ""))
    return Solution(component, produced & (reason < 0), reason, reasons, labelled, traces)


def _in_order(component: Ints) -> Ints:
    """Renumber components by their first label, so that the numbering is stable."""
    _, first, inverse = np.unique(component, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    return rank[inverse]


def rehearse(
    solution: Solution,
    trace: Trace,
    make_shell: Callable[[], nn.Module],
    inputs: Inputs,
    turn: int,
    least: int,
) -> list[int]:
    """Close some units, cut a shell, run it; returns the operations that did not follow."""
    component = torch.from_numpy(solution.component)
    stays = closing_pattern(solution, turn, least)
    unit_of = torch.cat([torch.tensor([-1]), component])
    unit_of[1] = 0
    # Units are components + 1, so that 0 and -1 keep their meaning.
    unit_of[2:] += 1
    stays_lut = torch.cat([torch.ones(2, dtype=torch.bool), torch.from_numpy(stays)])
    prediction = Prediction(unit_of, stays_lut)
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
    shell.train(trace.training)
    mode = RehearsalMode(trace.recording.ops, prediction)
    label_tensors(mode.labels, shell, fields)
    try:
        run_labelled(mode, shell, shell, inputs.args, inputs.kwargs)
    except Diverged as diverged:
        return [*mode.failures, diverged.index]
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, AssertionError):
        # The model's own Python code, or a check in front of an operation, refused the new width.
        following = min(len(mode.labels.recording.ops), len(trace.recording.ops) - 1)
        return [*mode.failures, following]
    return mode.failures


def closing_pattern(
    solution: Solution, turn: int, least: int
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which components stay in a rehearsal; every axis keeps `least` positions (if it has them).

    Even turns close mostly low positions, odd turns mostly high ones, so that a slice that ends in
    the wrong place shows. Every second kind of component (those that lie on the same axes; the other
    half in the next turn) loses at least one.
    """
    rng = np.random.default_rng(turn)
    prunable = solution.prunable
    axes = [
        solution.component[start : start + size]
        for (_, _, size), start in zip(solution.labelled.axes, solution.labelled.starts, strict=True)
    ]
    axes = [own for own in axes if prunable[own].any()]
    position = np.full(len(prunable), -1.0)
    kind = np.zeros(len(prunable), np.uint64)
    marks = np.random.default_rng(0).integers(1, 2**62, len(axes), dtype=np.uint64)
    for own, mark in zip(axes, marks, strict=True):
        fresh = position[own] < 0
        position[own[fresh][::-1]] = (np.arange(len(own)) / len(own))[fresh][::-1]
        np.add.at(kind, own, mark)
    chance = 0.8 * (1 - position if turn % 2 == 0 else position)
    stays = ~(prunable & (rng.random(len(prunable)) < chance))
    forced = np.zeros(len(prunable), bool)
    candidates = np.flatnonzero(prunable)
    _, kinds = np.unique(kind[candidates], return_inverse=True)
    for which in range(turn % 2, int(kinds.max(initial=-1)) + 1, 2):
        members = candidates[kinds == which]
        pick = members[0 if turn % 4 < 2 else -1]  # noqa: PLR2004 - both ends, two turns each
        stays[pick], forced[pick] = False, True
    for own in axes:
        while stays[own].sum() < min(least, len(own)):
            gone = own[~stays[own]]
            free = gone[~forced[gone]]
            stays[(free if len(free) else gone)[-1 if turn % 2 == 0 else 0]] = True
    return stays


def settle(
    traces: list[Trace],
    labelled: LabelledTensors,
    pins: list[tuple[Tensor, Reason]],
    make_shell: Callable[[], nn.Module],
    inputs: Callable[[bool], Inputs],
) -> Solution:
    """Solve and rehearse until every operation follows; what does not follow is pinned."""
    solution = solve(traces, labelled, pins)
    for _ in range(_MAX_ROUNDS):
        failed = False
        for turn, least in _turns(solution):
            for trace in traces:
                place = turn + trace.training
                for index in rehearse(
                    solution, trace, make_shell, inputs(trace.training), place, least
                ):
                    failed = True
                    _answer(trace, index, solution, pins, least)
            if failed:
                break
        if not failed:
            return solution
        solution = solve(traces, labelled, pins)
    everything = torch.arange(1, labelled.num_labels + 1)
    why = Reason("the forward code repeats widths in ways that cannot be followed", "forward", "")
    return solve(traces, labelled, [*pins, (everything, why)])


def _turns(solution: Solution) -> list[tuple[int, int]]:
    """The rehearsals: which closing pattern, and how many positions every axis keeps.

    In narrow models a wrong guess may fit by chance, so they rehearse more often. Axes of two
    channels come last and apart: at width 1 even torch takes other paths.
    """
    sizes = [
        size
        for (_, _, size), start in zip(solution.labelled.axes, solution.labelled.starts, strict=True)
        if solution.prunable[solution.component[start : start + size]].any()
    ]
    turns = [(turn, 2) for turn in range(4 if max(sizes, default=0) <= _NARROW else 1)]
    return turns + [(turn, 1) for turn in range(2) if 2 in sizes]  # noqa: PLR2004


def _answer(
    trace: Trace,
    index: int,
    solution: Solution,
    pins: list[tuple[Tensor, Reason]],
    least: int,
) -> None:
    """An operation did not follow: try its next way of tying, else pin what enters it."""
    op = trace.recording.ops[index]
    if trace.choices.get(index, 0) + 1 < len(op.ties):
        trace.choices[index] = trace.choices.get(index, 0) + 1
        return
    reason = Reason("the forward code repeats this width, or depends on it", op.name, op.module)
    if op.beside_fill:
        beside = torch.cat(op.beside_fill)
        if solution.prunable[solution.component[beside.numpy()]].any():
            pins.append((beside, Reason("meets padding of a fixed width", op.name, op.module)))
            return
    fields_here = [f for fields in (*op.inputs, *op.outputs) for f in fields]
    touched = [f[f > 0].reshape(-1) for f in fields_here]
    if least == 1:
        pairs = [f for f in touched if f.numel() == 2]  # noqa: PLR2004 - axes of two channels
        touched = pairs or touched
    labels = torch.cat(touched) if touched else torch.zeros(0, dtype=torch.int64)
    if labels.numel() and solution.prunable[solution.component[labels.numpy()]].any():
        pins.append((labels, reason))
        return
    earlier = [r for r in trace.recording.ops[: index + 1] if r.module == op.module]
    wide = [f[f > 0].reshape(-1) for r in earlier for fields in r.inputs for f in fields]
    labels = torch.cat(wide) if wide else torch.zeros(0, dtype=torch.int64)
    if not (labels.numel() and solution.prunable[solution.component[labels.numpy()]].any()):
        labels = torch.arange(1, solution.labelled.num_labels + 1)
    pins.append((labels, reason))
