"""From a solution to the frozen `ChannelMap`."""

from typing import Any

import numpy as np
from torch import Tensor

from swan_surgery.channels.data.channel_map import (
    PINNED,
    AttributeWidth,
    ChannelMap,
    CostAxis,
    CostTerm,
    FreeOutput,
    Layer,
    Pin,
    RepeatedNumber,
    Statistic,
    TensorAxis,
    UnknownOp,
)
from swan_surgery.channels.labels.fields import axes_of
from swan_surgery.channels.labels.recording import Contraction, Reason
from swan_surgery.channels.solving.arrays import Ints
from swan_surgery.channels.solving.mapping import LabelledTensors, Solution


def assemble(
    solution: Solution, plain_layers: frozenset[str], notes: tuple[str, ...]
) -> ChannelMap:
    """The map of a solution; `plain_layers` are the names of conv and linear modules."""
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
        UnknownOp(reason.op, reason.module, reason.line)
        for trace in solution.traces
        for reason in trace.recording.unknown
    )
    return ChannelMap(
        num_units=int(solution.prunable.sum()),
        tensors=tuple(tensors),
        layers=tuple(layers.values()),
        pins=tuple(pin for own in pins.values() for pin in own),
        costs=tuple(costs),
        unknown=tuple(unknown),
        notes=notes,
        selects_by_data=any(trace.recording.selects for trace in solution.traces),
        gated_axes=gated_axes,
        ungated_reads=ungated,
        free_outputs=_free_outputs(solution, units),
        unused=_unused(solution),
        lookups=_lookups(solution),
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
            _repeated(place, new, units, solution.component, training=training)
            for place, new in solution.resizes.items()
            for training in _modes(solution, training=place.training)
        ),
    )


def _lookups(solution: Solution) -> tuple[str, ...]:
    """Embeddings whose columns could go if a layer made them."""
    found: dict[str, None] = {}
    for trace in solution.traces:
        for op in trace.recording.ops:
            if op.packet != "aten.embedding" or not op.inputs[0]:
                continue
            columns = [
                field.numpy().reshape(-1) for field in op.inputs[0] if axes_of(field) == (1,)
            ]
            for labels in columns:
                own = solution.component[labels[labels > 0]]
                if (solution.reason[own] < 0).all() and not solution.prunable[own].any():
                    name = solution.labelled.owner(int(labels[labels > 0][0]))[0]
                    found[name.removesuffix(".weight")] = None
    return tuple(found)


def _repeated(
    place: Any, new: Any, units: Ints, component: Ints, *, training: bool
) -> RepeatedNumber:
    """A number that is replaced (of `rehearsal.numbers`, which this room does not see)."""
    labels = new if isinstance(new, Tensor) else getattr(new, "labels", None)
    return RepeatedNumber(
        place.module,
        place.function,
        place.number,
        place.leaf,
        training,
        None if labels is None else tuple(units[component[labels.numpy()]].tolist()),
        new if labels is None else 0,
        place.site,
        getattr(new, "power", 0),
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
    found: dict[Statistic, None] = {}
    for trace in solution.traces:
        for weighting in trace.recording.weightings:
            own = _units_of(weighting.field.reshape(-1), 0, units, solution.component)
            if (own == PINNED).all():
                continue
            frame = weighting.frame
            for training in _modes(solution, training=trace.training):
                entry = Statistic(
                    frame.module,
                    frame.function,
                    frame.number,
                    training,
                    tuple(weighting.field.shape),
                    tuple(own.tolist()),
                    frame.site,
                )
                found[entry] = None
    return tuple(found)


def _unused(solution: Solution) -> tuple[str, ...]:
    first, *others = (trace.recording.unused for trace in solution.traces)
    return tuple(name for name in first if all(name in own for own in others))


def _free_outputs(solution: Solution, units: Ints) -> tuple[FreeOutput, ...]:
    found: dict[FreeOutput, None] = {}
    for trace in solution.traces:
        for name, fields in trace.recording.returned:
            for own in fields or ():
                lying = _units_of(own.reshape(-1), 0, units, solution.component)
                if (lying != PINNED).any():
                    axis, along = _one_axis(lying.reshape(own.shape), axes_of(own))
                    found[FreeOutput(name, axis, tuple(along.tolist()), trace.training)] = None
    return tuple(found)


def _one_axis(lying: Ints, axes: tuple[int, ...]) -> tuple[int | None, Ints]:
    """The axis along which alone units change (from the end), and those along it: whole heads, say."""
    for axis in axes:
        rest = tuple(other for other in range(lying.ndim) if other != axis)
        if (lying.min(axis=rest) == lying.max(axis=rest)).all():
            return axis - lying.ndim, lying.min(axis=rest)
    return None, np.unique(lying)


def _modes(solution: Solution, *, training: bool) -> tuple[bool, ...]:
    """The modes that a finding holds for: both, if train mode could not be run by itself."""
    both = {trace.training for trace in solution.traces} == {False, True}
    return (training,) if both else (False, True)


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
