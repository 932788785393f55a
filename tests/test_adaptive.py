"""Gates that look at the input: the laws over random networks, and what each part does."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.adaptive.budgets import divergence
from swan_surgery.adaptive.effort import Effort
from swan_surgery.adaptive.masked import mean_of
from swan_surgery.adaptive.thresholds import (
    Losses,
    binned,
    cheapest,
    fit_reading,
    levels_at,
    mean_macs,
    thresholds_at,
)
from tests.adaptive_laws import aim_, check_adaptive_laws, randomise_statistics_
from tests.closing import image, prepared
from tests.conftest import PROFILE
from tests.random_layers import BLOCKS, randomise_
from tests.small_nets import Net, conv
from tests.strategies import Case, PartSpec, build, option_specs, simple_network


class Basic(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(width, inner, 3, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = conv(inner, width, 3, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Chain(nn.Module):
    """Three convolutions: two groups of inner channels, and a bias in the last one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(width, 8), conv(8, 6, 3, stride=1), conv(6, width)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.c(F.silu(self.norm(self.b(F.gelu(self.a(x))))))


class SmallNet(nn.Module):
    """A stem, two blocks, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6, 3)
        self.first, self.second = Basic(6, 8), Chain(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.stem(x))).mean((2, 3)))


def small_net() -> nn.Module:
    return prepared(SmallNet())


def adapted_net(**options) -> swan.AdaptiveModel:
    adapted = swan.adapt(small_net(), image(2, 3, 8, 8), **options)
    randomise_statistics_(adapted, torch.Generator().manual_seed(0))
    return adapted


def loader(count: int = 3, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [
        (
            torch.randn(size, 3, 8, 8, generator=generator).double(),
            torch.randint(4, (size,), generator=generator),
        )
        for _ in range(count)
    ]


@pytest.mark.law
@pytest.mark.slow
@settings(max_examples=500 if PROFILE == "thorough" else 8)
@given(
    st.sampled_from(sorted(BLOCKS)).flatmap(
        lambda name: st.sampled_from(option_specs(BLOCKS, name))
    ),
    st.integers(0, 2**16),
    st.sampled_from(("block", "network")),
    st.booleans(),
    st.booleans(),
)
def test_laws_over_random_networks(
    part: PartSpec,
    seed: int,
    per: str,
    is_scored: bool,
    own_readers: bool,
) -> None:
    case: Case = build(simple_network(part, seed=seed))
    check_adaptive_laws(
        case.model, case.inputs, seed, per=per, is_scored=is_scored, own_readers=own_readers
    )


@pytest.mark.parametrize(("per", "own"), [("block", True), ("block", False), ("network", True)])
def test_laws_of_a_small_network(per: str, own: bool) -> None:
    options = {"per": per, "is_scored": own, "own_readers": own}
    adapted = check_adaptive_laws(small_net(), image(2, 3, 8, 8), 3, **options)
    assert adapted is not None
    assert list(adapted.costs.blocks) == ["first", "second"]
    assert [len(group.units) for group in adapted.structure.groups] == [8, 8, 6]


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(5, 9), nn.GELU(), nn.Linear(9, 4)),
        lambda: nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 9), nn.GELU(), nn.Linear(9, 4)),
        lambda: nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 4)),
    ],
    ids=["plain", "norm before", "batch-norm"],
)
def test_laws_of_models_that_are_one_block(make) -> None:
    adapted = check_adaptive_laws(prepared(make()), image(2, 5), 0)
    assert adapted is not None
    assert list(adapted.costs.blocks) == [""]


def test_laws_with_flatten_stride_dilation_and_squeeze_excite() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grow, self.deep = conv(4, 6), nn.Conv2d(6, 6, 3, 2, 2, 2, groups=6)
            self.squeeze, self.excite = nn.Conv2d(6, 3, 1), nn.Conv2d(3, 6, 1)
            self.last = nn.Linear(6 * 9, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.deep(F.relu(self.grow(x)))
            h = h * self.excite(F.relu(self.squeeze(h.mean((2, 3), keepdim=True)))).sigmoid()
            return self.last(h.flatten(1))

    model = prepared(nn.Sequential(Odd(), nn.ReLU()))
    adapted = check_adaptive_laws(model, image(2, 4, 6, 6), 1)
    assert adapted is not None
    assert {len(group.units) for group in adapted.structure.groups} == {3, 6}


def test_a_sample_takes_a_view_of_the_weights() -> None:
    small = swan.compact(adapted_net())
    block = small.blocks()["first"]
    assert block.bound is not None
    narrow = block.bound[0].get_parameter("conv1.weight")
    whole = block.full.get_parameter("conv1.weight")
    assert narrow.shape[0] == 2
    assert narrow.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_units_stand_in_order_of_importance() -> None:
    model = small_net()
    gated = swan.swanify(model, image(2, 3, 8, 8), in_place=True)
    scores = torch.rand(gated.gates.num_units, generator=torch.Generator().manual_seed(2))
    adapted = swan.adapt(model, image(2, 3, 8, 8), scores=scores)
    group = adapted.structure.groups[0]
    order = scores[list(group.units)].argsort(descending=True)
    first = adapted.blocks()["first"].full.get_parameter("conv1.weight")
    assert torch.equal(first, model.get_parameter("first.conv1.weight")[order])


@pytest.mark.parametrize(
    ("reader", "shape"),
    [
        (nn.Conv2d(3, 5, 3, padding=1), (4, 3, 7, 6)),
        (nn.Conv2d(3, 5, (3, 2), (2, 1), padding=(0, 2), dilation=(2, 1)), (4, 3, 9, 6)),
        (nn.Conv2d(3, 5, 3, padding="same", padding_mode="reflect"), (4, 3, 5, 5)),
        (nn.Conv1d(3, 5, 4, stride=3, padding=2), (4, 3, 11)),
        (nn.Linear(3, 5), (4, 7, 3)),
    ],
)
def test_the_mean_of_the_taps_gives_the_mean_of_the_output(reader: nn.Module, shape) -> None:
    reader, x = reader.double(), image(*shape)
    mean = reader.weight.flatten(1) @ mean_of(reader, x).flatten() + reader.bias
    y = reader(x)
    wanted = (
        y.flatten(0, -2).mean(0)
        if isinstance(reader, nn.Linear)
        else y.transpose(0, 1).flatten(1).mean(1)
    )
    assert torch.allclose(mean, wanted, atol=1e-12)


def test_calibrated_means_keep_the_mean_of_what_a_block_adds() -> None:
    model = prepared(nn.Sequential(nn.Linear(5, 12), nn.GELU(), nn.Linear(12, 4)))
    adapted = swan.adapt(model, image(2, 5))
    x = image(200, 5)
    swan.calibrate_widths(adapted, [x[:120], x[120:]])
    with torch.no_grad(), adapted.holding(0):
        assert torch.allclose(adapted(x).mean(0), model(x).mean(0), atol=1e-12)


def test_calibrated_statistics_are_those_of_a_static_width() -> None:
    adapted = swan.adapt(small_net(), image(2, 3, 8, 8))
    batches = [x for x, _ in loader(1)]
    swan.calibrate_widths(adapted, batches)
    static = adapted.at(0.5)
    before = copy.deepcopy(static)
    swan.calibrate(static, batches)
    for own, other in zip(static.buffers(), before.buffers(), strict=True):
        assert torch.allclose(own, other, atol=1e-9)


@pytest.mark.parametrize("per", ["block", "network"])
def test_statistics_among_widths_at_random_are_of_all_widths(per: str) -> None:
    adapted = swan.adapt(small_net(), image(2, 3, 8, 8), per=per)
    before = {n: t.clone() for n, t in adapted.named_buffers() if "statistics" in n}
    assert swan.calibrate_widths(adapted, loader(2), among="mixed") == 2
    after = dict(adapted.named_buffers())
    moved = [n for n, t in before.items() if not torch.equal(t, after[n])]
    assert len(moved) == len([n for n in before if "tracked" not in n])


def test_what_cannot_adapt_says_why() -> None:
    adapted = swan.adapt(small_net(), image(2, 3, 8, 8))
    text = adapted.explain()
    assert "6 units stay static: they run between blocks ('first' is one)" in text
    assert "first: 8 units" in text


@pytest.mark.parametrize(
    ("run", "layers", "reason"),
    [
        (
            lambda m, x: m.block(x) + m.block(x.flip(0)),
            {"block": nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 5))},
            "runs more than once",
        ),
        (
            lambda m, x: m.block(x.reshape(-1, 5)),
            {"block": nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 5))},
            "rows that are no samples",
        ),
        (
            lambda m, x: m.b(m.norm(m.a(x))),
            {"a": nn.Linear(5, 9), "norm": nn.LayerNorm(9), "b": nn.Linear(9, 5)},
            "takes its statistics over them",
        ),
        (
            lambda m, x: m.block(x - x.mean(0)),
            {
                "block": Net(
                    lambda m, x: m.b(F.relu(m.a(x - x.mean(0)))),
                    a=nn.Linear(5, 9),
                    b=nn.Linear(9, 5),
                )
            },
            "mixes samples",
        ),
        (
            lambda m, x: m.b(torch.cat([F.relu(m.a(x)), x], -1)),
            {"a": nn.Linear(5, 9), "b": nn.Linear(14, 5)},
            "share an axis",
        ),
    ],
    ids=["twice", "rows", "statistics", "mixes", "shares"],
)
def test_nothing_adapts_where_it_would_be_wrong(run, layers, reason: str) -> None:
    model = prepared(Net(run, **layers))
    with pytest.raises(swan.NoGateableChannelsError, match=reason):
        swan.adapt(model, image(2, 3, 5))


def test_a_width_is_saved_and_loaded_as_any_cut_model(tmp_path) -> None:
    adapted = adapted_net()
    small = adapted.at(0.5)
    assert type(small) is SmallNet
    assert small.get_parameter("first.conv2.bias").shape == (6,)
    swan.save(small, tmp_path / "small.swan")
    again = swan.load(tmp_path / "small.swan", SmallNet().double())
    x = image(3, 3, 8, 8)
    assert torch.equal(again(x), small(x))


@pytest.mark.parametrize("per", ["block", "network"])
def test_an_adaptive_model_is_saved_and_loaded(tmp_path, per: str) -> None:
    adapted = adapted_net(per=per)
    aim_(adapted, torch.Generator().manual_seed(1))
    x = image(9, 3, 8, 8)
    for model in (
        adapted.eval(),
        swan.compact(adapted, execution="masked"),
        copy.deepcopy(adapted).train(),
    ):
        swan.save(model, tmp_path / "model.swan")
        again = swan.load(tmp_path / "model.swan", SmallNet().double())
        assert again.training == model.training
        assert torch.equal(again.eval()(x), model.eval()(x))
        assert (again.is_compact, again.execution) == (model.is_compact, model.execution)


def test_a_saved_adaptive_model_of_other_blocks_is_refused(tmp_path) -> None:
    adapted = adapted_net()
    swan.save(adapted, tmp_path / "model.swan")
    other = SmallNet().double()
    other.second = Basic(6, 8).double()
    with pytest.raises(swan.ArtifactError, match="another model"):
        swan.load(tmp_path / "model.swan", other)


def test_copies_compute_the_same() -> None:
    adapted = adapted_net().eval()
    aim_(adapted, torch.Generator().manual_seed(1))
    x = image(9, 3, 8, 8)
    wanted = adapted(x)
    assert torch.equal(copy.deepcopy(adapted)(x), wanted)


def test_widths_meet_the_budget_and_the_ceiling() -> None:
    adapted = swan.adapt(small_net(), image(2, 3, 8, 8))
    batches = loader()
    swan.calibrate_widths(adapted, batches)
    stats = swan.fit_widths(adapted, batches, macs=0.6, max_macs=0.8, statistics=batches)
    assert stats.mean_macs <= 0.6 * adapted.costs.dense
    assert stats.mean_macs >= 0.35 * adapted.costs.dense
    assert float(stats.macs.max()) <= 0.8 * adapted.costs.dense
    assert stats.samples == 48
    assert all(abs(sum(own) - 1) < 1e-9 for own in stats.shares.values())
    assert stats.information is not None
    told = stats.to_json()
    assert told["p95_macs"] >= told["mean_macs"] * 0.5
    assert "of the given model" in str(stats)


def test_the_ceiling_holds_for_any_widths() -> None:
    adapted = adapted_net().eval()
    aim_(adapted, torch.Generator().manual_seed(1))
    x = image(64, 3, 8, 8)
    free = adapted.taken(x).macs
    adapted.max_macs = int(free.double().quantile(0.5))
    capped = adapted.taken(x).macs
    assert int(capped.max()) <= adapted.max_macs < int(free.max())
    assert torch.equal(capped[free <= adapted.max_macs], free[free <= adapted.max_macs])


def test_a_budget_out_of_reach_says_what_can_be_reached() -> None:
    adapted = adapted_net()
    with pytest.raises(swan.BudgetError, match="narrowest widths") as caught:
        swan.fit_widths(adapted, loader(1), macs=0.01)
    assert caught.value.least == adapted.costs.least


def test_masks_that_do_not_vary_are_named() -> None:
    adapted = swan.adapt(small_net(), image(2, 3, 8, 8))
    batches = [(torch.ones(8, 3, 8, 8).double(), torch.zeros(8).long())]
    with pytest.warns(swan.SwanWarning, match="hardly vary with the input"):
        stats = swan.fit_widths(adapted, batches, macs=0.6)
    static = adapted.at(dict(stats.usual))
    with torch.no_grad():
        assert torch.allclose(static(batches[0][0]), adapted.eval()(batches[0][0]))


def test_efforts_that_tell_easy_from_hard_inputs_are_found() -> None:
    """Half of the samples need the last units of a block; a feature says which."""

    class Needs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x)

    model = Needs().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.block[0].weight[:4, 0] = 1.0
        model.block[0].weight[4:, 1] = 1.0
        model.block[2].weight[0, :4] = 1.0
        model.block[2].weight[1, 4:] = 0.5
    generator = torch.Generator().manual_seed(0)
    hard = torch.arange(200) % 3 == 0
    x = torch.rand(200, 3, generator=generator).double()
    x[:, 1] = torch.where(hard, 4.0, 0.0) * x[:, 1].clamp(min=0.5)
    adapted = swan.adapt(model, x[:2], widths=(0.5, 1.0))
    swan.calibrate_widths(adapted, [x])
    swan.fit_widths(adapted, [x], macs=0.75)
    levels = adapted.eval().taken(x).levels[:, 0]
    assert float((levels.bool() == hard).double().mean()) > 0.8
    assert levels[~hard].double().mean() < 0.3


def test_sandwich_trains_all_widths() -> None:
    adapted = swan.adapt(small_net(), image(2, 3, 8, 8)).train()
    batches = loader(1)
    optimizer = torch.optim.SGD(adapted.parameters(), 0.05)
    (x, y), losses = batches[0], []
    generator = torch.Generator().manual_seed(0)
    for step in range(30):
        loss = swan.sandwich_loss(
            adapted, lambda m: F.cross_entropy(m(x), y), step=step, generator=generator
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
    statistics = adapted.blocks()["first"].statistics[0]
    assert int(statistics.get_buffer("norm_0_num_batches_tracked")) > 0


def test_samples_of_one_batch_train_at_their_own_widths() -> None:
    adapted = adapted_net().train()
    levels = torch.tensor([0, 1, 2, 3] * 4)
    with adapted.holding(levels):
        adapted(image(16, 3, 8, 8)).sum().backward()
    assert adapted.blocks()["first"].full.get_parameter("conv1.weight").grad is not None


def test_probabilities_are_those_of_the_paper() -> None:
    effort = Effort(2, 3, like=torch.zeros((), dtype=torch.float64))
    effort.thresholds.copy_(torch.tensor([0.0, 1.0]))
    effort.temperature.fill_(0.5)
    e = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    p = effort.probabilities(e)
    assert torch.allclose(p[:, 1:], torch.sigmoid((e[:, None] - torch.tensor([0.0, 1.0])) / 0.5))
    assert torch.equal((p >= 0.5).sum(1) - 1, effort.levels(e))


def test_levels_of_bins_are_the_best_ascending_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    losses = Losses(torch.rand(4, 3, generator=generator).double(), torch.full((4,), 0.25).double())
    macs = torch.tensor([1, 2, 4])
    everything = torch.cartesian_prod(*[torch.arange(3)] * 4)
    ascending = [own for own in everything if bool((own.diff() >= 0).all())]
    for price in (0.0, 0.05, 0.2, 1.0):

        def cost(levels: Tensor, price: float = price) -> float:
            return float(
                losses.mean[torch.arange(4), levels].mean() + price * macs[levels].double().mean()
            )

        assert cost(levels_at(losses, macs, price)) == pytest.approx(min(map(cost, ascending)))


def test_the_cheapest_levels_keep_the_budget() -> None:
    efforts = torch.linspace(0, 1, 64)
    losses = binned(efforts, torch.stack([2 * efforts, efforts, 0 * efforts], 1), informed=True)
    macs = torch.tensor([10, 20, 30])
    for budget in (12.0, 18.0, 25.0):
        (levels,) = cheapest([losses], [macs], budget)
        assert budget - 3 <= mean_macs(losses, macs, levels) <= budget


def test_what_is_left_of_a_budget_goes_to_what_fits() -> None:
    """The first block would gain most per MAC, but its next width costs too much; the second one's does not."""
    one = torch.ones(1, dtype=torch.float64)
    losses = [Losses(torch.tensor([[9.0, 0.0]]), one), Losses(torch.tensor([[1.0, 0.5]]), one)]
    macs = [torch.tensor([0, 10]), torch.tensor([0, 4])]
    assert [own.tolist() for own in cheapest(losses, macs, 9.0)] == [[0], [1]]
    assert [own.tolist() for own in cheapest(losses, macs, 13.0)] == [[1], [0]]
    assert [own.tolist() for own in cheapest(losses, macs, 14.0)] == [[1], [1]]
    worse = [losses[0], Losses(torch.tensor([[0.5, 1.0]]), one)]
    assert [own.tolist() for own in cheapest(worse, macs, 9.0)] == [[0], [0]]  # no gain, no MACs


