"""The public entry `channel_map`: run both modes, settle what is recorded, assemble the map."""

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from swan_surgery.channels.data.channel_map import ChannelMap
from swan_surgery.channels.labels.recording import Reason, Recording
from swan_surgery.channels.rehearsal.settling import settle
from swan_surgery.channels.solving.assembly import assemble
from swan_surgery.channels.solving.mapping import (
    LabelledTensors,
    Solution,
    Trace,
    record,
    start_labels,
)
from swan_surgery.channels.solving.sizes import Pins, first_difference, free_labels, size_pins
from swan_surgery.errors import InputError, ModelError, TraceError
from swan_surgery.models.copies import copy_of, shell_of, without_collection
from swan_surgery.models.inputs import Inputs, as_inputs, at_other_sizes, doubled
from swan_surgery.models.slim_attention import write_out_


def channel_map(
    model: nn.Module,
    example_inputs: Any,
    *,
    ignore: Iterable[str] = (),
) -> ChannelMap:
    """Map which channels of a model live and die together.

    The model itself is never run: a shell of it on the `meta` device is, in train and in eval mode.
    If that is impossible (values that decide the path), a full copy runs on the inputs' device.

    Args:
        model: any module; on any device, `meta` included.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments.
        ignore: module names or glob patterns whose output channels stay without a gate.

    Raises:
        ModelError: not an `nn.Module`.
        InputError: `ignore` names nothing, or the inputs are of the wrong kind.
        TraceError: the model cannot be run on the inputs.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> channels = swan.channel_map(net, torch.zeros(1, 3))
        >>> print(channels.explain())
        0: linear 3 -> 8, 8 gated by 8 units
        2: linear 8 -> 2, no gate
            2 stay: part of the model's output
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    inputs = as_inputs(example_inputs)
    ignored = match_modules(model, ignore)
    with without_collection(), torch.inference_mode(mode=False):
        try:
            return _map(model, inputs, ignored, on_meta=True)
        except TraceError:
            if any(tensor.is_meta for tensor in model.parameters()):
                raise
            return _map(model, inputs, ignored, on_meta=False)


def match_modules(model: nn.Module, patterns: Iterable[str]) -> tuple[str, ...]:
    """Module names that match the patterns (a module's children included).

    Raises:
        InputError: a pattern matches nothing; lists the nearest names.
    """
    if isinstance(patterns, str):
        patterns = (patterns,)
    names = [name for name, _ in model.named_modules() if name]
    found = []
    for pattern in patterns:
        hits = fnmatch.filter(names, pattern)
        if not hits:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
            raise InputError(
                f"ignore={pattern!r} matches no module; nearest names: {', '.join(near) or 'none'}"
            )
        found += hits
    return tuple(dict.fromkeys(found))


def _map(model: nn.Module, inputs: Inputs, ignored: Sequence[str], *, on_meta: bool) -> ChannelMap:
    def duplicate(original: nn.Module) -> nn.Module:
        return write_out_((shell_of if on_meta else copy_of)(original))

    if on_meta:
        inputs = inputs.on_meta()
    stand_in = duplicate(model)
    labelled = start_labels(stand_in)
    try:
        evaluated = record(stand_in, inputs, labelled, training=False)
    except Exception as err:
        raise TraceError(_run_message(model, inputs, err)) from err

    run = _runner(duplicate, model, labelled, inputs, evaluated)
    given = Trace(training=False, recording=evaluated, inputs=inputs)

    def settled(runs: _Runs) -> Solution:
        pins = [*_ignore_pins(runs.traces, labelled, ignored), *runs.pins]
        return settle(runs.traces, labelled, pins, lambda: duplicate(model), runs.witnesses)

    runs, others, trained = _at_two_sizes(given, run, labelled, larger=on_meta)
    solution = None if runs is None else settled(runs)
    if runs is None or solution is None or not _is_made_at(given, solution):
        runs = _each_at_both(given, trained, others, run, labelled)
        solution = settled(runs)
    notes: list[str] = []
    if runs.message and evaluated.unused:
        notes.append(
            f"train mode could not be run on these inputs ({runs.message}); parts that run only in "
            f"training were not mapped ({', '.join(evaluated.unused[:3])}, ...)"
        )
    plain_layers = frozenset(
        name for name, m in stand_in.named_modules() if isinstance(m, (_ConvNd, nn.Linear))
    )
    return assemble(solution, plain_layers, tuple(notes))


@dataclass(frozen=True, slots=True)
class _Runs:
    """The runs that a map is made of, what is pinned by their differences, and why train mode did not run.

    `witnesses` are runs at another size that say nothing new of labels.
    """

    traces: list[Trace]
    witnesses: list[Recording]
    pins: Pins
    message: str


Run = Callable[..., Trace | str]


def _runner(
    duplicate: Callable[[nn.Module], nn.Module],
    model: nn.Module,
    labelled: LabelledTensors,
    inputs: Inputs,
    evaluated: Recording,
) -> Run:
    def run(candidates: Iterable[Inputs], *, training: bool) -> Trace | str:
        """The run on the first inputs that the model takes; else why it takes none."""
        message = ""
        for candidate in candidates:
            try:
                # A copy of its own: a run may fill a cache, or change a buffer.
                found = record(duplicate(model), candidate, labelled, training=training)
            except Exception as err:  # noqa: BLE001 - the model's own code may raise anything
                message = f"{type(err).__name__}: {err}".splitlines()[0]
                continue
            if candidate is not inputs and not _takes(evaluated, found):
                message = "pixels become samples at another size"
                continue
            return Trace(training=training, recording=found, inputs=candidate)
        return message

    return run


def _at_two_sizes(
    given: Trace, run: Run, labelled: LabelledTensors, *, larger: bool
) -> tuple[_Runs | None, tuple[Inputs, ...], Trace | str]:
    """Train mode at another size than eval mode: enough where the two do the same to channels.

    Returns:
        the two runs, or None where they differ; the other sizes that are left to try; and the run in
        train mode, or why there is none.
    """
    others = tuple(at_other_sizes(given.inputs, larger=larger))
    trained = run(others, training=True)
    if not isinstance(trained, Trace):
        return None, others, trained
    same = not _differ(given, trained, labelled)
    runs = _Runs(_numbered([given, trained]), [], [], "") if same else None
    return runs, (trained.inputs,), trained


def _is_made_at(given: Trace, solution: Solution) -> bool:
    """Whether the given size makes all calls whose numbers are replaced."""
    frames = (op.frame for op in given.recording.ops if op.frame is not None)
    made = {(frame.call, frame.site) for frame in frames}
    return all(
        ((place.module, place.function, place.number), place.site) in made
        for place in solution.resizes
    )


def _each_at_both(
    given: Trace,
    trained: Trace | str,
    others: tuple[Inputs, ...],
    run: Run,
    labelled: LabelledTensors,
) -> _Runs:
    """Each mode at both sizes, where they differ."""
    inputs = given.inputs
    here = run((inputs, inputs.map(doubled)), training=True)
    traces = [trace for trace in (given, here) if isinstance(trace, Trace)]
    witnesses, more = [], []
    for before, after in ((given, run(others, training=False)), (here, trained)):
        if not isinstance(after, Trace):
            continue
        before_ = before if isinstance(before, Trace) else None
        if before_ and not _differ(before_, after, labelled):
            witnesses.append(after.recording)
        else:
            more.append((before_, replace(after, is_elsewhere=before_ is not None)))
    pins = size_pins(traces, more, labelled)
    message = here if isinstance(here, str) and not isinstance(trained, Trace) else ""
    return _Runs(_numbered([*traces, *(after for _, after in more)]), witnesses, pins, message)


def _differ(one: Trace, two: Trace, labelled: LabelledTensors) -> bool:
    if first_difference(one.recording, two.recording) is None:
        return False
    # What stays anyhow, like a table of positions, may lie as it likes.
    free = free_labels([one], labelled)
    return first_difference(one.recording, two.recording, free) is not None


def _takes(evaluated: Recording, other: Recording) -> bool:
    """Whether a model took inputs twice as many: `view(-1, 8, 4, 4)` takes pixels for samples."""
    pairs = zip(evaluated.lengths, other.lengths, strict=False)
    return all(after in (before, 2 * before) for before, after in pairs)


def _numbered(traces: list[Trace]) -> list[Trace]:
    return [replace(trace, number=number) for number, trace in enumerate(traces)]


def _run_message(model: nn.Module, inputs: Inputs, err: Exception) -> str:
    shapes = [
        tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        for value in (*inputs.args, *inputs.kwargs.values())
    ]
    first = str(err).splitlines()[0] if str(err) else ""
    return (
        f"{type(model).__name__} could not be run on example inputs of shape "
        f"{', '.join(map(str, shapes))}: {type(err).__name__}: {first}"
    )


def _ignore_pins(
    traces: list[Trace], labelled: LabelledTensors, ignored: Sequence[str]
) -> list[tuple[Tensor, Reason]]:
    pins = []
    for trace in traces:
        for contraction in trace.recording.contractions:
            made = contraction.produced
            if made is None or not bool((made > 0).any()):
                continue
            name = labelled.owner(int(made[made > 0][0]))[0]
            hit = [m for m in ignored if name == m or name.startswith(m + ".")]
            if hit:
                why = Reason("listed in ignore=", contraction.op, hit[0])
                pins.append((made[made > 0], why))
    return pins
