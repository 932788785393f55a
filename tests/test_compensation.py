"""Compensation: what the layers behind a cut can still read out of what stayed, they give."""

import contextlib
import copy
from itertools import pairwise
from math import isnan

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.cutting.compensation import compensating, layers
from swan_surgery.cutting.compensation.lockstep import Pass
from swan_surgery.cutting.compensation.outcome import LayerCompensation
from swan_surgery.cutting.compensation.solving import Rows, solve, solve_held
from swan_surgery.cutting.compensation.sums import Sums
from swan_surgery.cutting.compensation.wide import pixels_of
from swan_surgery.models.provenance import provenance_of
from tests.closing import close_random_, learnt_
from tests.fingerprints import assert_same_fingerprint, fingerprint
from tests.strategies import Case, networks


class Between(nn.Module):
    """A first layer with six channels, whatever is to be tried behind it, a last layer."""

    def __init__(self, first: nn.Module, behind: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.first, self.behind, self.last = first, behind, last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.behind(self.first(x)))


def conv(*args, **options) -> nn.Module:
    return nn.Conv2d(*args, **options)


class Tokens(nn.Module):
    """Self-attention on [B, T, 6], with the residual around it."""

    def __init__(self, *, residual: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x, x, x)[0]
        return x + y if self.residual else y


class Twice(nn.Module):
    """One layer on two inputs, both made of the cut one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 0.5 * self.layer(x.flip(3)).tanh()


class Functional(nn.Module):
    """A bare parameter as the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)


IMAGE, LINE, VOLUME, TOKENS = (3, 6, 6), (3, 9), (3, 4, 4, 4), (5, 3)


class NormedStream(nn.Module):
    """A batch-norm in front of a stream: more positions than the sums take."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.conv, self.norm = (
            conv(6, 4, 1),
            conv(6, 4, 1, bias=False),
            nn.BatchNorm2d(4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.into(x) + self.norm(self.conv(x)))


KINDS = {
    "conv": (IMAGE, conv(3, 6, 3), conv(6, 4, 3, padding=1), conv(4, 2, 1)),
    "strided": (
        IMAGE,
        conv(3, 6, 3),
        conv(6, 4, 3, stride=2, dilation=2, padding=2),
        conv(4, 2, 1),
    ),
    "no_bias": (IMAGE, conv(3, 6, 3), conv(6, 4, 3, padding=(1, 0), bias=False), conv(4, 2, 1)),
    "transposed": (
        IMAGE,
        conv(3, 6, 3),
        nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, dilation=2),
        conv(4, 2, 1),
    ),
    "line": (LINE, nn.Conv1d(3, 6, 1), nn.Conv1d(6, 4, 3, padding=2), nn.Conv1d(4, 2, 1)),
    "volume": (VOLUME, nn.Conv3d(3, 6, 1), nn.Conv3d(6, 4, 2), nn.Conv3d(4, 2, 1)),
    "linear": ((3,), nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(4, 2)),
    "rows": (TOKENS, nn.Linear(3, 6), nn.Linear(6, 4, bias=False), nn.Linear(4, 2)),
    "flat": (
        (3, 2, 2),
        conv(3, 6, 1),
        nn.Sequential(nn.Flatten(), nn.Linear(24, 4)),
        nn.Linear(4, 2),
    ),
    "attention": (TOKENS, nn.Linear(3, 6), Tokens(residual=False), nn.Linear(6, 2)),
    "twice": (IMAGE, conv(3, 6, 1), Twice(), conv(4, 2, 1)),
    "functional": (IMAGE, conv(3, 6, 1), Functional(), conv(4, 2, 1)),
    "stream": ((3, 16, 16), conv(3, 6, 1), NormedStream(), conv(4, 2, 1)),
    "batch_norm": (
        IMAGE,
        conv(3, 6, 1),
        nn.Sequential(conv(6, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        conv(4, 2, 1),
    ),
}


def model_and_data(kind: str) -> tuple[nn.Module, Tensor]:
    """A network of a kind in which channel 3 of `first` is a mixture of channels 0 and 1."""
    shape, *layers = copy.deepcopy(KINDS[kind])
    model = Between(*layers).double().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
        for parameter in model.first.parameters():
            parameter[3] = 2 * parameter[1] - parameter[0]
    data = torch.randn(240, *shape, dtype=torch.float64, generator=generator)
    return model, data


def cut_channel(model: nn.Module, data: Tensor, channel: int = 3) -> nn.Module:
    gated = swan.swanify(model, data[:2])
    (layer,) = (entry for entry in gated.channels.layers if entry.name == "first")
    with torch.no_grad():
        gated.gates.logits[layer.out_units[channel]] = -5.0
    return swan.prune(gated)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_of_other_channels_is_removed_without_loss(kind: str) -> None:
    model, data = model_and_data(kind)
    small = cut_channel(model, data)
    with torch.no_grad():
        wanted, before = model(data), small(data)
        swan.compensate(small, model, data.split(60), damping=1e-12)
        after = small(data)
    scale = wanted.abs().max()
    assert (wanted - before).abs().max() > 1e-2 * scale
    assert (wanted - after).abs().max() < 1e-6 * scale


@pytest.mark.parametrize("kind", KINDS)
def test_an_uncut_model_is_not_changed(kind: str) -> None:
    model, data = model_and_data(kind)
    same = copy.deepcopy(model)
    before = fingerprint(same)
    done = swan.compensate(same, model, data.split(60))
    assert_same_fingerprint(before, fingerprint(same))
    assert {layer.reason for layer in done.layers} == {"nothing to mend"}


class Stream(nn.Module):
    """Two writers of one stream, the second of which can make good what the first has lost."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.one, self.two = nn.Conv2d(8, 6, 1, bias=False), nn.Conv2d(3, 6, 1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.one(self.first(x))
        return self.last(torch.relu(stream + self.norm(self.two(x))))


