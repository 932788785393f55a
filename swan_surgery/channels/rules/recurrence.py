"""Rules for recurrent layers and cells: one operation for all steps, layers and directions.

A hidden unit is what one position of the state stands for: the rows of every gate in `weight_ih`,
`weight_hh` and both biases, the column of `weight_hh`, and the columns of what reads the output (the
next layer, in both directions). torch's modules have one `hidden_size` for all layers and directions,
so the same positions go from each. To close a unit is to let nobody read it, the recurrence
included: what its own state holds, whatever it started from, plays no part then.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from swan_surgery.channels.labels.fields import align, axis_field, vector_along
from swan_surgery.channels.labels.labels import Labels
from swan_surgery.channels.labels.recording import Call, Contraction
from swan_surgery.channels.rules.contraction import meet, price
from swan_surgery.channels.rules.pointwise import join_aligned
from swan_surgery.channels.rules.registry import rule


_MATRIX = 2  # the rank of weights; biases have one axis


@dataclass(frozen=True, slots=True)
class _Cell:
    """What one layer holds for one direction; `project` maps hidden units to fewer outputs."""

    reads: Tensor
    recurs: Tensor
    biases: tuple[Tensor, ...] = ()
    project: Tensor | None = None


def _cells(params: Sequence[Tensor], count: int) -> list[_Cell]:
    """Layer by layer, in each direction: weight_ih, weight_hh, biases, weight_hr."""
    each = len(params) // count
    cells = []
    for start in range(0, len(params), each):
        reads, recurs, *rest = params[start : start + each]
        project = rest.pop() if rest and rest[-1].ndim == _MATRIX else None
        cells.append(_Cell(reads, recurs, tuple(rest), project))
    return cells


def recurrent_macs(positions: int, params: Iterable[Sequence[int]]) -> int:
    """Multiply-adds of a recurrent layer or cell: every matrix is applied once at every position.

    Args:
        positions: samples times steps.
        params: the shapes of its parameters.
    """
    return positions * sum(prod(shape) for shape in params if len(shape) == _MATRIX)


def _padded(data: Tensor, hx: Any, params: list[Tensor], *settings: Any) -> tuple[Tensor, ...]:
    """What lstm, gru, rnn_tanh and rnn_relu return of padded sequences, without a step of them."""
    _, num_layers, _, _, is_bidirectional, *_ = settings
    states = _states(hx)
    directions = 2 if is_bidirectional else 1
    width = states[0].shape[-1]
    for index, cell in enumerate(_cells(params, num_layers * directions)):
        into = data.shape[-1] if index < directions else directions * width
        _check_widths(cell, into, states)
    out = data.new_empty((*data.shape[:-1], directions * width))
    return (out, *(data.new_empty(state.shape) for state in states))


def _packed(data: Tensor, _sizes: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The same of packed sequences."""
    return _padded(data, *rest)


def _one_step(
    data: Tensor, hx: Any, reads: Tensor, recurs: Tensor, *biases: Tensor | None
) -> tuple[Tensor, ...] | Tensor:
    """What a cell returns, without running it."""
    states = _states(hx)
    own = tuple(bias for bias in biases if bias is not None)
    _check_widths(_Cell(reads, recurs, own), data.shape[-1], states)
    found = tuple(data.new_empty(state.shape) for state in states)
    return found if len(found) > 1 else found[0]


def _states(hx: Any) -> list[Tensor]:
    return [hx] if isinstance(hx, Tensor) else list(hx)


def _check_widths(cell: _Cell, into: int, states: Sequence[Tensor]) -> None:
    """Refuse what torch would refuse.

    Raises:
        RuntimeError: widths do not fit one another.
    """
    width, hidden = states[0].shape[-1], states[-1].shape[-1]
    rows = cell.reads.shape[0]
    fits = (
        rows % hidden == 0
        and cell.reads.shape[1] == into
        and cell.recurs.shape == (rows, width)
        and all(bias.shape == (rows,) for bias in cell.biases)
        and (width == hidden if cell.project is None else cell.project.shape == (width, hidden))
    )
    if not fits:
        raise RuntimeError(f"recurrent weights of other widths than {into} in and {hidden} hidden")


@rule("lstm", "gru", "rnn_tanh", "rnn_relu", on_meta={"input": _padded, "data": _packed})
def _(call: Call, labels: Labels) -> None:
    directions = 2 if call.arg("bidirectional") else 1
    cells = _cells(call.arg("params"), call.arg("num_layers") * directions)
    hidden, put_out = _own_units(cells, call, labels)
    data = _read_vector(call, labels)
    for start in range(0, len(cells), directions):
        for cell in cells[start : start + directions]:
            _multiply(cell, data, call, labels)
        data = None if put_out is None else put_out.repeat(directions)
    out, *states = call.outputs
    if data is not None:
        labels.assign(out, (axis_field(data, out.ndim - 1, out.ndim),))
    _hand_on_states(states, (put_out, hidden), call, labels)


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", on_meta={"default": _one_step})
def _(call: Call, labels: Labels) -> None:
    biases = tuple(b for b in (call.arg("b_ih"), call.arg("b_hh")) if b is not None)
    cell = _Cell(call.arg("w_ih"), call.arg("w_hh"), biases)
    own, _ = _own_units([cell], call, labels)
    _multiply(cell, _read_vector(call, labels), call, labels)
    _hand_on_states(call.outputs, (own, own), call, labels)


