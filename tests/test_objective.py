"""Equations 9 to 15 by hand on a network small enough to do so, and the drive to a MAC budget."""

import copy
import warnings
from math import cos, pi

import pytest
import torch
from torch import nn

import swan_surgery as swan
from swan_surgery.gates import GatedModel
from tests.gated_zoo import drawn_zoo
from tests.test_plan import mlp


# Linear layers 3 -> 4 -> 5 -> 2: closing a unit of the first width saves a row of the first layer
# and a column of the second, 3 + 5 MACs; one of the second width 4 + 2.
SIZES = (3, 4, 5, 2)
MARGINAL = torch.tensor([8.0] * 4 + [6.0] * 5, dtype=torch.float64)
TOTAL = 3 * 4 + 4 * 5 + 5 * 2
LOGITS = torch.tensor([2.0, -1.0, 0.3, 0.0, 1.5, -2.0, 0.7, -0.4, 3.0], dtype=torch.float64)


def two_layers() -> tuple[nn.Sequential, GatedModel]:
    torch.manual_seed(9)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)
    ).double()
    gated = swan.swanify(model, torch.zeros(1, 3, dtype=torch.float64)).train()
    with torch.no_grad():
        gated.gates.logits.copy_(LOGITS)
    return model, gated


def zoo_gated(name: str = "resnet_option_a", *, shift: float = 0.0) -> GatedModel:
    """In float64, logits drawn around `shift`."""
    return drawn_zoo(name, shift=shift)


def close(one, two) -> None:
    torch.testing.assert_close(
        torch.as_tensor(one, dtype=torch.float64),
        torch.as_tensor(two, dtype=torch.float64),
        rtol=1e-12,
        atol=1e-15,
    )


class TestTermsByHand:
    def setup_method(self) -> None:
        self.model, self.gated = two_layers()
        self.p = 1 / (1 + torch.exp(-LOGITS))

    def test_marginal_macs(self) -> None:
        close(swan.marginal_macs(self.gated), MARGINAL)

    def test_eq_9(self) -> None:
        objective = swan.Objective(self.gated, l0=0.7)
        close(objective(1).detach(), 0.7 * self.p.sum() / 9)
        close(objective.log()["l0_raw"], self.p.sum())

    def test_eq_10(self) -> None:
        objective = swan.Objective(self.gated, flops=0.3)
        raw = (self.p * MARGINAL).sum()
        close(objective(1).detach(), 0.3 * raw / MARGINAL.sum())
        close(objective.log()["flops_raw"], raw)

    def test_eq_11_and_12_above_the_target(self) -> None:
        objective = swan.Objective(self.gated, target_active=0.2, target_weight=3.0)
        active = self.p.mean()
        close(objective(1).detach(), 3 * (active - 0.2) ** 2)
        close(objective.log()["active_fraction"], active)
        close(objective.log()["target_raw"], (active - 0.2) ** 2)

    def test_eq_12_is_one_sided(self) -> None:
        objective = swan.Objective(self.gated, target_active=0.9, target_weight=3.0)
        penalty = objective(1)
        assert float(penalty.detach()) == 0
        penalty.backward()
        assert not bool(self.gated.gates.logits.grad.any())

    def test_eq_8_is_the_sum_of_its_terms(self) -> None:
        each = [{"l0": 0.7}, {"flops": 0.3}, {"target_active": 0.2, "target_weight": 2.0}]
        alone = [float(swan.Objective(self.gated, **term)(1).detach()) for term in each]
        together = swan.Objective(self.gated, **each[0], **each[1], **each[2])
        close(together(1).detach(), sum(alone))

    def test_open_gates_cost_one_per_coefficient(self) -> None:
        with torch.no_grad():
            self.gated.gates.logits.fill_(40.0)
        close(swan.Objective(self.gated, l0=0.7)(1).detach(), 0.7)
        close(swan.Objective(self.gated, flops=0.3)(1).detach(), 0.3)

    def test_eq_13_ramps_each_coefficient(self) -> None:
        ramp = {"l0": swan.CosineRamp(1, 2), "flops": swan.CosineRamp(2, 0)}
        objective = swan.Objective(self.gated, l0=0.7, flops=0.3, target_active=0.2, ramp=ramp)
        l0, flops = 0.7 * self.p.mean(), 0.3 * (self.p * MARGINAL).sum() / MARGINAL.sum()
        target = (self.p.mean() - 0.2) ** 2
        for epoch, wanted in [
            (0, target),
            (1, target),
            (2, 0.5 * l0 + target),
            (2.5, 0.5 * (1 - cos(pi * 0.75)) * l0 + flops + target),
            (9, l0 + flops + target),
        ]:
            close(objective(epoch).detach(), wanted)

    def test_one_ramp_for_all(self) -> None:
        objective = swan.Objective(self.gated, l0=0.7, flops=0.3, ramp=swan.CosineRamp(1, 2))
        whole = float(objective(5).detach())
        close(objective(2).detach(), whole / 2)
        assert float(objective(1).detach()) == 0

    def test_without_terms_there_is_no_penalty(self) -> None:
        with pytest.warns(swan.SwanWarning, match=r"asks for nothing: give it a budget \(macs=0.5"):
            objective = swan.Objective(self.gated)
        penalty = objective(3)
        assert float(penalty.detach()) == 0
        penalty.backward()