def test_what_a_stream_has_lost_its_next_writer_takes_up() -> None:
    # `first` keeps one of eight channels, so `one` cannot give what it gave; `two` sees all of x.
    torch.manual_seed(0)
    model = Stream().double().eval()
    data = torch.randn(64, 3, 6, 6, dtype=torch.float64)
    gated = swan.swanify(model, data[:2])
    (layer,) = (entry for entry in gated.channels.layers if entry.name == "first")
    with torch.no_grad():
        gated.gates.logits[list(layer.out_units[1:])] = -5.0
    small = swan.prune(gated)
    swan.compensate(small, model, [data], damping=1e-12)
    torch.testing.assert_close(small(data), model(data), rtol=1e-2, atol=1e-2)


def test_weights_that_would_be_worse_stay() -> None:
    # Two rows for 24 inputs: what fits them says nothing about others.
    model, data = model_and_data("flat")
    small = cut_channel(model, data, channel=0)
    with torch.no_grad():
        before = (small(data) - model(data)).square().mean()
        swan.compensate(small, model, data.split(80)[:3])
        assert (small(data) - model(data)).square().mean() < before


class InputsFirst(nn.Module):
    """A linear layer whose weight is [in, out], as GPT-2 has it."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(size, out)), nn.Parameter(torch.ones(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class TestWideLayers:
    """Linear layers with more inputs than a Gram matrix should hold."""

    @pytest.mark.parametrize("bias", [True, False])
    def test_a_channel_that_is_a_mixture_is_removed_without_loss(self, bias, monkeypatch) -> None:
        monkeypatch.setattr(layers, "MOST_INPUTS", 10)
        model, data = model_and_data("flat")
        read = model.last if isinstance(model.last, nn.Linear) else model.behind[-1]
        assert isinstance(read, nn.Linear)
        if not bias:
            read.bias = None
        small = cut_channel(model, data)
        done = swan.compensate(small, model, data.split(60), damping=1e-12)
        torch.testing.assert_close(small(data), model(data), rtol=1e-6, atol=1e-6)
        assert any(not layer.reason for layer in done.layers)

    def test_a_matrix_of_inputs_by_outputs_is_read_along_its_inputs(self, monkeypatch) -> None:
        monkeypatch.setattr(layers, "MOST_INPUTS", 10)
        model, data = model_and_data("flat")
        model.behind = nn.Sequential(nn.Flatten(), InputsFirst(24, 4)).double()
        small = cut_channel(model, data)
        assert small.behind[1].weight.shape == (20, 4)
        done = swan.compensate(small, model, data.split(60), damping=1e-12)
        torch.testing.assert_close(small(data), model(data), rtol=1e-6, atol=1e-6)
        assert "behind.1.weight" in [layer.name for layer in done.layers if not layer.reason]

    def test_an_uncut_one_is_not_changed(self, monkeypatch) -> None:
        monkeypatch.setattr(layers, "MOST_INPUTS", 10)
        model, data = model_and_data("flat")
        small = copy.deepcopy(model)
        swan.compensate(small, model, data.split(60))
        assert_same_state(model, small)

    @pytest.mark.parametrize(
        ("kept", "inputs", "pixels"),
        [
            ([4, 5, 6, 7], 12, 4),
            ([0, 1, 2, 3, 8, 9, 10, 11], 12, 4),
            ([0, 3, 6, 9], 12, None),  # pixels first: no block is a channel's
            ([1, 2, 3, 4], 12, None),
        ],
    )
    def test_pixels_are_known_by_what_stayed(self, kept, inputs, pixels) -> None:
        assert pixels_of(torch.tensor(kept), inputs) == pixels


def assert_same_state(one: nn.Module, two: nn.Module) -> None:
    states = one.state_dict(), two.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def spoil(small: nn.Module, *_: object) -> list[LayerCompensation]:
    with torch.no_grad():
        for tensor in (*small.parameters(), *small.buffers()):
            tensor.add_(1)
    return [LayerCompensation("0.weight", 1.0, 0.5)]


def fails(small: nn.Module, *_: object) -> list[LayerCompensation]:
    spoil(small)
    raise RuntimeError("the model's own code")


def test_a_model_whose_outputs_would_be_worse_stays_as_it_was(monkeypatch) -> None:
    model, data = model_and_data("batch_norm")
    small = cut_channel(model, data, channel=0)
    before = copy.deepcopy(small)
    monkeypatch.setattr(compensating, "in_lockstep", spoil)
    done = swan.compensate(small, model, data.split(60))
    assert_same_state(before, small)
    assert done.after > done.before > 0
    assert not done.kept
    assert "that is worse, so the model is as it was" in str(done)
    assert provenance_of(small) == provenance_of(before)
    monkeypatch.setattr(compensating, "in_lockstep", fails)
    with pytest.raises(RuntimeError, match="own code"):
        swan.compensate(small, model, data.split(60))
    assert_same_state(before, small)


def test_modes_random_numbers_and_the_reference_stay() -> None:
    model, data = model_and_data("batch_norm")
    small = cut_channel(model.train(), data).train()
    before, mode = fingerprint(model), [m.training for m in small.modules()]
    swan.compensate(small, model, data.split(60))
    assert_same_fingerprint(before, fingerprint(model))
    assert [m.training for m in small.modules()] == mode


def test_the_same_data_give_the_same_weights() -> None:
    model, data = model_and_data("conv")
    small = cut_channel(model, data, channel=0)
    twin = copy.deepcopy(small)
    swan.compensate(small, model, data.split(60))
    swan.compensate(twin, model, data.split(60))
    for one, two in zip(small.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two)


def test_two_cuts_in_a_row_are_compensated_against_the_first_model() -> None:
    model, data = model_and_data("conv")
    once = cut_channel(model, data)
    twice = cut_channel(once, data, channel=0)
    swan.compensate(twice, model, data.split(60))
    swan.compensate(cut_channel(once, data, channel=0), once, data.split(60))


def test_prune_by_score_compensates_against_the_base_model() -> None:
    model, data = model_and_data("conv")
    gated = swan.swanify(model, data[:2])
    scores = swan.importance(gated, "magnitude")
    plain = swan.prune_by_score(gated, scores, macs=0.6)
    small = swan.prune_by_score(gated, scores, macs=0.6, compensate=data.split(60))
    wanted = model(data)
    assert (small(data) - wanted).square().mean() < (plain(data) - wanted).square().mean()


def test_prune_makes_up_for_what_the_budget_closes_beyond_the_gates() -> None:
    model, data = model_and_data("conv")
    gated = learnt_(swan.swanify(model, data[:2]))
    with torch.no_grad():
        gated.gates.logits[1:3] = -5.0
    aimed = swan.prune(gated)(data)
    plain, small = (
        swan.prune(gated, macs=0.5, compensate=batches) for batches in (None, data.split(60))
    )
    assert (small(data) - aimed).square().mean() < (plain(data) - aimed).square().mean()
    nearer = swan.prune(gated, macs=0.5, compensate=data.split(60), reference=model)
    wanted = model(data)
    assert (nearer(data) - wanted).square().mean() < (plain(data) - wanted).square().mean()


def test_a_file_holds_the_weights_and_says_that_they_were_solved_for(tmp_path) -> None:
    model, data = model_and_data("conv")
    small = cut_channel(model, data, channel=0)
    swan.compensate(small, model, data.split(60))
    provenance = provenance_of(small)
    assert provenance is not None
    assert [step.kind for step in provenance.steps] == ["cut", "compensate"]
    swan.save(small, tmp_path / "small.swan")
    loaded = swan.load(tmp_path / "small.swan", copy.deepcopy(model))
    assert torch.equal(loaded(data), small(data))


def test_batches_may_be_dictionaries_or_carry_labels() -> None:
    model, data = model_and_data("linear")
    small = cut_channel(model, data)
    labelled = [(data, torch.zeros(240))]
    assert swan.compensate(copy.deepcopy(small), model, [{"x": data}]).layers
    assert swan.compensate(small, model, labelled, num_batches=1).layers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": []}, "no batch"),
        ({"damping": 0.0}, "damping must be positive"),
        ({"num_batches": 0}, "num_batches"),
        ({"reference": nn.Linear(3, 6)}, "no parameter"),
        ({"reference": Between(nn.Linear(3, 7), nn.Linear(7, 4), nn.Linear(4, 2))}, "was cut from"),
        ({"reference": Between(nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(4, 2))}, "float32"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changed(change, message: str) -> None:
    model, data = model_and_data("linear")
    small = cut_channel(model, data)
    before = fingerprint(small)
    given = {"reference": model, "batches": [data]} | change
    with pytest.raises(swan.InputError, match=message):
        swan.compensate(small, **given)
    assert_same_fingerprint(before, fingerprint(small))


@pytest.mark.parametrize("place", [0, 200], ids=["solves", "judges"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["batch_norm", "linear"])
def test_a_broken_sample_changes_nothing(kind, value, place) -> None:
    """In the batches that judge it ruined the model, uncut ones too, and nothing said so."""
    model, data = model_and_data(kind)
    data[place].flatten()[0] = value
    is_told = pytest.raises(swan.InputError, match="NaN")
    # Infinity may be meant, in a mask; where no layer got better by such data, there is nothing to refuse.
    told = is_told if isnan(value) or place == 200 else contextlib.suppress(swan.InputError)
    for small in (cut_channel(model, data[1:60]), copy.deepcopy(model)):
        before = fingerprint(small)
        with told:
            swan.compensate(small, model, data.split(60))
        assert_same_fingerprint(before, fingerprint(small))


def test_masked_scores_of_minus_infinity_say_nothing() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            scores = self.last(self.first(x).tanh())
            return scores.masked_fill(torch.arange(4) == 2, -torch.inf)

    model, data = Masked().double(), torch.randn(240, 3).double()
    small = swan.prune_by_score(
        gated := swan.swanify(model, data[:2]), swan.importance(gated, "magnitude"), macs=0.6
    )
    done = swan.compensate(small, model, [data])
    assert done.kept
    assert done.after < done.before


def test_batches_of_several_kinds_are_refused() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.other, self.last = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            first = self.first(x) if y is None else self.first(x) + self.other(y)
            return self.last(first.tanh())

    model, x = Optional(), torch.randn(240, 3)
    gated = swan.swanify(model, {"x": x[:2], "y": x[:2]})
    small = swan.prune_by_score(gated, swan.importance(gated, "magnitude"), macs=0.5)
    before = fingerprint(small)
    with pytest.raises(swan.InputError, match="different paths"):
        swan.compensate(small, model, [{"x": x, "y": x}, {"x": x}])
    with pytest.raises(swan.InputError, match="no samples"):
        swan.compensate(small, model, [{"x": x, "y": x}, {"x": x[:0], "y": x[:0]}])
    assert_same_fingerprint(before, fingerprint(small))


def test_gated_models_are_no_reference() -> None:
    model, data = model_and_data("linear")
    with pytest.raises(swan.ModelError, match="unswanify"):
        swan.compensate(cut_channel(model, data), swan.swanify(model, data[:2]), [data])


def test_a_pass_ends_where_it_is_abandoned_and_hands_errors_on() -> None:
    seen: list[int] = []

    def work(stop) -> None:
        for number in range(3):
            stop(number)
            seen.append(number)
        raise ValueError("over")

    own: Pass[int] = Pass(work)
    assert [own.next(), own.next()] == [0, 1]
    own.abandon()
    assert seen == [0]

    def stubborn(stop) -> None:
        try:
            stop(0)
        finally:
            stop(1)

    unwinding: Pass[int] = Pass(stubborn)
    assert unwinding.next() == 0
    unwinding.abandon()
    other: Pass[int] = Pass(work)
    assert [other.next() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="over"):
        other.next()


# An einsum of three operands over one channel is no product as it runs; what that costs is not asked here.
@pytest.mark.filterwarnings("ignore:module .* MACs as it runs:UserWarning")
@pytest.mark.law
@settings(max_examples=max(5, settings.default.max_examples // 3))
@given(networks(), st.sampled_from([0.3, 0.6]), st.integers(0, 1000))
def test_random_networks_are_compensated_without_a_fault(
    case: Case, share: float, seed: int
) -> None:
    try:
        gated = swan.swanify(case.model, case.inputs)
    except swan.NoGateableChannelsError:
        return
    close_random_(gated, share, seed)
    small = swan.prune(gated)
    call = dict(zip(("x", "y"), case.inputs, strict=False))
    done = swan.compensate(small, case.model, [call, call])
    assert all(not layer.after > layer.before for layer in done.layers)
    assert done.kept == (done.after <= done.before or isnan(done.before))
    assert all(bool(tensor.isfinite().all()) for tensor in small.parameters())


def test_channels_that_hardly_vary_are_not_blown_up() -> None:
    """Untrained networks: activations fade with depth, statistics are those of the constructor."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for width in (3, 16, 16, 16):
        layers += [nn.Conv2d(width, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(16, 4, 1)).double().eval()
    with torch.no_grad():
        for layer in model[:-1:3]:
            layer.weight.mul_(1e-3)
    data = torch.randn(64, 3, 6, 6, dtype=torch.float64)
    gated = swan.swanify(model, data[:1])
    scores = swan.importance(gated, "random", generator=torch.Generator().manual_seed(0))
    plain = swan.prune_by_score(gated, scores, macs=0.5)
    small = swan.prune_by_score(gated, scores, macs=0.5, compensate=data.split(16))
    wanted = model(data)
    assert (small(data) - wanted).square().mean() < (plain(data) - wanted).square().mean()


def test_of_few_rows_held_out_ones_choose_how_strongly_weights_are_held() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 200, 40, generator=generator).double()
    start = torch.randn(1, 3, 40, generator=generator).double()
    y = x @ start.transpose(1, 2) + torch.randn(1, 200, 3, generator=generator)
    few, many, held = Sums(), Sums(), Rows([(x[:, 180:], y[:, 180:])])
    few.add(x[:, :45], y[:, :45])
    plain = solve(few, start, centred=False, damping=0.01)
    assert plain is not None
    found, error = solve_held(few, start, held, centred=False, damping=0.01)
    assert found is not None
    assert error == held.error(found, centred=False) < 0.5 * held.error(plain, centred=False)
    many.add(x[:, :180].repeat(1, 3, 1), y[:, :180].repeat(1, 3, 1))  # 13 rows per input
    found, _ = solve_held(many, start, held, centred=False, damping=0.01)
    wanted = solve(many, start, centred=False, damping=0.01)
    assert found is not None
    assert wanted is not None
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("centred", [True, False])
def test_of_fewer_rows_than_inputs_the_rows_are_solved_for(centred) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y, start = (
        torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        for shape in ((30, 50), (30, 4), (4, 50))
    )
    few, summed = Sums(), Sums()
    for own, rows in ((few, (0, 12, 30)), (summed, (0, 30))):
        for first, last in pairwise(rows):
            own.add(x[:, first:last], y[:, first:last])
    summed._sum(*summed.rows.pop())  # as of many rows
    assert few.rows
    assert few.xx is None
    torch.testing.assert_close(few.means(), summed.means())
    one, two = (solve(own, start, centred=centred, damping=0.1) for own in (few, summed))
    torch.testing.assert_close(one, two)
    assert not torch.allclose(one, start)
    few.add(x[:, :21], y[:, :21])  # more than inputs now
    assert not few.rows
    assert few.count == 51
    assert solve(few, start, centred=centred, damping=0.1) is not None


@pytest.mark.parametrize(
    ("sizes", "count"),
    [([64] * 10, 2), ([64, 64, 64, 8], 2), ([64, 64, 64, 1], 2), ([5], 1), ([1, 1, 1], 1)],
)
def test_a_fifth_of_the_samples_judges_and_not_of_the_batches(sizes, count) -> None:
    assert compensating._num_judging(sizes) == count
