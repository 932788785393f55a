"""The public entry `channel_map`: run both modes, settle what is recorded, assemble the map."""

import difflib
import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from swan_surgery.channels.data.channel_map import ChannelMap
from swan_surgery.channels.labels.recording import Reason, Recording
from swan_surgery.channels.rehearsal.reading import Readings
from swan_surgery.channels.rehearsal.settling import settle
from swan_surgery.channels.solving.assembly import assemble
from swan_surgery.channels.solving.mapping import (
    LabelledTensors,
    Solution,
    Trace,
    record,
    start_labels,
)
from swan_surgery.channels.solving.two_sizes import Runs, solve_at_two_sizes
from swan_surgery.channels.solving.unread import unread_widths
from swan_surgery.errors import InputError, TraceError
from swan_surgery.models.checks import check_is_module
from swan_surgery.models.copies import copy_of, shell_of, without_collection
from swan_surgery.models.inputs import Inputs, as_inputs
from swan_surgery.models.slim_attention import write_out_


def channel_map(
    model: nn.Module,
    example_inputs: Any,
    *,
    ignore: Iterable[str] = (),
    free_outputs: Iterable[str] = (),
) -> ChannelMap:
    """Map which channels of a model live and die together.

    The model itself is never run: a shell of it on the `meta` device is, in train and in eval mode.
    If that is impossible (values that decide the path), a full copy runs on the inputs' device.

    Args:
        model: any module; on any device, `meta` included.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments.
        ignore: module names or glob patterns whose output channels stay without a gate.
        free_outputs: outputs whose channels may go, as for `swanify`.

    Raises:
        ModelError: not an `nn.Module`.
        InputError: `ignore` or `free_outputs` names nothing, or the inputs are of the wrong kind.
        TraceError: the model cannot be run on the inputs.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> channels = swan.channel_map(net, torch.zeros(1, 3))
        >>> print(channels.explain())
        0: linear 3 -> 8, 8 gated by 8 units
        2: linear 8 -> 2, no gate
            2 stay: part of the model's output
    """
    check_is_module(model)
    inputs = as_inputs(example_inputs)
    ignored = match_modules(model, ignore)
    free = patterns_of(free_outputs, "free_outputs")
    with without_collection(), torch.inference_mode(mode=False):
        try:
            return _map(model, inputs, ignored, free, on_meta=True)
        except TraceError:
            if any(tensor.is_meta for tensor in model.parameters()):
                raise
            return _map(model, inputs, ignored, free, on_meta=False)


def patterns_of(given: Any, argument: str) -> tuple[str, ...]:
    """Names or patterns, one or several.

    Raises:
        InputError: they are no strings.
    """
    listed = (given,) if isinstance(given, str) else given
    found = tuple(listed) if isinstance(listed, Iterable) else (listed,)
    if not all(isinstance(own, str) for own in found):
        raise InputError(f"{argument} must be a name or pattern, or several of them; got {given!r}")
    return found


def match_modules(model: nn.Module, patterns: Iterable[str]) -> tuple[str, ...]:
    """Names of modules, or of parameters that are layers by themselves, that match the patterns; children included.

    Raises:
        InputError: a pattern matches nothing; lists the nearest names.
    """
    patterns = patterns_of(patterns, "ignore")
    names = [name for name, _ in model.named_modules() if name]
    parameters = [name for name, _ in model.named_parameters()]
    found = []
    for pattern in patterns:
        # A parameter that a module multiplies with by itself, in_proj_weight of attention say, is a layer as well.
        hits = fnmatch.filter(names, pattern) or fnmatch.filter(parameters, pattern)
        if not hits:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
            raise InputError(
                f"ignore={pattern!r} matches no module; nearest names: {', '.join(near) or 'none'}"
            )
        found += hits
    return tuple(dict.fromkeys(found))


def _map(
    model: nn.Module,
    inputs: Inputs,
    ignored: Sequence[str],
    free: Sequence[str],
    *,
    on_meta: bool,
) -> ChannelMap:
    def duplicate() -> nn.Module:
        return write_out_((shell_of if on_meta else copy_of)(model))

    if on_meta:
        inputs = inputs.on_meta()
    stand_in = duplicate()
    labelled = start_labels(stand_in)
    try:
        evaluated = record(duplicate, inputs, labelled, training=False, free_outputs=free)
    except Exception as err:
        raise TraceError(_run_message(model, inputs, err)) from err

    def run(own: Inputs, *, training: bool) -> Recording:
        return record(duplicate, own, labelled, training=training, free_outputs=free)

    given = Trace(training=False, recording=evaluated, inputs=inputs)

    def settled(runs: Runs) -> Solution:
        _check_free(runs.traces, free)
        pins = [*_ignore_pins(runs.traces, labelled, ignored), *runs.pins]
        readings = Readings(duplicate, stand_in)
        solution = settle(runs.traces, labelled, pins, readings, runs.witnesses)
        unread = unread_widths(stand_in, solution, lambda: readings.of_all(solution.traces))
        solution.followers = {**solution.followers, **unread}
        return solution

    solution, message = solve_at_two_sizes(given, run, settled, labelled, larger=on_meta)
    return assemble(solution, _plain_layers(stand_in), _notes(evaluated, message))


def _plain_layers(model: nn.Module) -> frozenset[str]:
    layers = (_ConvNd, nn.Linear)
    return frozenset(name for name, m in model.named_modules() if isinstance(m, layers))


def _notes(evaluated: Recording, message: str) -> tuple[str, ...]:
    if not message or not evaluated.unused:
        return ()
    unused = ", ".join(evaluated.unused[:3])
    note = (
        f"train mode could not be run on these inputs ({message}); parts that run only in "
        f"training were not mapped ({unused}, ...)"
    )
    return (note,)


def _check_free(traces: Sequence[Trace], free: Sequence[str]) -> None:
    """Every pattern names an output in one of the modes.

    Raises:
        InputError: one does not; lists what the model returns.
    """
    modes = {
        "in training" if trace.training else "in eval": [n for n, _ in trace.recording.returned]
        for trace in traces
    }
    for pattern in free:
        if not any(fnmatch.filter(names, pattern) for names in modes.values()):
            listed = "; ".join(
                f"{mode} {', '.join(map(repr, names)) or 'no tensor'}"
                for mode, names in modes.items()
            )
            raise InputError(
                f"free_outputs={pattern!r} matches none of the model's outputs. It returns {listed}"
            )


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