@pytest.mark.parametrize("mode", ["ste", "soft"])
@pytest.mark.parametrize("target", [0.2, 0.9])
def test_the_gradient_on_the_logits_is_eq_15(mode, target) -> None:
    model, gated = two_layers()
    gated.gates.mode = mode
    l0, flops, weight, num_units = 0.7, 0.3, 2.0, 9
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(6, n, generator=generator, dtype=torch.float64) for n in (3, 2))
    objective = swan.Objective(
        gated, l0=l0, flops=flops, target_active=target, target_weight=weight
    )
    ((gated(x) - y).square().mean() + objective(1)).backward()

    # By hand, without autograd: forward with gate values g, backward through tanh and the layers.
    p = 1 / (1 + torch.exp(-LOGITS))
    g = (p >= 0.5).double() if mode == "ste" else p
    (w1, b1), (w2, b2), (w3, b3) = (
        (model[i].weight.detach(), model[i].bias.detach()) for i in (0, 2, 4)
    )
    h1 = x @ w1.T + b1  # the gate sits behind the layer: tanh(0) = 0
    a1 = torch.tanh(g[:4] * h1)
    h2 = a1 @ w2.T + b2
    a2 = torch.tanh(g[4:] * h2)
    out = a2 @ w3.T + b3
    d_out = 2 * (out - y) / out.numel()
    d_gated2 = (d_out @ w3) * (1 - a2**2)  # dL/dh~ of the second width
    d_gated1 = ((d_gated2 * g[4:]) @ w2) * (1 - a1**2)
    usefulness = torch.cat([(d_gated1 * h1).sum(0), (d_gated2 * h2).sum(0)])
    over = max(0.0, float(p.mean()) - target)
    price = l0 / num_units + flops * MARGINAL / MARGINAL.sum() + 2 * weight / num_units * over
    wanted = (usefulness + price) * p * (1 - p)
    assert (over > 0) is (target == 0.2)
    torch.testing.assert_close(gated.gates.logits.grad, wanted, rtol=1e-11, atol=1e-14)


class TestLog:
    def test_plain_floats_with_every_term(self) -> None:
        gated = zoo_gated()
        objective = swan.Objective(gated, l0=0.1, flops=0.2, target_active=0.3, macs=0.5)
        penalty = objective(1.0)
        log = objective.log()
        assert set(log) == {
            *("penalty", "l0", "flops", "target", "macs"),
            *("l0_raw", "flops_raw", "target_raw"),
            *("active_fraction", "open_fraction", "threshold", "macs_budget", "multiplier"),
            *("expected_macs", "hard_macs", "expected_macs_ratio", "hard_macs_ratio"),
        }
        assert all(type(value) is float for value in log.values())
        assert log["penalty"] == float(penalty.detach())
        assert log["penalty"] == pytest.approx(
            sum(log[name] for name in ("l0", "flops", "target", "macs")), rel=1e-12
        )
        total = swan.count_macs(gated, gated.example_inputs)
        assert log["hard_macs"] == swan.hard_macs(gated)
        assert log["hard_macs_ratio"] == swan.hard_macs(gated) / total
        assert log["expected_macs"] == float(swan.expected_macs(gated).detach())
        assert log["expected_macs_ratio"] == log["expected_macs"] / total
        assert log["open_fraction"] == float(gated.gates.open_mask().double().mean())
        assert log["active_fraction"] == float(gated.gates.probabilities().detach().mean())
        assert log["threshold"] == gated.gates.threshold

    def test_a_copy_of_the_last_call(self) -> None:
        objective = swan.Objective(zoo_gated(), l0=0.1)
        assert objective.log() == {}
        objective(1)
        objective.log()["penalty"] = 5.0
        assert objective.log()["penalty"] < 5

    def test_absent_terms_are_absent(self) -> None:
        objective = swan.Objective(zoo_gated(), l0=0.1)
        objective(1)
        assert {"macs", "macs_budget", "multiplier", "target"}.isdisjoint(objective.log())


