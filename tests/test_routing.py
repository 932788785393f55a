"""Switch layers: the parts are the model, batches are split and put together, closed channels are cut."""

import copy
import warnings
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import swan_surgery as swan
from swan_surgery.routing.costs import routed_costs
from tests.fingerprints import assert_same_fingerprint, fingerprint
from tests.strategies import Case, networks


def leaves(output: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def error(one: object, two: object) -> float:
    pairs = zip(leaves(one), leaves(two), strict=True)
    return max(float(((a - b).abs().max() / (b.abs().max() + 1e-30)).detach()) for a, b in pairs)


def same(one: object, two: object) -> bool:
    return all(map(torch.equal, leaves(one), leaves(two)))


def frozen(model: nn.Module) -> nn.Module:
    """Torch takes other kernels for attention whose weights ask for no gradient."""
    return copy.deepcopy(model).requires_grad_(False)


def one_by_one(model: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of every sample by itself."""
    alone = [leaves(model(*[x[i : i + 1] for x in inputs])) for i in range(len(inputs[0]))]
    return [torch.cat(own) for own in zip(*alone, strict=True)]


def shaken_(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.2).add_(0.05)


def halfway_(routed: swan.RoutedModel, *inputs: Tensor) -> None:
    """A threshold between two scores, so that rounding does not decide."""
    with torch.no_grad(), routed.acting() as parts:
        crossing = parts.trunk(*inputs)
        scores = routed.score(parts, 0, crossing)[0].sort().values
    middle = len(scores) // 2
    routed.thresholds = [float(scores[middle - 1 : middle + 1].mean())]


def plain() -> nn.Module:
    return (
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
        ).double().eval()
    )  # fmt: skip


class Block(nn.Module):
    """Python decides on values, so that torch.fx cannot trace it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(width, 10, 3, padding=1), nn.BatchNorm2d(10)
        self.two = nn.Conv2d(10, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.two(F.relu(self.norm(self.one(x)))))


class Loop(nn.Module):
    """Its own code runs, in both halves."""

    def __init__(self, *, skip: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.ModuleList([Block(6) for _ in range(3)])
        self.head = nn.Linear(6, 4)
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        first = h = self.stem(x)
        if h.mean() > 1e9:
            h = h * 2
        for block in self.blocks:
            h = block(h)
        if self.skip:
            h = h + first
        return self.head(h.mean((2, 3)))


def images(count: int = 6, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 8, 8, dtype=torch.float64, generator=generator)


@pytest.mark.law
@settings(max_examples=settings.default.max_examples // 2)
@given(networks())
def test_parts_are_the_model_and_a_split_batch_is_its_samples(case: Case) -> None:
    before = fingerprint(case.model)
    try:
        routed = swan.add_switch(
            case.model, "blocks.0", example_inputs=case.inputs, light=1.0, decide="predicted"
        )
    except swan.InputError as err:
        told = str(err)
        assert any(
            why in told for why in ("is read behind it", "batch on the first axis", "mixes samples")
        )
        return
    finally:
        assert_same_fingerprint(before, fingerprint(case.model))
    with torch.no_grad():
        assert same(routed(*case.inputs), frozen(case.model)(*case.inputs))
        shaken_(routed.parts.light)
        more = [torch.cat([x, 0.5 * x.flip(0), x + 1]) for x in case.inputs]
        halfway_(routed, *more)
        if routed.thresholds[0] in routed.parts.switch(routed.parts.trunk(*more)):
            return  # all alike
        together = routed(*more)
        crossing = routed.parts.trunk(*more)
        is_easy = routed.parts.switch(crossing) <= routed.thresholds[0]
        ways = zip(
            leaves(routed.parts.light(crossing)), leaves(routed.parts.full(crossing)), strict=True
        )
        rows = [torch.cat([a[is_easy], b[~is_easy]]) for a, b in ways]
        order = torch.cat([is_easy.nonzero()[:, 0], is_easy.logical_not().nonzero()[:, 0]])
        assert error([own[order] for own in leaves(together)], rows) <= 1e-9
        if (
            error(one_by_one(case.model, more), case.model(*more)) <= 1e-9
        ):  # else the trunk mixes them
            assert error(together, one_by_one(routed, more)) <= 1e-9


@pytest.mark.law
@settings(max_examples=max(2, settings.default.max_examples // 8))
@given(networks(), st.integers(0, 1000))
def test_a_closed_mask_is_cut(case: Case, seed: int) -> None:
    try:
        routed = swan.add_switch(
            case.model,
            "blocks.0",
            example_inputs=case.inputs,
            light=1.0,
            mask=True,
            decide="predicted",
        )
    except (swan.InputError, swan.NoGateableChannelsError):
        return
    logits = routed.gated.gates.logits
    closed = torch.rand(len(logits), generator=torch.Generator().manual_seed(seed)) < 0.4
    with torch.no_grad():
        assert error(routed(*case.inputs), case.model(*case.inputs)) <= 1e-9
        logits[closed] = -3.0
        more = [torch.cat([x, 0.5 * x.flip(0), x + 1]) for x in case.inputs]
        halfway_(routed, *more)
        small = swan.cut_mask(routed)
        assert error(small(*more), routed(*more)) <= 1e-9
    assert small.crossing_bytes() <= routed.crossing_bytes()


def test_a_mask_closes_what_crosses_and_nothing_else() -> None:
    model = plain()
    routed = swan.add_switch(model, "2", example_inputs=images(), light=0.5, mask=True)
    assert routed.gated.gates.num_units == 8
    with torch.no_grad():
        routed.gated.gates.logits[:3] = -3.0
    small = swan.cut_mask(routed)
    assert routed.crossing_bytes() == (8 * 64 * 8,)
    assert small.crossing_bytes() == (5 * 64 * 8,)
    assert small.parts.trunk.get_submodule("0").out_channels == 5
    assert small.parts.light.get_submodule("3").in_channels == 5
    assert small.parts.last.get_submodule("3").in_channels == 5
    routed.train()
    loss = routed.loss(images(), beta=1.0)
    loss.backward()
    assert routed.gated.gates.logits.grad is not None


def test_code_that_cannot_be_traced_is_cut_as_it_runs() -> None:
    model = Loop().double().eval()
    routed = swan.add_switch(model, "blocks.0", example_inputs=images(), light=0.5)
    assert "as it runs" in routed.way[0]
    with torch.no_grad():
        assert torch.equal(routed(images()), frozen(model)(images()))
        halfway_(routed, images())
        alone = torch.cat([routed(x) for x in images().split(1)])
        assert error(routed(images()), alone) <= 1e-9
    costs = routed_costs(routed)
    assert costs.given == swan.count_macs(model, images(1))
    assert swan.count_params(routed.parts.last) < swan.count_params(model)
    with pytest.raises(swan.InputError, match="inputs of the example's size"):
        routed(torch.zeros(2, 3, 9, 9, dtype=torch.float64))


def test_what_else_crosses_is_named() -> None:
    with pytest.raises(swan.InputError, match="'stem' is read behind it"):
        swan.add_switch(Loop(skip=True).double(), "blocks.0", example_inputs=images())


class BatchStatistics(nn.Sequential):
    """A batch-norm without running statistics, which mixes samples in every mode."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(4, 6),
            nn.ReLU(),
            nn.BatchNorm1d(6, track_running_stats=False),
            nn.Linear(6, 3),
        )


def test_samples_are_independent_behind_a_switch() -> None:
    """The full branch gave other outputs for a part of the batch, in silence."""
    model, x = BatchStatistics().eval(), torch.randn(6, 4)
    with pytest.raises(swan.InputError, match="behind '0' mixes samples"):
        swan.add_switch(model, "0", example_inputs=x, light=0.5)
    behind = swan.add_switch(model, "2", example_inputs=x, light=1.0)
    assert torch.equal(behind(x), frozen(model)(x))
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    light = nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3))
    with pytest.raises(swan.InputError, match="the light branch mixes samples"):
        swan.add_switch(net, "1", example_inputs=x, light=light)


def test_a_branch_that_draws_at_random_is_not_taken_for_one_that_mixes() -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x)

    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), Noise(), nn.Linear(6, 3)).eval()
    light = nn.Sequential(Noise(), nn.Linear(6, 3))
    routed = swan.add_switch(model, "0", example_inputs=torch.randn(6, 4), light=light)
    assert routed(torch.randn(6, 4)).shape == (6, 3)


def test_gradients_are_those_of_the_samples() -> None:
    routed = swan.add_switch(plain(), "2", example_inputs=images(), light=0.5, frozen=False)
    halfway_(routed, images())
    routed(images()).square().sum().backward()
    together = [p.grad.clone() for p in routed.parts.light.parameters()]
    routed.zero_grad()
    sum(routed(x).square().sum() for x in images().split(1)).backward()
    for one, two in zip(together, routed.parts.light.parameters(), strict=True):
        torch.testing.assert_close(one, two.grad)


def test_nested_switches() -> None:
    model = nn.Sequential(
        *[m for i in range(3) for m in (nn.Conv2d(8 if i else 3, 8, 3, padding=1), nn.ReLU())],
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).double()  # fmt: skip
    routed = swan.add_switch(model.eval(), ["1", "3"], example_inputs=images(), light=[0.5, 0.7])
    x, labels = images(400), model(images(400)).argmax(1)
    assert torch.equal(routed(x), frozen(model)(x))
    for level, thresholds in enumerate(([float("inf")] * 2, [float("-inf"), float("inf")])):
        routed.thresholds = thresholds
        crossing = routed.parts.trunk(x)
        own = routed.parts.chain[level]
        wanted = own.light(crossing if level == 0 else own.trunk(crossing))
        assert torch.equal(routed(x), wanted)
    found = swan.calibrate_switch(routed, [(x, labels)], macs=0.8)
    assert found.macs <= 0.8 + 1e-9
    assert len(found.shares) == 3
    alone = torch.cat([routed(part) for part in x.split(7)])
    assert error(routed(x), alone) <= 1e-9
    fronts = routed.split()
    h, _ = fronts[0].front(x)
    h, _ = fronts[1].front(h)
    assert torch.equal(fronts[1].full(h), frozen(model)(x))


def test_costs_with_shares() -> None:
    model = plain()
    routed = swan.add_switch(model, "2", example_inputs=images(), light=0.5)
    costs = routed_costs(routed, ["predicted"])
    assert costs.given == swan.count_macs(model, images(1))
    trunk, switch, light = costs.trunks[0], costs.switches[0], costs.lights[0]
    assert costs.worst == trunk + switch + costs.full
    assert costs.expected([0.25]) == trunk + switch + 0.25 * light + 0.75 * costs.full
    assert routed_costs(routed, ["margin"]).expected([0.25]) == trunk + light + 0.75 * costs.full
    assert swan.count_macs(routed, images(1)) == trunk + costs.full  # no threshold: nothing looks
    routed.thresholds = [-1.0]  # by the margin, nothing leaves
    assert swan.count_macs(routed, images(1)) == trunk + light + costs.full


def test_training_brings_the_light_branch_and_the_switch_nearer() -> None:
    torch.manual_seed(0)
    model = plain().float()
    x = images(256).float() * torch.linspace(0.2, 3, 256).view(-1, 1, 1, 1)
    routed = swan.add_switch(model, "2", example_inputs=x[:4], light=0.3, discrepancy="l2").train()
    assert not routed.parts.trunk.training
    before = {name: own.clone() for name, own in routed.parts.last.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in routed.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(60):
        loss = routed.loss(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(own, before[n]) for n, own in routed.parts.last.state_dict().items())
    with torch.no_grad():
        full, (light,), (predicted,) = routed.eval().parts(x)
        apart = routed.discrepancies(light, full)
    assert torch.corrcoef(torch.stack([predicted, apart]))[0, 1] > 0.5


def test_compensation_and_fisher_scores_with_data() -> None:
    model = plain()
    data = list(images(256).split(64))
    one = swan.add_switch(model, "2", example_inputs=images(), light=0.4)
    two = swan.add_switch(model, "2", example_inputs=images(), light=0.4, batches=data)
    fresh, wanted = images(100, seed=5), model(images(100, seed=5))
    for routed in (one, two):
        routed.thresholds = [float("inf")]
    assert (two(fresh) - wanted).square().mean() < (one(fresh) - wanted).square().mean()


def test_gated_compression_stops_negatives() -> None:
    torch.manual_seed(0)
    model = plain().float()
    labels = torch.randint(0, 2, (600,))
    x = torch.randn(600, 3, 8, 8) * 0.3 + labels.view(-1, 1, 1, 1)
    default = torch.tensor([9.0, 0, 0, 0, 0])
    routed = swan.add_switch(
        model, "2", example_inputs=x[:4], light=None, default=default, positive=lambda y: y > 0
    )
    optimizer = torch.optim.Adam(routed.parts.switch.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        routed.loss((x[:300], labels[:300])).backward()
        optimizer.step()
    found = swan.calibrate_switch(routed.eval(), [(x[300:], labels[300:])], harm=0.02)
    assert found.decide == ("label",)
    assert found.shares[0] > 0.35
    assert found.bound <= 0.02
    out = routed(x)
    stopped = (out == default).all(1)
    assert (
        torch.equal(out[~stopped], model(x)[~stopped])
        or error(out[~stopped], model(x)[~stopped]) < 1e-5
    )
    assert float(stopped[labels == 0].float().mean()) > 0.7


def test_outputs_of_any_structure_and_keyword_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 6)
            self.three = nn.Linear(6, 3)

        def forward(self, *, x: Tensor) -> dict[str, Tensor]:
            h = F.relu(self.two(F.relu(self.one(x))))
            return {"scores": self.three(h), "h": h}

    model = Two().double().eval()
    x = torch.randn(6, 4, dtype=torch.float64)
    routed = swan.add_switch(
        model, "one", example_inputs={"x": x}, light=1.0, decide="predicted", discrepancy="l1"
    )
    assert same(routed(x=x), frozen(model)(x=x))
    shaken_(routed.parts.light)
    halfway_sets(routed, x)
    alone = [routed(x=row) for row in x.split(1)]
    assert (
        error(routed(x=x), {k: torch.cat([a[k] for a in alone]) for k in ("scores", "h")}) <= 1e-9
    )
    assert float(routed.train().loss({"x": x}).detach()) > 0


def halfway_sets(routed: swan.RoutedModel, x: Tensor) -> None:
    with torch.no_grad():
        scores = routed.parts.switch(routed.parts.trunk(x=x)).sort().values
    routed.thresholds = [float(scores[2:4].mean())]


@pytest.mark.thorough
def test_autocast_and_compile() -> None:
    model = plain().float()
    x = images(8).float()
    routed = swan.add_switch(model, "2", example_inputs=x, light=0.5)
    halfway_(routed, x)
    wanted = routed(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert error(routed(x).float(), wanted) < 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(routed, backend="eager")
        assert error(compiled(x), wanted) < 1e-5


def test_the_objective_trains_the_mask() -> None:
    torch.manual_seed(0)
    model = plain().float()
    x = images(64).float()
    routed = swan.add_switch(model, "2", example_inputs=x[:4], light=0.5, mask=True).train()
    objective = swan.Objective(routed.gated, macs=0.8, ramp=swan.CosineRamp(length=3))
    optimizer = torch.optim.AdamW(swan.parameter_groups(routed.gated, lr=1e-3, gate_lr=0.1))
    for step in range(5):
        loss = routed.loss(x) + objective(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert int(routed.gated.gates.open_mask().sum()) < 8
    assert swan.cut_mask(routed).crossing_bytes() < routed.crossing_bytes()
