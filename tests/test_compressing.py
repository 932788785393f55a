"""One call from a model to a smaller model: without labels, in stages, with training of one's own."""

import pytest
import torch
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.compressing.cutter import Budget, Choice, Cutter
from swan_surgery.compressing.own_outputs import Sensitivity, unlikeness
from swan_surgery.costs.latency_table import LatencyTable, MultipleLatency


class TwoHeads(nn.Module):
    """Returns a map and a vector of other sizes, and takes keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU())
        self.more = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.pixels, self.score = nn.Conv2d(16, 2, 1), nn.Linear(16, 1)

    def forward(self, image: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        x = self.more(self.trunk(image)) * scale
        return {"pixels": 100 * self.pixels(x), "score": self.score(x.mean((2, 3)))}


def _mlp(width: int = 32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
    )


def _data(count: int = 4) -> list[Tensor]:
    return list(torch.randn(count, 64, 8))


def _error(model: nn.Module, other: nn.Module, data: list[Tensor]) -> float:
    with torch.no_grad():
        return float(sum(unlikeness(model, other, x) for x in data)) / len(data)


def test_the_given_model_stays_and_the_small_one_keeps_the_budget() -> None:
    net = _mlp().train()
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    done = swan.compress(net, _data(), macs=0.5, progress=False)
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in state.items())
    assert net.training
    assert done.model.training
    example = torch.zeros(1, 8)
    assert 0.45 < swan.count_macs(done.model, example) / swan.count_macs(net, example) <= 0.5
    assert "cut to 0." in str(done)
    assert done.report().after.macs == swan.count_macs(done.model, example)
    assert repr(done).startswith("Compressed(Sequential: cut to 0.")
    assert "<li>cut to 0." in done._repr_html_()


def test_a_number_of_macs_is_of_one_sample_or_of_the_inputs_given() -> None:
    net, one = _mlp(64), torch.zeros(1, 8)
    half = swan.count_macs(net, one) // 2
    assert half > 1000
    for example, times in ((None, 1), (torch.zeros(3, 8), 3)):
        done = swan.compress(
            net, _data(), macs=times * half, round_to=1, example_inputs=example, progress=False
        )
        assert 0.45 < swan.count_macs(done.model, one) / swan.count_macs(net, one) <= 0.5


def test_a_budget_that_is_no_number_is_refused() -> None:
    with pytest.raises(swan.InputError, match="got '50%'"):
        swan.compress(_mlp(), _data(), macs="50%", progress=False)


def test_widths_are_multiples_by_default_and_that_is_told() -> None:
    net = _mlp()
    done = swan.compress(net, _data(), macs=0.45, progress=False)
    widths = [done.model[0].out_features, done.model[2].out_features]
    assert [width % 8 for width in widths] == [0, 0]
    assert "by fisher scores, in multiples of 8 channels" in done.steps[0]
    plain = swan.compress(net, _data(), macs=0.45, round_to=1, progress=False)
    assert "multiples" not in plain.steps[0]


def test_a_runtime_that_is_named_is_measured(monkeypatch) -> None:
    asked = []

    def table(gated, runtime):
        asked.append(runtime)
        layers, multiples = (), (MultipleLatency(4, 0.5, 1.0), MultipleLatency(8, 0.5, 2.0))
        return LatencyTable(layers, 0.0, "cpu", 1, "", "", 1, multiples, runtime)

    monkeypatch.setattr("swan_surgery.compressing.cutter.measure_latency_table", table)
    done = swan.compress(_mlp(), _data(), macs=0.6, runtime="onnxruntime", progress=False)
    assert asked == ["onnxruntime"]
    assert "in multiples of 4 channels" in done.steps[0]
    swan.compress(_mlp(), _data(), macs=0.6, progress=False)
    assert len(asked) == 1


def test_nearer_to_the_model_than_a_cut_without_compensation_or_by_chance() -> None:
    net, data = _mlp(), _data()
    gated = swan.swanify(net, data[0])
    drawn = swan.importance(gated, "random", generator=torch.Generator().manual_seed(0))
    scored = swan.importance(gated, "fisher", batches=data, loss=Sensitivity())
    by_chance, plain = (swan.prune_by_score(gated, own, macs=0.5) for own in (drawn, scored))
    small = swan.compress(net, data, macs=0.5, progress=False).model
    fresh = list(torch.randn(4, 64, 8))
    assert _error(small, net, fresh) < _error(plain, net, fresh) < _error(by_chance, net, fresh)


def test_scores_without_labels_see_every_output_alike() -> None:
    """A hundred times larger map does not drown the other output."""
    torch.manual_seed(0)
    net = TwoHeads()
    with torch.no_grad():
        net.pixels.weight[:, :8] = 0  # the map reads the last eight channels alone
        net.score.weight[:, 8:] = 0
    data = [{"image": torch.randn(16, 3, 8, 8)} for _ in range(4)]
    gated = swan.swanify(net, data[0])
    scores = swan.importance(gated, "fisher", batches=data, loss=Sensitivity())
    last = torch.tensor(
        next(t.units for t in gated.channels.tensors if t.tensor == "more.0.weight")
    )
    of_score, of_map = scores[last[:8]], scores[last[8:]]
    assert float(of_score.min()) > 0.01 * float(of_map.mean())


def test_a_loss_that_the_model_computes_along_is_no_output() -> None:
    class WithLoss(nn.Sequential):
        def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            y = super().forward(x)
            return nn.functional.cross_entropy(y, labels), y

    net, x = WithLoss(*_mlp()), torch.randn(16, 8)
    one, two = ({"x": x, "labels": torch.full((16,), label)} for label in (0, 3))
    found = [Sensitivity()(net, batch) for batch in (one, two)]
    assert torch.equal(found[0], found[1])


def test_several_outputs_by_name_and_training_toward_them() -> None:
    torch.manual_seed(0)
    net = TwoHeads()
    data = [{"image": torch.randn(8, 3, 8, 8), "scale": 0.5} for _ in range(4)]
    bare = swan.compress(net, data, macs=0.4, progress=False)
    done = swan.compress(net, data, macs=0.4, finetune=60, lr=3e-3, progress=False)
    found, before = (
        sum(float(unlikeness(m, net, b).detach()) for b in data) for m in (done.model, bare.model)
    )
    assert found < before
    assert set(done.model(**data[0])) == {"pixels", "score"}


def test_little_is_cut_in_stages_with_training_between() -> None:
    net, seen = _mlp(), []

    def finetune(model: nn.Module, steps: range) -> None:
        seen.append((steps, swan.count_macs(model, torch.zeros(1, 8))))

    done = swan.compress(net, _data(), macs=0.1, finetune=finetune, steps=100, progress=False)
    whole = swan.count_macs(net, torch.zeros(1, 8))
    assert [own for own, _ in seen] == [range(10), range(10, 20), range(20, 100)]
    shares = [macs / whole for _, macs in seen]
    assert all(have <= want for have, want in zip(shares, (0.465, 0.216, 0.1), strict=True))
    assert shares == sorted(shares, reverse=True)
    assert len(done.compensations) == 3
    seen.clear()
    swan.compress(net, _data(), macs=0.5, finetune=finetune, steps=100, progress=False)
    assert [own for own, _ in seen] == [range(100)]


def test_a_loss_of_ones_own_scores_and_trains() -> None:
    net = _mlp()
    torch.manual_seed(1)
    data = [(x, torch.randint(4, (64,))) for x in _data()]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def of(model: nn.Module) -> float:
        with torch.no_grad():
            return float(sum(loss(model, batch) for batch in data))

    bare = swan.compress(net, data, macs=0.5, loss=loss, progress=False)
    done = swan.compress(net, data, macs=0.5, loss=loss, finetune=80, lr=1e-2, progress=False)
    assert of(done.model) < of(bare.model)


def test_a_budget_of_milliseconds_is_measured_and_parameters_are_kept() -> None:
    net = _mlp()
    by_params = swan.compress(net, _data(), params=0.4, progress=False).model
    assert 0.35 < swan.count_params(by_params) / swan.count_params(net) <= 0.4
    done = swan.compress(net, _data(), latency_ms=1e6, round_to=1, progress=False)
    assert swan.count_params(done.model) == swan.count_params(net)
    with pytest.raises(swan.BudgetError) as refused:
        swan.compress(net, _data(), latency_ms=1e-9, progress=False)
    assert refused.value.unit == "ms"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "say how small"),
        ({"macs": 1.5}, "from 1,000 on; got 1.5"),
        ({"macs": 0.5, "finetune": -1}, "not be negative"),
        ({"macs": 0.5, "finetune": lambda _m, _s: None}, "how many steps"),
        ({"macs": 0.5, "steps": 5}, "finetune=1000 alone"),
        ({"macs": 0.5, "cuts": 3}, "cuts=3 needs training in between"),
        ({"macs": 1e-6}, "cannot be reached"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is(
    given: dict[str, object], message: str
) -> None:
    with pytest.raises(swan.SwanError, match=message):
        swan.compress(_mlp(), _data(), progress=False, **given)


def test_an_iterator_serves_a_cut_but_no_training() -> None:
    swan.compress(_mlp(), iter(_data()), macs=0.5, progress=False)
    with pytest.raises(swan.InputError, match="no iterator"):
        swan.compress(_mlp(), iter(_data()), macs=0.5, finetune=10, progress=False)
    with pytest.raises(swan.InputError, match="no batch"):
        swan.compress(_mlp(), [], macs=0.5, progress=False)
    with pytest.raises(swan.InputError, match=r"for a single batch pass \[batch\]"):
        swan.compress(_mlp(), torch.randn(64, 8), macs=0.5, progress=False)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 24), nn.Linear(5, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head((self.first(x) + self.second(y)).relu())


def test_several_inputs_are_given_by_name() -> None:
    batches = [{"x": torch.randn(16, 6), "y": torch.randn(16, 5)} for _ in range(2)]
    small = swan.compress(TwoInputs(), batches, macs=0.5, progress=False).model
    assert small.first.out_features < 24
    with pytest.raises(swan.InputError, match=r"argument: 'y'.* a tuple .* a dict of keyword"):
        swan.compress(TwoInputs(), [tuple(batches[0].values())], macs=0.5, progress=False)


def test_a_batch_that_begins_with_a_list() -> None:
    """As a detector's: images of several sizes, and targets."""

    class OfImages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1))

        def forward(self, images: list[Tensor]) -> Tensor:
            return torch.stack([self.net(image).mean((1, 2)) for image in images])

    images = [torch.randn(3, 8, 8), torch.randn(3, 10, 8)]
    small = swan.compress(OfImages(), [(images, None)], macs=0.5, progress=False).model
    assert small.net[0].out_channels < 16


def test_outputs_without_numbers_ask_for_a_loss() -> None:
    class Picks(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(-1)

    net = Picks(*_mlp())
    with pytest.raises(swan.InputError, match="pass a loss"):
        swan.compress(net, _data(), macs=0.5, progress=False)


def test_progress_goes_to_stderr_alone(capfd: pytest.CaptureFixture[str]) -> None:
    swan.compress(_mlp(), _data(), macs=0.5, finetune=2)
    assert capfd.readouterr().out == ""


def test_floors_stay_those_of_the_given_model_cut_by_cut() -> None:
    net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    with torch.no_grad():
        net[0].weight[4:].zero_()  # 60 units say nothing: each cut would take all it may
        net[0].bias[4:].zero_()
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    choice = Choice("self", "fisher", (), 1, min_width={"0": 0.25, "2": 7})
    cutter = Cutter(net, x[:1], [x], Budget(0.15, None, None), choice, lambda _text, _share: None)
    small = cutter.cut(cutter.cut(net, 0.5), 1.0)
    assert small[0].out_features == 16
    assert small[2].out_features >= 7