def total_of(gated: GatedModel) -> int:
    return swan.count_macs(gated, gated.example_inputs)


def next_unit_exceeds(gated: GatedModel, ceiling: float) -> bool:
    """Opening the best closed unit that is not there for the minimum width goes over the budget."""
    gates = gated.gates
    p = gates.probabilities().detach()
    closed = (~gates.open_mask()).nonzero().reshape(-1)
    if not len(closed):
        return True
    best = closed[p[closed].argmax()]
    mask = gates.open_mask().clone()
    mask[best] = True
    with gates.holding(mask):
        return swan.hard_macs(gated) > ceiling


RAMPED = ["resnet_option_a", "densenet", "unet", "vgg"]
BUDGETS = [0.3, 0.5, 0.9, 1.0]


class TestBudget:
    @pytest.mark.parametrize(
        ("name", "macs"),
        [
            # Every network and every budget once; the other pairs are in `make thorough`.
            pytest.param(name, macs, marks=() if own == macs else pytest.mark.thorough)
            for name, own in zip(RAMPED, BUDGETS, strict=True)
            for macs in BUDGETS
        ],
    )
    @pytest.mark.parametrize("learning", ["curvature", "gradient"])
    def test_hard_macs_meet_the_budget_all_along_the_ramp(self, name, macs, learning) -> None:
        gated = zoo_gated(name)
        total = total_of(gated)
        ramp = swan.CosineRamp(1, 4)
        objective = swan.Objective(gated, macs=macs, learning=learning, ramp=ramp)
        for step in range(15):
            with torch.no_grad():  # the gates go on moving
                gated.gates.logits.add_(0.1 * torch.randn(gated.gates.num_units))
            epoch = step / 2
            objective(epoch)
            budget = 1 - ramp(epoch) * (1 - macs)
            assert objective.log()["macs_budget"] == pytest.approx(budget)
            hard = swan.hard_macs(gated)
            assert hard <= budget * total
            assert hard >= 0.995 * budget * total or next_unit_exceeds(gated, budget * total)
            assert hard == swan.count_macs(swan.prune(gated), gated.example_inputs)

    def test_pruning_afterwards_costs_what_was_asked(self) -> None:
        gated = zoo_gated("inverted_residual")
        objective = swan.Objective(gated, macs=0.5)
        objective(1)
        small = swan.prune(gated)
        assert swan.count_macs(small, gated.example_inputs) <= 0.5 * total_of(gated)

    def test_equal_logits_still_meet_it(self) -> None:
        gated = zoo_gated()
        with torch.no_grad():
            gated.gates.logits.fill_(1.0)
        swan.Objective(gated, macs=0.5)(1)
        assert swan.hard_macs(gated) <= 0.5 * total_of(gated)

    def test_saturated_logits_still_meet_it(self) -> None:
        gated = zoo_gated()
        with torch.no_grad():
            gated.gates.logits.fill_(60.0)  # sigmoid is exactly 1, as from 17 on in float32
        swan.Objective(gated, macs=0.5)(1)
        assert swan.hard_macs(gated) <= 0.5 * total_of(gated)

    def test_the_least_reachable_budget(self) -> None:
        gated = zoo_gated()
        with pytest.raises(swan.BudgetError) as caught:
            swan.Objective(gated, macs=1e-9)
        least = caught.value.least
        swan.Objective(gated, macs=least / total_of(gated))(1)
        assert swan.hard_macs(gated) == least

    def test_a_threshold_that_fits_is_left_alone(self) -> None:
        gated = zoo_gated()
        objective = swan.Objective(gated, macs=0.5, learning="gradient")
        objective(1)
        before = gated.gates.threshold
        objective(1)
        assert gated.gates.threshold == before

    def test_the_multiplier_adapts_by_the_excess(self) -> None:
        gated = zoo_gated(shift=2.0)
        objective = swan.Objective(gated, macs=0.3, learning="gradient")
        ratio = float(swan.expected_macs(gated).detach()) / total_of(gated)
        assert ratio > 0.3
        for call in (1, 2, 3):
            objective(1)
            assert objective.log()["multiplier"] == pytest.approx(call * 0.1 * (ratio - 0.3))
        with torch.no_grad():
            gated.gates.logits.fill_(-3.0)
        for _ in range(100):
            objective(1)
        assert objective.log()["multiplier"] == 0  # never negative

    def test_its_gradient_is_that_of_the_expected_macs(self) -> None:
        gated = zoo_gated(shift=2.0)
        objective = swan.Objective(gated, macs=0.3, learning="gradient")
        objective(1).backward()
        found = gated.gates.logits.grad.clone()
        (wanted,) = torch.autograd.grad(swan.expected_macs(gated), gated.gates.logits)
        scale = objective.log()["multiplier"] / total_of(gated)
        torch.testing.assert_close(found, scale * wanted, rtol=1e-10, atol=1e-15)
        assert bool((found > 0).any())

    def test_state_dict(self) -> None:
        gated = zoo_gated(shift=2.0)
        objective = swan.Objective(gated, macs=0.3, learning="gradient")
        for _ in range(3):
            objective(1)
        resumed = swan.Objective(copy.deepcopy(gated), macs=0.3, learning="gradient")
        resumed.load_state_dict(objective.state_dict())
        assert all(type(value) is float for value in objective.state_dict().values())
        assert torch.equal(resumed(2), objective(2))
        assert resumed.log() == objective.log()
        fresh = swan.Objective(copy.deepcopy(gated), macs=0.3, learning="gradient")
        assert not torch.equal(fresh(2), objective(2))

    def test_a_copy_of_the_gated_model_is_not_driven(self) -> None:
        gated = zoo_gated(shift=2.0)
        twin = copy.deepcopy(gated)
        swan.Objective(gated, macs=0.3)(1)
        assert twin.gates.threshold == 0.5
        assert swan.hard_macs(twin) > swan.hard_macs(gated)


