"""From a solution to the frozen `ChannelMap`, and the public entry `channel_map`."""

import difflib
import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from swan_surgery.attention import write_out_
from swan_surgery.channels.channel_map import (
    PINNED,
    AttributeWidth,
    ChannelMap,
    CostAxis,
    CostTerm,
    Layer,
    Pin,
    RepeatedNumber,
    Statistic,
    TensorAxis,
)
from swan_surgery.channels.mapping import (
    Ints,
    LabelledTensors,
    Solution,
    Trace,
    record,
    start_labels,
)
from swan_surgery.channels.recording import Contraction, Reason
from swan_surgery.channels.settling import settle
from swan_surgery.channels.stand_ins import (
    Inputs,
    as_inputs,
    copy_of,
    doubled,
    shell_of,
    without_collection,
)
from swan_surgery.errors import InputError, ModelError, TraceError


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
    notes: list[str] = []
    try:
        evaluated = record(stand_in, inputs, labelled, training=False)
    except Exception as err:
        raise TraceError(_run_message(model, inputs, err)) from err
    traces = [Trace(training=False, recording=evaluated)]
    train_inputs, message = inputs, ""
    for candidate in (inputs, inputs.map(doubled)):
        try:
            # A shell has no data that a run could change.
            private = stand_in if on_meta else duplicate(model)
            trained = record(private, candidate, labelled, training=True)
        except Exception as err:  # noqa: BLE001 - the model's own code may raise anything
            message = f"{type(err).__name__}: {err}".splitlines()[0]
            continue
        traces.append(Trace(training=True, recording=trained))
        train_inputs = candidate
        break
    else:
        notes.append(
            f"train mode could not be run on these inputs ({message}); parts that run only in "
            f"training were not mapped"
        )
    pins = _ignore_pins(traces, labelled, ignored)
    solution = settle(
        traces,
        labelled,
        pins,
        lambda: duplicate(model),
        lambda training: train_inputs if training else inputs,
    )
    plain_layers = frozenset(
        name for name, m in stand_in.named_modules() if isinstance(m, (_ConvNd, nn.Linear))
    )
    return _assemble(solution, plain_layers, tuple(notes))


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


def _assemble(
    solution: Solution, plain_layers: frozenset[str], notes: tuple[str, ...]
) -> ChannelMap:
    units = np.full(len(solution.prunable), PINNED, np.int64)
    units[solution.prunable] = np.arange(int(solution.prunable.sum()))
    labelled = solution.labelled
    tensors = []
    for (name, axis, size), start in zip(labelled.axes, labelled.starts, strict=True):
        own = units[solution.component[start : start + size]]
        if (own != PINNED).any():
            tensors.append(TensorAxis(name, axis, tuple(own.tolist())))
    layers: dict[str, Layer] = {}
    pins: dict[str, list[Pin]] = {}
    for trace in solution.traces:
        for contraction in trace.recording.contractions:
            if not contraction.is_layer:
                continue
            weight = _weight_of(contraction, labelled)
            if weight is None and contraction.module in plain_layers:
                # Its weight is computed by an operation without a rule.
                weight = f"{contraction.module}.weight"
            if weight is not None and weight not in layers:
                layers[weight], pins[weight] = _layer(
                    contraction, weight, units, solution, plain_layers
                )
    gated_axes, ungated = _reads(solution, units)
    costs = [
        _cost_term(contraction, units, solution.component)
        for contraction in solution.traces[0].recording.contractions
    ]
    unknown = dict.fromkeys(
        (reason.op, reason.module)
        for trace in solution.traces
        for reason in trace.recording.unknown
    )
    return ChannelMap(
        num_units=int(solution.prunable.sum()),
        tensors=tuple(tensors),
        layers=tuple(layers.values()),
        pins=tuple(pin for own in pins.values() for pin in own),
        costs=tuple(costs),
        unknown_ops=tuple(unknown),
        notes=notes,
        gated_axes=gated_axes,
        ungated_reads=ungated,
        statistics=_statistics(solution, units),
        attributes=tuple(
            AttributeWidth(
                key.module,
                key.name,
                key.index,
                tuple(units[solution.component[labels.numpy()]].tolist()),
            )
            for key, labels in solution.followers.items()
        ),
        numbers=tuple(
            RepeatedNumber(
                place.module,
                place.function,
                place.number,
                place.leaf,
                place.training,
                tuple(units[solution.component[new.numpy()]].tolist())
                if isinstance(new, Tensor)
                else None,
                0 if isinstance(new, Tensor) else new,
            )
            for place, new in solution.resizes.items()
        ),
    )