@rule("_pack_padded_sequence", "_pad_packed_sequence")
def _(call: Call, labels: Labels) -> None:
    """Steps and samples share an axis in one of the two; the last axes are as they were."""
    source, out = call.inputs[0], call.outputs[0]
    beside = source.ndim - (2 if call.name == "aten._pack_padded_sequence" else 1)
    fields = []
    for field in labels.fields(source):
        if any(size > 1 for size in field.shape[: source.ndim - beside]):
            labels.pin(field, "channels lie on an axis of steps or samples", call)
            continue
        own = field.reshape(field.shape[source.ndim - beside :])
        fields.append(align(own, out.ndim))
    labels.assign(out, tuple(fields))


def _own_units(
    cells: Sequence[_Cell], call: Call, labels: Labels
) -> tuple[Tensor | None, Tensor | None]:
    """Join, over all cells, what stands for the same unit: labels of hidden units, and of outputs."""
    hidden: list[Tensor | None] = []
    put_out: list[Tensor | None] = []
    width = _states(call.arg("hx"))[-1].shape[-1]
    for cell in cells:
        for tensor in (cell.reads, cell.recurs, *cell.biases):
            rows = _along(tensor, 0, labels)
            hidden += [None] if rows is None else rows.view(-1, width)
        if cell.project is None:
            hidden.append(_along(cell.recurs, 1, labels))
        else:
            hidden.append(_along(cell.project, 1, labels))
            put_out += [_along(cell.project, 0, labels), _along(cell.recurs, 1, labels)]
    own = _joined(hidden, call, labels)
    if not put_out:
        return own, own
    if own is not None:
        # torch takes as many outputs as there are cells for a layer without a projection.
        least = cells[0].recurs.shape[1] + 1
        labels.pin(own[:least], "an LSTM keeps more cells than it projects them to", call)
    return own, _joined(put_out, call, labels)


def _along(tensor: Tensor, axis: int, labels: Labels) -> Tensor | None:
    return vector_along(labels.fields(tensor), axis)[0]


def _joined(vectors: list[Tensor | None], call: Call, labels: Labels) -> Tensor | None:
    """Join labels position by position; the first of them stand for all."""
    known = [own for own in vectors if own is not None]
    for own in known:
        if own.numel() == 1:
            labels.pin(own, "a single hidden unit", call)
        elif len(known) < len(vectors):
            labels.pin(own, "recurrent weights that have no channel labels", call)
        else:
            labels.join(known[0], own, call)
    return known[0] if known else None


def _read_vector(call: Call, labels: Labels) -> Tensor | None:
    """The labels of what is read, along its last axis."""
    data = call.inputs[0]
    for field in labels.fields(data):
        if any(size > 1 for size in field.shape[:-1]):
            labels.pin(field, "channels lie on an axis of steps or samples", call)
    return _along(data, data.ndim - 1, labels)


def _multiply(cell: _Cell, data: Tensor | None, call: Call, labels: Labels) -> None:
    """What is read meets the weights; all products of one cell are recorded."""
    meet(data, _along(cell.reads, 1, labels), call, labels)
    rows = _along(cell.reads, 0, labels)
    width = _states(call.arg("hx"))[-1].shape[-1]
    _record(cell.reads, data, None if rows is None else rows[:width], call, labels)
    _record(cell.recurs, None, None, call, labels)
    if cell.project is not None:
        _record(cell.project, None, _along(cell.project, 0, labels), call, labels)


def _record(
    weight: Tensor, data: Tensor | None, produced: Tensor | None, call: Call, labels: Labels
) -> None:
    """Record one product, at all positions; the recurrent one counts to the layer of the other."""
    rows, columns = (_along(weight, axis, labels) for axis in (0, 1))
    price(
        Contraction(
            call.name,
            call.module,
            recurrent_macs(prod(call.inputs[0].shape[:-1]), [weight.shape]),
            (rows, columns),
            produced=produced,
            reads=columns if data is None else data,
            summed=columns,
            num_out=weight.shape[0] if produced is None else produced.numel(),
            num_in=weight.shape[1],
            gated=columns if labels.is_bare(weight) else None,
            is_layer=produced is not None,
        ),
        labels,
    )


def _hand_on_states(
    after: Sequence[Tensor], own: Sequence[Tensor | None], call: Call, labels: Labels
) -> None:
    """States have the units of the layer, those that come in and those that go out."""
    for before, state, units in zip(_states(call.arg("hx")), after, own, strict=False):
        fields = () if units is None else (axis_field(units, state.ndim - 1, state.ndim),)
        operands = [(before, labels.fields(before)), (state, fields)]
        labels.assign(state, join_aligned(operands, state.ndim, call, labels))