class TestPaper:
    def test_soft_gates_and_the_penalties_of_the_paper(self) -> None:
        gated = zoo_gated(shift=2.0).train()
        twin = copy.deepcopy(gated)
        paper = swan.Objective(gated, macs=0.4, preset="paper")
        assert gated.gates.mode == "soft"
        plain = swan.Objective(twin, flops=1.0, target_active=0.4, target_weight=100.0)
        assert torch.equal(paper(1), plain(1))
        assert gated.gates.threshold == 0.5  # only prune meets the budget
        assert "multiplier" not in paper.log()
        small = swan.prune(gated, macs=0.4)
        assert swan.count_macs(small, gated.example_inputs) <= 0.4 * total_of(gated)

    @pytest.mark.parametrize(
        "options", [{"l0": 1.0}, {"learning": "gradient"}, {"target_active": 0.5}, {"flops": 0.1}]
    )
    def test_replaces_the_other_settings(self, options) -> None:
        gated = zoo_gated()
        with pytest.raises(swan.InputError, match="preset may be 'paper'"):
            swan.Objective(gated, macs=0.5, preset="paper", **options)
        assert gated.gates.mode == "ste"

    def test_needs_a_share(self) -> None:
        with pytest.raises(swan.InputError, match=r"macs=0\.5 or params=0\.5"):
            swan.Objective(zoo_gated(), preset="paper")


class TestTraining:
    def test_penalties_close_what_is_useless_first(self) -> None:
        """Half of the hidden units have no way out: the regulariser alone acts on them."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
        with torch.no_grad():
            model[2].weight[:, 4:] = 0
        target = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        gated = swan.swanify(model, torch.zeros(1, 4, dtype=torch.float64)).train()
        with torch.no_grad():
            gated.gates.logits.fill_(1.0)
        objective = swan.Objective(gated, l0=0.05)
        optimizer = torch.optim.Adam(swan.parameter_groups(gated, lr=0.0, gate_lr=0.1)[1:])
        for _ in range(60):
            x = torch.randn(64, 4, dtype=torch.float64)
            optimizer.zero_grad()
            ((gated(x) - target(x)).square().mean() + objective(1)).backward()
            optimizer.step()
        assert not bool(gated.gates.open_mask()[4:].any())
        assert bool(gated.gates.open_mask()[:4].any())

    def test_the_penalty_is_a_scalar_of_the_logits_dtype(self) -> None:
        for dtype in (torch.float32, torch.float64):
            gated = swan.swanify(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype))
            penalty = swan.Objective(gated, l0=1.0, flops=1.0, target_active=0.1, macs=0.5)(1)
            assert penalty.shape == ()
            assert penalty.dtype == dtype


class TestWhatIsNoticed:
    @pytest.mark.parametrize("learning", ["curvature", "gradient"])
    def test_gates_that_nothing_reaches(self, learning) -> None:
        gated = mlp(3, 8, 2).train()
        for trains in (False, True):
            objective = swan.Objective(gated, macs=0.5, learning=learning)
            optimizer = torch.optim.SGD(gated.parameters(), lr=0.1)
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                for epoch in range(105):
                    loss = objective(epoch)
                    if trains:
                        (loss + gated(torch.ones(4, 3)).square().mean()).backward()
                        optimizer.step()
                        optimizer.zero_grad()
            texts = [str(own.message) for own in seen]
            assert len(texts) == (not trains)
            assert trains or "learnt nothing in 100 calls" in texts[0]