def _reads(solution: Solution, units: Ints) -> tuple[tuple[tuple[str, int], ...], frozenset[int]]:
    """Parameter axes that contractions sum over, and units summed over without such a parameter."""
    axes: dict[tuple[str, int], None] = {}
    ungated: set[int] = set()
    for trace in solution.traces:
        for contraction in trace.recording.contractions:
            if contraction.summed is None:
                continue
            read = _units_of(contraction.summed, 0, units, solution.component)
            if (read == PINNED).all():
                continue
            if contraction.gated is None:
                ungated |= set(read[read != PINNED].tolist())
                continue
            name, axis, _ = solution.labelled.owner(
                int(contraction.gated[contraction.gated > 0][0])
            )
            axes[name, axis] = None
    return tuple(axes), frozenset(ungated)


def _statistics(solution: Solution, units: Ints) -> tuple[Statistic, ...]:
    found = {}
    for trace in solution.traces:
        for weighting in trace.recording.weightings:
            own = _units_of(weighting.field.reshape(-1), 0, units, solution.component)
            if (own == PINNED).all():
                continue
            frame = weighting.frame
            entry = Statistic(
                frame.module,
                frame.function,
                frame.number,
                trace.training,
                tuple(weighting.field.shape),
                tuple(own.tolist()),
            )
            found[entry] = None
    return tuple(found)


def _weight_of(contraction: Contraction, labelled: LabelledTensors) -> str | None:
    for labels in (contraction.produced, contraction.summed):
        if labels is not None and bool((labels > 0).any()):
            return labelled.owner(int(labels[labels > 0][0]))[0]
    return None


def _units_of(labels: Tensor | None, size: int, units: Ints, component: Ints) -> Ints:
    if labels is None:
        return np.full(size, PINNED, np.int64)
    own = labels.numpy()
    return np.where(own > 0, units[component[np.maximum(own, 0)]], PINNED)


def _layer(
    contraction: Contraction,
    weight: str,
    units: Ints,
    solution: Solution,
    plain_layers: frozenset[str],
) -> tuple[Layer, list[Pin]]:
    component = solution.component
    out = _units_of(contraction.produced, contraction.num_out, units, component)
    into = _units_of(contraction.reads, contraction.num_in, units, component)
    owner, _, leaf = weight.rpartition(".")
    name = owner if leaf in ("weight", "original", "original0", "original1") else weight
    name = name.removesuffix(".parametrizations.weight")
    if contraction.module in plain_layers:
        name = contraction.module  # a tied weight may stand under another module's name
    op = contraction.op.removeprefix("aten.")
    layer = Layer(name, weight, op, tuple(out.tolist()), tuple(into.tolist()))
    if contraction.produced is None:
        why = Reason("a single channel, or a weight without channel labels", contraction.op, "")
        reasons = np.zeros(contraction.num_out, np.int64)
        table = [why]
    else:
        made = contraction.produced.numpy()
        reasons = np.where(made > 0, solution.reason[component[np.maximum(made, 0)]], -1)
        table = solution.reasons
    pins = []
    for index in np.unique(reasons[out == PINNED]):
        why = table[index] if index >= 0 else Reason("no channel labels", contraction.op, "")
        channels = np.flatnonzero((reasons == index) & (out == PINNED))
        pins.append(Pin(name, tuple(channels.tolist()), why.text, why.op, why.module))
    return layer, pins


def _cost_term(contraction: Contraction, units: Ints, component: Ints) -> CostTerm:
    axes = []
    macs = contraction.factor
    for labels in contraction.axes:
        assert labels is not None  # noqa: S101 - dropped when it was recorded
        own = _units_of(labels, labels.numel(), units, component)
        macs *= len(own)
        free, counts = np.unique(own[own != PINNED], return_counts=True)
        fixed = int((own == PINNED).sum())
        axes.append(CostAxis(tuple(free.tolist()), tuple(counts.tolist()), fixed))
    return CostTerm(contraction.module, contraction.op, contraction.factor, tuple(axes), macs)
