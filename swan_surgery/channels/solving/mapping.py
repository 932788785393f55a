"""Records labelled runs of a model and solves them: labels into components, pins over components."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from swan_surgery.calls.functions import is_statistic
from swan_surgery.channels.labels.fields import Fields, axes_of, axis_field
from swan_surgery.channels.labels.labels import Labels
from swan_surgery.channels.labels.recording import Reason, Recording, Weighting
from swan_surgery.channels.runs.tracing import (
    LabelMode,
    label_tensors,
    pin_outputs,
    run_labelled,
)
from swan_surgery.channels.solving.arrays import Flags, Ints, components, distinct, in_order
from swan_surgery.models.attributes import Followers
from swan_surgery.models.inputs import Inputs
from swan_surgery.models.outputs import iter_tensors
from swan_surgery.models.tensors import named_tensors


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
    """Number every position of every axis of every tensor."""
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
    """One recorded run, in one mode, and which alternative of each tie is in force.

    `number` tells the runs of a map apart: the same mode may have been run at two sizes of the inputs.
    `is_elsewhere` says that one took another path at another size, and so is there beside the same mode's.
    """

    training: bool
    recording: Recording
    inputs: Inputs
    number: int = 0
    is_elsewhere: bool = False
    choices: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class Solution:
    """Labels sorted into components; a component is prunable or pinned for a reason.

    `units` is kept for the rehearsals: fields of the recordings, by identity, in terms of units.
    """

    component: Ints
    prunable: Flags
    reason: Ints
    reasons: list[Reason]
    labelled: LabelledTensors
    traces: list[Trace]
    followers: Followers = field(default_factory=dict)
    resizes: Mapping[Any, Any] = field(default_factory=dict)
    units: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def one_of_each(self, width: Tensor) -> Tensor | None:
        """One label per component on an axis that holds each equally often; None if only once."""
        own = self.component[width.numpy()]
        distinct, first, counts = np.unique(own, return_index=True, return_counts=True)
        if len(distinct) < 2 or counts[0] < 2 or (counts != counts[0]).any():
            return None
        return width[torch.from_numpy(np.sort(first))]


def record(
    make_shell: Callable[[], nn.Module],
    inputs: Inputs,
    labelled: LabelledTensors,
    *,
    training: bool,
    free_outputs: Sequence[str] = (),
) -> Recording:
    """Run a stand-in once in one mode and return what the labels say.

    Every run has a stand-in of its own: what a first run leaves in a module (`self.grid`,
    `self.shape`, a cache) would send the next one along another path.

    Where activations are multiplied with activations, as attention does, a probe first looks which
    splits of an axis make heads; whole heads are what may be removed there.
    """
    labels = Labels(Recording())
    run = partial(_run, inputs=inputs, labelled=labelled, training=training, free=free_outputs)
    run(make_shell(), labels=labels)
    if labels.mixes_activations:
        probe = Labels(Recording(), is_probe=True)
        run(make_shell(), labels=probe)
        within = within_heads(probe, labelled.num_labels)
        if within:
            labels = Labels(Recording(), within)
            run(make_shell(), labels=labels)
    return labels.recording


def _run(
    model: nn.Module,
    inputs: Inputs,
    labelled: LabelledTensors,
    labels: Labels,
    *,
    training: bool,
    free: Sequence[str],
) -> None:
    model.train(training)
    labels.keeps_draws = not training
    label_tensors(labels, model, labelled.fields)
    mode = LabelMode(labels)
    output = run_labelled(mode, model, model, inputs.args, inputs.kwargs)
    pin_outputs(labels, output, free)
    labels.recording.lengths = tuple(t.shape[0] for t in iter_tensors(output) if t.ndim)
    labels.recording.unused = tuple(
        name for name, parameter in model.named_parameters() if id(parameter) not in labels.used
    )


def within_heads(probe: Labels, num_labels: int) -> dict[int, tuple[int, ...]]:
    """Which operations of a probed run split channels into heads, and which axes lie inside one."""
    if not probe.heads:
        return {}
    size = num_labels + 1
    pairs = [torch.broadcast_tensors(first, second) for first, second in probe.heads]
    first = np.concatenate([one.reshape(-1).numpy() for one, _ in pairs])
    second = np.concatenate([two.reshape(-1).numpy() for _, two in pairs])
    fits = (first > 0) & (second > 0)
    _, head = components(first[fits], second[fits], size)
    touched = np.zeros(size, bool)
    touched[first[fits]] = touched[second[fits]] = True
    found = {}
    for index, split in probe.splits:
        labels = split.clamp(min=0).numpy()
        if not touched[labels[split.numpy() > 0]].all():
            continue
        own = torch.from_numpy(head[labels])
        axes = tuple(
            axis
            for axis in axes_of(split)
            if torch.equal(own.narrow(axis, 0, 1).expand_as(own), own)
        )
        if axes and len(axes) < len(axes_of(split)):
            found[index] = axes
    return found


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
    # Half the memory, and what scipy would make of them.
    kind = np.int32 if size < 2**31 else np.int64
    first = np.concatenate(firsts, dtype=kind, casting="same_kind")
    second = np.concatenate(seconds, dtype=kind, casting="same_kind")
    count, component = components(first, second, size)
    component = in_order(component, count)

    reason, reasons = _pinned_components(traces, extra_pins, component, count)
    produced, read = _flags(traces, component, count)
    for trace in traces:
        for contraction in trace.recording.contractions:
            if contraction.produced is not None and contraction.produced.numel() > 1:
                own = distinct(component[contraction.produced.numpy()])
                if len(own) == 1 and reason[own[0]] < 0:
                    reason[own[0]] = len(reasons)
                    text = "all channels of this width are tied to one another"
                    reasons.append(Reason(text, contraction.op, contraction.module))
    for trace in traces:
        for weighting in _ambiguous(trace.recording, component):
            hit = np.unique(component[weighting.field.numpy()])
            reason[hit[reason[hit] < 0]] = len(reasons)
            text = "a statistic over other channels in each run of its module"
            reasons.append(Reason(text, weighting.op, weighting.frame.module))
    reason[produced & ~read & (reason < 0)] = len(reasons)
    reasons.append(Reason("no layer reads these channels", "none", ""))
    reason[component[0]] = len(reasons)
    reasons.append(Reason("no channel", "none", ""))
    return Solution(component, produced & (reason < 0), reason, reasons, labelled, traces)


def _ambiguous(recording: Recording, component: Ints) -> list[Weighting]:
    """Statistics that one call in a module's code takes over different channels in different runs.

    Gates are given to a call by its module, function and number: it must always mean the same.
    """
    if not recording.weightings:
        return []
    by_call: dict[tuple[str, str, int], list[Weighting]] = defaultdict(list)
    for weighting in recording.weightings:
        by_call[weighting.frame.call].append(weighting)
    takes: Counter[tuple[str, str, int]] = Counter()
    for op in recording.ops:
        if op.frame is not None and op.frame.call in by_call:
            takes[op.frame.call] += is_statistic(op.frame.function, op.packet)
    found = []
    for call, own in by_call.items():
        meanings = {(tuple(w.field.shape), component[w.field.numpy()].tobytes()) for w in own}
        if len(meanings) > 1 or takes[call] != len({w.index for w in own}):
            found += own
    return found


def _pinned_components(
    traces: list[Trace],
    extra_pins: Sequence[tuple[Tensor, Reason]],
    component: Ints,
    count: int,
) -> tuple[Ints, list[Reason]]:
    """Per component the first reason to pin it (-1: none), and the table of reasons."""
    reason = np.full(count, -1, np.int64)
    reasons: list[Reason] = []
    recorded = [pin for trace in traces for pin in trace.recording.pins]
    # What a model returns says more than what else happens to it: a tied vocabulary, say.
    for labels, why in sorted([*recorded, *extra_pins], key=lambda pin: pin[1].op != "output"):
        hit = distinct(component[labels.numpy()])
        reason[hit[reason[hit] < 0]] = len(reasons)
        reasons.append(why)
    return reason, reasons


def _flags(traces: list[Trace], component: Ints, count: int) -> tuple[Flags, Flags]:
    """Components that some layer produces, and those that something sums over."""
    produced, read = np.zeros(count, bool), np.zeros(count, bool)
    for trace in traces:
        for contraction in trace.recording.contractions:
            for labels, flags in ((contraction.produced, produced), (contraction.summed, read)):
                if labels is not None:
                    own = labels.numpy()
                    flags[component[own[own > 0]]] = True
        # A statistic that counts them by their gates reads channels, too: `(f * g).sum(1)`.
        for weighting in trace.recording.weightings:
            own = weighting.field.numpy()
            read[component[own[own > 0]]] = True
    return produced, read