def test_a_reading_is_found_where_there_is_one_and_none_where_there_is_not() -> None:
    x = image(200, 4)
    reading = fit_reading(x, 2 * x[:, 1] - x[:, 3] + 1)
    assert reading.explained > 0.9
    assert float(reading.weight[1]) == pytest.approx(2, abs=0.2)
    noise = torch.randn(200, generator=torch.Generator().manual_seed(9)).double()
    assert fit_reading(x[:, :1] * 0 + 1, noise).explained == pytest.approx(0, abs=0.02)


def test_thresholds_split_as_asked_for() -> None:
    efforts = image(100)
    found = thresholds_at(efforts, torch.tensor([0.0, 0.3, 1.0]))
    assert found[0] == -torch.inf
    assert int((efforts < found[1]).sum()) == 30
    assert found[2] == torch.inf


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: swan.adapt(small_net(), image(2, 3, 8, 8), structure="other"),
            swan.InputError,
            "structure",
        ),
        (
            lambda: swan.adapt(small_net(), image(2, 3, 8, 8), per="layer"),
            swan.InputError,
            "per must",
        ),
        (
            lambda: swan.adapt(small_net(), image(2, 3, 8, 8), widths=(0.5,)),
            swan.InputError,
            "ascend",
        ),
        (
            lambda: swan.adapt(small_net(), image(2, 3, 8, 8), scores=torch.ones(3)),
            swan.InputError,
            "one per unit",
        ),
        (lambda: adapted_net().at(0.3), swan.InputError, "none of"),
        (lambda: adapted_net().at({"first": 0.5}), swan.InputError, "every block"),
        (lambda: adapted_net().holding(7).__enter__(), swan.InputError, "level 7"),
        (lambda: adapted_net().holding({"x": 0}).__enter__(), swan.InputError, "no adaptive block"),
        (
            lambda: adapted_net().holding(torch.tensor([0.5])).__enter__(),
            swan.InputError,
            "whole numbers",
        ),
        (
            lambda: adapted_net().holding(torch.zeros(2, 3).long()).__enter__(),
            swan.InputError,
            "one for each",
        ),
        (lambda: swan.adapt(adapted_net()), swan.ModelError, "adaptive already"),
        (lambda: swan.compact(small_net()), swan.ModelError, "swan.adapt"),
        (lambda: swan.compact(adapted_net(), execution="gather"), swan.InputError, "execution"),
        (lambda: swan.calibrate_widths(adapted_net(), []), swan.InputError, "no batch"),
        (
            lambda: swan.calibrate_widths(
                adapted_net(), [torch.full((2, 3, 8, 8), torch.nan).double()]
            ),
            swan.InputError,
            "NaN",
        ),
        (
            lambda: swan.calibrate_widths(swan.compact(adapted_net()), loader(1)),
            swan.ModelError,
            "compact",
        ),
        (lambda: swan.fit_widths(adapted_net(), loader(1), macs=2), swan.InputError, "share"),
        (lambda: swan.fit_widths(adapted_net(), [], macs=0.9), swan.InputError, "no batch"),
        (lambda: swan.width_stats(adapted_net(), []), swan.InputError, "no batch"),
        (
            lambda: swan.sandwich_loss(adapted_net(), lambda m: m, step=-1),
            swan.InputError,
            "counts from 0",
        ),
    ],
    ids=map(str, range(20)),
)
def test_refusals_say_what_to_do(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_levels_of_another_batch_are_refused() -> None:
    adapted = adapted_net()
    with (
        adapted.holding(torch.zeros(3).long()),
        pytest.raises(swan.ModelError, match="3 levels for the 2"),
    ):
        adapted(image(2, 3, 8, 8))


def test_a_gated_model_adapts_in_the_order_of_its_gates() -> None:
    model = small_net()
    gated = swan.swanify(model, image(2, 3, 8, 8), in_place=True)
    with torch.no_grad():
        gated.gates.logits.copy_(torch.linspace(-2, 2, gated.gates.num_units))
    adapted = swan.adapt(gated)
    first = adapted.blocks()["first"].full.get_parameter("conv1.weight")
    units = adapted.structure.groups[0].units
    order = gated.gates.logits[list(units)].argsort(descending=True)
    assert torch.equal(first, model.get_parameter("first.conv1.weight")[order])


@pytest.mark.thorough
def test_the_masked_model_exports_and_says_what_torch_says(tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    model = SmallNet()
    randomise_(model, torch.Generator().manual_seed(0))
    adapted = swan.adapt(model.eval(), torch.randn(2, 3, 8, 8))
    randomise_statistics_(adapted, torch.Generator().manual_seed(0))
    x = torch.randn(6, 3, 8, 8)
    aim_(adapted, torch.Generator().manual_seed(1))
    for name, efforts in adapted.taken(x).efforts.items():
        looks: Any = adapted.blocks()[name].effort
        looks.thresholds.copy_(efforts.detach().quantile(torch.tensor([0.3, 0.5, 0.7])))
    small = swan.compact(adapted, execution="masked")
    assert len(set(small.taken(x).levels.flatten().tolist())) > 1
    exported = swan.export(small, tmp_path / "masked.onnx", x)
    assert exported.relative_error < 1e-4


class SqueezeExcite(nn.Module):
    """An inverted bottleneck whose channels a small MLP scales."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.expand, self.project = conv(width, inner), conv(inner, width)
        self.scale = nn.Sequential(conv(inner, 3), nn.ReLU(), conv(3, inner), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.expand(x))
        return x + self.project(h * self.scale(h.mean((2, 3), keepdim=True)))


def test_what_costs_adapts_and_not_the_little_mlp_inside() -> None:
    model = prepared(nn.Sequential(conv(3, 6, 3), SqueezeExcite(6, 24), conv(6, 6, 3)))
    adapted = swan.adapt(model, image(2, 3, 8, 8))
    assert [group.block for group in adapted.structure.groups] == ["1"]
    assert adapted.costs.least < 0.8 * adapted.costs.dense
    (reason,) = [s.reason for s in adapted.structure.static if s.layers == ("1.scale.0",)]
    assert "cost little beside" in reason
    check_adaptive_laws(model, image(2, 3, 8, 8), 0)
    swapped = swan.swap_activations(small_net(), "fles", image(2, 3, 8, 8))
    assert next(g.block for g in swan.adapt(swapped, image(2, 3, 8, 8)).structure.groups) == "first"


@pytest.mark.parametrize("way", ["group", "masked"])
def test_an_empty_batch_comes_out_empty(way) -> None:
    adapted = adapted_net().eval()
    aim_(adapted, torch.Generator().manual_seed(0))
    adapted.execution = way
    assert adapted(image(2, 3, 8, 8)[:0]).shape == (0, 4)


def test_few_samples_give_efforts_that_are_numbers() -> None:
    adapted = adapted_net().eval()
    with pytest.warns(swan.SwanWarning, match="hardly vary"):
        swan.fit_widths(adapted, [image(1, 3, 8, 8)], macs=0.8)
    assert all(bool(p.isfinite().all()) for p in adapted.parameters())


def test_a_block_that_gets_other_arguments_is_refused() -> None:
    """With no factor in the example inputs, nobody knows that it holds a row per sample."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            h = self.b(F.relu(self.a(x)))
            return x + (h if scale is None else h * scale)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = Scaled(), nn.Linear(4, 3)

        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            return self.head(self.block(x, scale))

    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double()
    adapted = swan.adapt(Outer().double(), x).eval()
    with adapted.holding(torch.tensor([0, 1, 2, 3])):
        adapted(x)
        with pytest.raises(swan.PathError, match="other arguments"):
            adapted(x, x[:, :1])


def test_a_block_outside_of_its_model_is_refused() -> None:
    """It took the widths that another batch had taken before."""
    adapted, x = adapted_net().train(), image(2, 3, 8, 8)
    with adapted.holding(torch.tensor([0, 3])):
        adapted(x)
    with pytest.raises(swan.ModelError, match="outside of its adaptive model"):
        adapted.model(x.flip(0))


def test_checkpointing_in_a_sandwich_is_refused() -> None:
    class Checkpointed(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in (self.first, self.second):
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            return self.head(x.mean((2, 3)))

    adapted = swan.adapt(prepared(Checkpointed()), image(2, 3, 8, 8))
    with adapted.holding(0):
        adapted(image(2, 3, 8, 8)).sum().backward()
    loss = swan.sandwich_loss(adapted, lambda m: m(image(2, 3, 8, 8)).sum(), step=0)
    with pytest.raises(swan.ModelError, match="checkpointing"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:widths hardly vary")
def test_a_fit_that_fails_changes_nothing() -> None:
    adapted = adapted_net().eval()
    swan.fit_widths(adapted, loader(2), macs=0.8, max_macs=0.9)
    state = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    bad = [torch.full((4, 3, 8, 8), torch.nan).double()]
    with pytest.raises(swan.InputError, match="NaN"):
        swan.fit_widths(adapted, loader(2), macs=0.7, max_macs=0.75, statistics=bad)
    assert adapted.max_macs == int(0.9 * adapted.costs.dense)
    assert all(torch.equal(t, state[name]) for name, t in adapted.state_dict().items())


def test_one_sample_alone_in_train_mode_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(3, 4)
    adapted = swan.adapt(model, x).train()
    with (
        adapted.holding(torch.tensor([0, 1, 1])),
        pytest.raises(swan.InputError, match="need two"),
    ):
        adapted(x)


def test_a_ceiling_below_the_narrowest_widths_is_refused() -> None:
    adapted = adapted_net().eval()
    adapted.max_macs = adapted.costs.least - 1
    with pytest.raises(swan.InputError, match="max_macs"):
        adapted(image(2, 3, 8, 8))


@pytest.mark.parametrize("levels", [0.5, "a", None, [0, 1], torch.zeros(2, dtype=torch.bool)])
def test_levels_are_whole_numbers(levels) -> None:
    with pytest.raises(swan.InputError, match="whole numbers"), adapted_net().holding(levels):
        pass


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: adapted_net(widths=3), "widths"),
        (lambda: adapted_net(widths=("a", 1)), "widths"),
        (lambda: adapted_net(scores=[1.0]), "scores"),
        (lambda: swan.adapt(small_net(), image(2, 3, 8, 8)[:0]), "no samples"),
        (lambda: swan.calibrate_widths(adapted_net(), loader(1), among="each"), "among"),
        (lambda: swan.calibrate_widths(adapted_net(), loader(1), num_batches=-1), "num_batches"),
        (lambda: swan.calibrate_widths(adapted_net(), [3]), "a batch is a tensor"),
        (lambda: swan.width_stats(adapted_net(), [image(2, 3, 8, 8)[:0]]), "no samples"),
        (lambda: swan.width_stats(adapted_net(), 3), "loader"),
        (lambda: swan.fit_widths(adapted_net(), loader(1), macs="half"), "share"),
        (lambda: swan.fit_widths(adapted_net(), loader(1), macs=0.8, statistics=[]), "no batch"),
        (
            lambda: swan.fit_widths(
                adapted_net(), loader(1), macs=0.8, distance=lambda a, b: (a - b).square()
            ),
            "one number per sample",
        ),
        (
            lambda: swan.fit_widths(
                adapted_net(), loader(1), macs=0.8, distance=lambda a, b: (a - b)[:1, 0] ** 2
            ),
            "numbers for",
        ),
    ],
    ids=map(str, range(13)),
)
def test_bad_input_is_refused_by_name(call, message: str) -> None:
    with pytest.raises(swan.InputError, match=message):
        call()


@pytest.mark.filterwarnings("ignore:widths hardly vary")
@pytest.mark.parametrize("structure", ["nested", "free"])
def test_models_of_one_number_keep_their_budget(structure) -> None:
    """The softmax of one class is 1 whatever it is, so that nothing seemed to matter."""

    class Number(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 1)

    with torch.inference_mode():
        adapted = swan.adapt(prepared(Number()), image(2, 3, 8, 8), structure=structure).eval()
        batches = [x for x, _ in loader(2)]
        swan.calibrate_widths(adapted, batches)
        swan.fit_widths(adapted, batches, macs=0.7)
    share = float(adapted.taken(torch.cat(batches)).macs.double().mean()) / adapted.costs.dense
    assert 0.5 < share <= 0.7


def test_the_distance_of_one_number_is_its_own() -> None:
    one, other = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [5.0]])
    assert divergence(one, other).tolist() == [0.0, 4.5]
