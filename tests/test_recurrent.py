"""Recurrent layers and cells: one unit per hidden position, in all layers and directions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.flop_counter import FlopCounterMode

import swan_surgery as swan
from swan_surgery.channels import PINNED
from swan_surgery.gates import acting_gates, soft_gates
from tests.closing import assert_closed_equals_cut, close_, close_random_, image, prepared
from tests.small_nets import Net, PairNet


KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}
GATES = {"lstm": 4, "gru": 3, "rnn": 1}


def read(m: nn.Module, x: Tensor) -> Tensor:
    return m.last(m.layer(torch.relu(m.first(x)))[0])


def sequence_net(layer: nn.Module, out: int, run=read) -> nn.Module:
    return prepared(Net(run, first=nn.Linear(3, 8), layer=layer, last=nn.Linear(out, 4)))


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_closed_equals_cut_and_the_cost_is_exact(kind: str, both_ways: bool) -> None:
    layer = KINDS[kind](8, 5, num_layers=2, bidirectional=both_ways, batch_first=True)
    model, x = sequence_net(layer, 10 if both_ways else 5), image(2, 7, 3)
    channels = swan.channel_map(model, x)
    assert channels.num_units == 8 + 5
    assert channels.unknown_ops == ()
    gated = assert_closed_equals_cut(model, x, channels=channels)
    assert gated is not None
    close_random_(gated, 0.5, 3)
    small = swan.prune(gated)
    assert type(small.layer) is type(layer)
    assert swan.hard_macs(gated) == swan.count_macs(small, x)
    assert swan.count_params(small) == sum(p.numel() for p in small.parameters())
    width = int(gated.gates.open_mask()[8:].sum())
    assert (small.layer.hidden_size, small.last.in_features) == (width, width * (1 + both_ways))


@pytest.mark.parametrize(("kind", "gates"), GATES.items())
def test_multiply_adds(kind: str, gates: int) -> None:
    model = sequence_net(KINDS[kind](8, 5, batch_first=True), 5)
    wanted = 2 * 7 * (3 * 8 + gates * 5 * (8 + 5) + 5 * 4)
    assert swan.count_macs(model, image(2, 7, 3)) == wanted
    with FlopCounterMode(display=False) as counter:
        model(image(2, 7, 3))
    assert counter.get_total_flops() == 2 * wanted


def test_what_a_unit_is() -> None:
    model = sequence_net(nn.GRU(8, 5, num_layers=2, bidirectional=True), 10)
    channels = swan.channel_map(model, image(2, 7, 3))
    (unit,) = {channels.layer("layer.weight_ih_l0").out_units[2]}
    ends = ["l0", "l0_reverse", "l1", "l1_reverse"]
    rows = {(f"layer.{name}_{end}", 0, 5 * gate + 2) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh") for end in ends for gate in range(3)}  # fmt: skip
    columns = {(f"layer.weight_hh_{end}", 1, 2) for end in ends}
    columns |= {(f"layer.weight_ih_{end}", 1, at) for end in ends[2:] for at in (2, 7)}
    assert set(channels.slots(unit)) == rows | columns | {("last.weight", 1, 2), ("last.weight", 1, 7)}  # fmt: skip


@pytest.mark.parametrize("is_open", [True, False])
def test_a_projected_lstm_keeps_more_cells_than_outputs(is_open: bool) -> None:
    """torch takes as many of the one as of the other for a layer without a projection."""
    model, x = sequence_net(nn.LSTM(8, 7, num_layers=2, proj_size=4), 4), image(6, 2, 3)
    gated = assert_closed_equals_cut(model, x)
    assert gated is not None
    assert sum(unit == PINNED for unit in gated.channels.layer("layer.weight_ih_l0").out_units) == 5
    outputs = set(gated.channels.layer("layer.weight_hr_l0").out_units)
    close_(gated, *(u for u in range(gated.channels.num_units) if not (is_open and u in outputs)))
    small = swan.prune(gated)
    assert (small.layer.hidden_size, small.layer.proj_size) == (5, 4 if is_open else 1)
    assert swan.hard_macs(gated) == swan.count_macs(small, x)


def test_what_the_state_of_a_closed_unit_holds_plays_no_part() -> None:
    def run(m, x):
        return m.last(m.layer(m.first(x), (m.h.expand(-1, 2, -1), m.c.expand(-1, 2, -1)))[0])

    model = sequence_net(nn.LSTM(8, 5), 5, run)
    model.h, model.c = (nn.Parameter(image(1, 1, 5)) for _ in range(2))
    gated = assert_closed_equals_cut(model, image(6, 2, 3))
    assert gated is not None
    units = gated.channels.layer("layer.weight_ih_l0").out_units
    close_(gated, units[1], units[3])
    before = gated(image(6, 2, 3))
    with torch.no_grad():
        gated.model.h[..., [1, 3]] = 100.0
        gated.model.c[..., [1, 3]] = -100.0
    assert torch.equal(gated(image(6, 2, 3)), before)


def test_a_soft_gate_scales_the_unit_wherever_it_is_read() -> None:
    model, x = sequence_net(nn.GRU(8, 5), 5), image(6, 2, 3)
    gated = swan.swanify(model, x).eval()
    with torch.no_grad():
        gated.gates.logits.uniform_(-2, 2)
    p, layer = gated.gates.probabilities(), model.layer
    data = torch.relu(model.first(x)) * p[:8]
    state, found = torch.zeros(2, 5, dtype=x.dtype), []
    for step in data:
        into = F.linear(step, layer.weight_ih_l0, layer.bias_ih_l0).chunk(3, 1)
        back = F.linear(state * p[8:], layer.weight_hh_l0, layer.bias_hh_l0).chunk(3, 1)
        r, z = (torch.sigmoid(into[i] + back[i]) for i in range(2))
        state = (1 - z) * torch.tanh(into[2] + r * back[2]) + z * state
        found.append(model.last(state * p[8:]))
    with soft_gates(gated):
        torch.testing.assert_close(gated(x), torch.stack(found), rtol=1e-11, atol=1e-12)


STARTS = {
    "attribute": lambda m, n: torch.zeros(2, n, m.hidden, dtype=torch.float64),
    "attribute of the layer": lambda m, n: torch.zeros(2, n, m.layer.hidden_size).double(),
    "number": lambda m, n: torch.ones(2, n, 6, dtype=torch.float64),
    "scaled": lambda m, n: 0.5 * torch.ones(2, n, m.hidden, dtype=torch.float64),
    "moved": lambda m, n: torch.zeros(2, n, m.hidden).to(torch.float64),
    "learned": lambda m, n: m.start.repeat(1, n, 1),
}


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("start", STARTS)
def test_an_initial_state_follows(start: str, kind: str) -> None:
    def run(m, x):
        state = STARTS[start](m, x.shape[1])
        return m.last(m.layer(m.first(x), (state, state) if kind == "lstm" else state)[0])

    model = sequence_net(KINDS[kind](8, 6, num_layers=2), 6, run)
    model.hidden, model.start = 6, nn.Parameter(image(2, 1, 6))
    channels = swan.channel_map(model, image(5, 2, 3))
    assert channels.num_units == 8 + 6
    assert_closed_equals_cut(model, image(5, 2, 3), channels=channels)


def test_a_state_that_is_given_keeps_its_width() -> None:
    model = prepared(PairNet(lambda m, x, h: m.last(m.layer(x, h)[0]), layer=nn.GRU(3, 5), last=nn.Linear(5, 2)))  # fmt: skip
    channels = swan.channel_map(model, (image(6, 2, 3), image(1, 2, 5)))
    assert channels.num_units == 0
    (reason,) = {pin.reason for pin in channels.pins if pin.layer == "layer.weight_ih_l0"}
    assert reason == "meets data that belongs to no channel"


ENDS = {
    "last layer": lambda m, out, h: h[-1],
    "both directions": lambda m, out, h: torch.cat([h[-2], h[-1]], dim=1),
    "by layer": lambda m, out, h: h.view(2, 2, h.shape[1], -1)[1].permute(1, 0, 2).flatten(1),
    "sum of directions": lambda m, out, h: sum(out[-1].chunk(2, dim=-1)),
    "everything": lambda m, out, h: h.transpose(0, 1).flatten(1),
    "mean": lambda m, out, h: out.mean(0),
}
READS = {"both directions": 12, "by layer": 12, "everything": 24, "mean": 12}


@pytest.mark.parametrize("end", ENDS)
def test_states_and_outputs_carry_the_units(end: str) -> None:
    def run(m, x):
        out, (h, c) = m.layer(m.first(x))
        return m.last(ENDS[end](m, out, torch.tanh(c) + h))

    model = sequence_net(nn.LSTM(8, 6, num_layers=2, bidirectional=True), READS.get(end, 6), run)
    channels = swan.channel_map(model, image(5, 2, 3))
    assert channels.num_units == 8 + 6
    assert_closed_equals_cut(model, image(5, 2, 3), channels=channels)


@pytest.mark.parametrize("is_sorted", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences(kind: str, is_sorted: bool) -> None:
    def run(m, x, lengths):
        packed = pack_padded_sequence(m.first(x), lengths, batch_first=True, enforce_sorted=is_sorted)  # fmt: skip
        out, _ = m.layer(packed)
        return m.last(pad_packed_sequence(out, batch_first=True)[0])

    layer = KINDS[kind](8, 5, batch_first=True, bidirectional=True)
    model = prepared(PairNet(run, first=nn.Linear(3, 8), layer=layer, last=nn.Linear(10, 2)))
    inputs = (image(3, 6, 3), torch.tensor([6, 4, 1] if is_sorted else [4, 6, 1]))
    gated = assert_closed_equals_cut(model, inputs)
    assert gated is not None
    assert gated.channels.num_units == 8 + 5
    steps = 11 * GATES[kind] * 2 * 5 * (8 + 5)
    assert swan.count_macs(model, inputs) == 18 * 8 * 3 + steps + 18 * 10 * 2
    assert swan.hard_macs(gated) == swan.count_macs(swan.prune(gated), inputs)


@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind: str) -> None:
    def run(m, x):
        state, found = None, []
        for step in x:
            state = m.layer(m.first(step), state)
            found.append(m.last(state[0] if kind == "lstm" else state))
        return torch.stack(found)

    model = sequence_net(CELLS[kind](8, 5), 5, run)
    gated = assert_closed_equals_cut(model, image(6, 2, 3))
    assert gated is not None
    assert gated.channels.num_units == 8 + 5
    assert swan.count_macs(model, image(6, 2, 3)) == 12 * (24 + GATES[kind] * 5 * 13 + 20)
    small = swan.prune(gated)
    assert swan.hard_macs(gated) == swan.count_macs(small, image(6, 2, 3))
    assert small.layer.input_size == small.layer.weight_ih.shape[1]
    assert small.layer.hidden_size == small.layer.weight_hh.shape[1]


def test_an_encoder_and_its_decoder_share_units() -> None:
    def run(m, x, y):
        return m.last(m.decoder(y, m.encoder(x)[1])[0])

    layers = {"encoder": nn.LSTM(3, 6, 2), "decoder": nn.LSTM(3, 6, 2), "last": nn.Linear(6, 2)}
    model, inputs = prepared(PairNet(run, **layers)), (image(6, 2, 3), image(4, 2, 3))
    channels = swan.channel_map(model, inputs)
    first, second = (channels.layer(f"{n}.weight_ih_l0").out_units for n in ("encoder", "decoder"))
    assert first == second
    assert channels.num_units == 6
    assert_closed_equals_cut(model, inputs, channels=channels)


def test_the_map_takes_as_many_operations_for_long_sequences() -> None:
    """What torch makes of a layer grows with its steps; the map sees one operation."""
    model = sequence_net(nn.LSTM(8, 5), 5)
    short, long = (swan.channel_map(model, image(n, 1, 3)) for n in (3, 300))
    assert [t.axes for t in short.costs] == [t.axes for t in long.costs]
    assert [100 * t.factor for t in short.costs] == [t.factor for t in long.costs]


def test_nothing_of_the_gates_stays_in_the_layer() -> None:
    """torch's forward keeps a list of the parameters; a run under gates must not leave others there."""
    model, x = sequence_net(nn.LSTM(8, 5), 5), image(6, 2, 3)
    gated = swan.swanify(model, x)
    close_(gated, 9)
    gated(x)
    layer = gated.model.layer
    own = [getattr(layer, name) for name in layer._flat_weights_names]
    assert all(one is two for one, two in zip(layer._flat_weights, own, strict=True))
    back = swan.unswanify(gated)
    assert type(back.layer) is nn.LSTM
    assert torch.equal(back(x), model(x))
    twin = copy.deepcopy(gated)
    assert torch.equal(twin.eval()(x), gated.eval()(x))
    with acting_gates(gated) as inner:
        inner.layer.flatten_parameters()
        assert torch.equal(inner(x), gated(x))


def test_weights_that_are_replaced_are_the_ones_that_run() -> None:
    model, x = sequence_net(nn.GRU(8, 5), 5), image(6, 2, 3)
    gated = swan.swanify(model, x).eval()
    with torch.no_grad():
        gated.model.layer.weight_hh_l0 = nn.Parameter(torch.zeros(15, 5, dtype=x.dtype))
        model.layer.weight_hh_l0.zero_()
    torch.testing.assert_close(gated(x), model(x), rtol=1e-12, atol=1e-13)
    assert torch.equal(swan.unswanify(gated)(x), model(x))


def test_a_trained_cut_layer_is_saved_and_loaded(tmp_path) -> None:
    model, x = sequence_net(nn.LSTM(8, 5, 2, bidirectional=True), 10), image(6, 2, 3)
    gated = swan.swanify(model, x).train()
    gated(x).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in gated.parameters())
    close_(gated, 0, 9, 11)
    small = swan.prune(gated.eval())
    swan.save(small, tmp_path / "small.swan")
    assert torch.equal(swan.load(tmp_path / "small.swan", model).eval()(x), small(x))
