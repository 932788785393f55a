"""Thresholds with a guarantee: bounds, what they keep, and what is refused."""

import pytest
import torch
from scipy.stats import binom
from torch import nn

import swan_surgery as swan
from swan_surgery.routing.bounds import least_samples, p_value, upper
from swan_surgery.routing.finding import largest_threshold
from tests.test_routing import images, plain


def routed_net(**options) -> swan.RoutedModel:
    return swan.add_switch(plain(), "2", example_inputs=images(), light=1.0, **options)


@pytest.mark.parametrize(("count", "samples"), [(0, 230), (3, 500), (40, 1000)])
def test_the_binomial_bound_is_where_its_tail_is_delta(count: int, samples: int) -> None:
    bound = upper(count, samples, 0.1, counts=True)
    assert binom.cdf(count, samples, bound) == pytest.approx(0.1)
    assert upper(count, samples, 0.1, counts=False) >= bound
    assert p_value(count, samples, bound, counts=False) <= 1


def test_how_many_samples_it_takes() -> None:
    assert least_samples(0.01, 0.1, counts=True) == 230
    assert (1 - 0.01) ** 230 <= 0.1 < (1 - 0.01) ** 229


@pytest.mark.parametrize("counts", [True, False])
def test_the_harm_is_exceeded_no_more_often_than_said(counts: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    # Harm of a sample with score s has mean s / 5; so E[1{s <= t} harm] = t^2 / 10.
    exceeded, shares = 0, []
    for _ in range(60):
        scores = torch.rand(800, generator=generator, dtype=torch.float64)
        harm = (torch.rand(800, generator=generator) < scores / 5).double()
        if not counts:
            harm = harm * torch.rand(800, generator=generator, dtype=torch.float64) * 2
            harm = harm.clamp(max=1)
        t = largest_threshold(scores, harm, 0.03, 0.1, counts=counts)
        true = t**2 / 10 * (1.0 if counts else 0.75)
        exceeded += true > 0.03
        shares.append(t)
    assert exceeded <= 12  # 6 expected at most; 12 is beyond 99 % of the binomial
    assert sum(shares) / 60 > 0.3


def test_thresholds_for_shares_and_costs() -> None:
    routed, x = routed_net(decide="predicted"), images(300)
    found = swan.calibrate_switch(routed, [x], share=0.3)  # needs no labels
    assert found.shares[0] == pytest.approx(0.3)
    assert found.bound == 1.0
    light = swan.add_switch(plain(), "2", example_inputs=images(), light=0.4, decide="margin")
    assert swan.calibrate_switch(light, [x], macs=0.9).macs <= 0.9
    with pytest.raises(swan.BudgetError, match="on the light branch it is"):
        swan.calibrate_switch(light, [x], macs=0.05)


def test_the_certificate_says_what_it_rests_on() -> None:
    routed, x = routed_net(), images(500)
    labels = routed.parts.last(routed.parts.trunk(x)).argmax(1)
    found = swan.calibrate_switch(routed, [(x, labels)], harm=0.05)
    assert (found.samples, found.target, found.asked) == (500, "harm", 0.05)
    assert found.bound <= 0.05
    assert found.shares[0] == 1.0  # the light branch is the full one
    assert "harm <= 0.05 with confidence 0.9" in str(found)
    other = swan.calibrate_switch(routed, [(x.flip(0), labels.flip(0))], harm=0.05)
    assert other.data != found.data
    assert other.model == found.model


def test_harm_of_the_users_own() -> None:
    routed, x = routed_net(decide="predicted", discrepancy="l1"), images(400)
    with torch.no_grad():
        for parameter in routed.parts.light.parameters():
            parameter.mul_(1.1)
    found = swan.calibrate_switch(
        routed, [x], harm=0.2, loss=lambda light, full, _: (light - full).abs().mean(1).clamp(max=1)
    )
    assert 0 < found.bound <= 0.2
    with pytest.raises(swan.InputError, match="between 0 and 1"):
        swan.calibrate_switch(
            routed, [x], harm=0.2, loss=lambda light, full, _: light.sum(1) * 0 + 2
        )


def test_what_cannot_be_calibrated_is_refused() -> None:
    routed, x = routed_net(), images(100)
    labels = torch.zeros(100, dtype=torch.int64)
    with pytest.raises(swan.InputError, match="it takes 299"):
        swan.calibrate_switch(routed, [(x, labels)], harm=0.01)
    with pytest.raises(swan.InputError, match="needs labels"):
        swan.calibrate_switch(routed, [x], harm=0.05)
    with pytest.raises(swan.InputError, match=r"one of harm=, share=, macs="):
        swan.calibrate_switch(routed, [x])
    with pytest.raises(swan.InputError, match="share must be between 0 and 1"):
        swan.calibrate_switch(routed, [x], share=0.0)
    with pytest.raises(swan.InputError, match="no batch"):
        swan.calibrate_switch(routed, [], share=0.5)
    with pytest.raises(swan.ModelError, match="expected a routed model"):
        swan.calibrate_switch(plain(), [x], share=0.5)


def test_what_cannot_be_added_is_refused() -> None:
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    class Sum(nn.Module):
        def forward(self, pair):
            return pair[0] + pair[1]

    x = torch.randn(4, 3)
    model = nn.Sequential(nn.Linear(3, 6), Pair(), Sum(), nn.Linear(6, 2))
    with pytest.raises(swan.InputError, match="returns a tuple of Tensor, Tensor"):
        swan.add_switch(model, "1", example_inputs=x)
    with pytest.raises(swan.InputError, match="no module 'nowhere'"):
        swan.add_switch(model, "nowhere", example_inputs=x)
    with pytest.raises(swan.InputError, match="share of the rest's MACs"):
        swan.add_switch(model, "2", example_inputs=x, light=1.5)
    with pytest.raises(swan.InputError, match="pass default="):
        swan.add_switch(model, "2", example_inputs=x, light=None)
    with pytest.raises(swan.InputError, match="must return the same shapes"):
        swan.add_switch(model, "2", example_inputs=x, light=nn.Linear(6, 3))
    with pytest.raises(swan.ModelError, match=r"expected a torch.nn.Module"):
        swan.add_switch("model", "2", example_inputs=x)


def test_one_sample_in_train_mode_is_refused() -> None:
    model = nn.Sequential(
        nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)
    )
    x = torch.randn(5, 3)
    routed = swan.add_switch(model.eval(), "1", example_inputs=x, light=1.0, decide="predicted")
    with torch.no_grad():
        scores = routed.parts.switch.eval()(routed.parts.trunk(x)).sort().values
    routed.thresholds = [float(scores[:2].mean())]
    routed.train()
    routed.parts.switch.eval()
    with pytest.raises(swan.InputError, match="one sample of the batch"):
        routed(x)
    assert float(routed.loss(x).detach()) >= 0
