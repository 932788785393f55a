"""Where a switch stands best, and what the inputs of a routed model take."""

import math

import pytest
import torch
from torch import nn

import swan_surgery as swan
from swan_surgery.models import as_inputs
from swan_surgery.routing.costs import routed_costs
from swan_surgery.routing.placing import depths_of
from tests.small_nets import Net


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [part for _ in range(4) for part in (nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 6))]
    return nn.Sequential(*layers, nn.Linear(6, 3)).double().eval()


def batches(count: int = 4, size: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 6, generator=generator).double() for _ in range(count)]


def test_depths_run_once_and_return_one_tensor() -> None:
    assert depths_of(net(), as_inputs(batches()[0])) == ("0", "4", "7", "11")
    shared = nn.Linear(6, 6)
    odd = Net(
        lambda m, x: m.d(m.c(m.twice(m.twice(m.pair(x)[0])))),
        pair=Net(lambda _, x: (x, x)), twice=shared, c=nn.Linear(6, 6), d=nn.Linear(6, 6),
    )  # fmt: skip
    assert depths_of(odd, as_inputs(torch.zeros(2, 6))) == ("c",)
    inside = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU()))
    assert depths_of(inside, as_inputs(torch.zeros(2, 6))) == ("0.0", "0.1", "0.2")


def test_places_are_compared_at_one_cost_and_the_best_is_taken() -> None:
    model = net()
    data = batches(2)
    found = swan.scan_switches(model, data, light=0.1, decide="margin")
    assert [place.after for place in found] == ["0", "4", "7", "11"]
    possible = [place for place in found if not place.refused]
    assert len(possible) >= 2
    for place in possible:
        assert place.macs <= 0.75
        assert 0 < place.share <= 1
        assert place.apart > 0
    assert "no switch can stand there" in found[-1].refused  # one layer is left behind it
    assert math.isnan(found[-1].share)
    routed = swan.add_switch(model, "auto", batches=data, light=0.1, decide="margin")
    assert routed.after == (min(possible, key=lambda place: place.apart).after,)


def test_no_place_says_why_none() -> None:
    with pytest.raises(swan.InputError, match="no place for a switch"):
        swan.add_switch(net(), "auto", batches=batches(), light=1.0, decide="margin")
    for wrong in (None, [], 3):
        with pytest.raises(swan.InputError, match="batch"):
            swan.add_switch(net(), "auto", batches=wrong)


@pytest.mark.parametrize("decide", ["predicted", "margin"])
def test_what_inputs_take_is_what_they_take(decide) -> None:
    model = net()
    x = torch.cat(batches())
    labels = model(x).argmax(1)
    labels[::5] = (labels[::5] + 1) % 3  # the full branch is wrong at times
    routed = swan.add_switch(model, ["2", "5"], example_inputs=x[:4], light=0.5, decide=decide)
    swan.calibrate_switch(routed, [x], share=0.6)
    loader = list(zip(x.split(50), labels.split(50), strict=True))
    found = swan.route_stats(routed, loader)
    with torch.no_grad():
        outputs, full = routed.eval()(x), model(x)
    right, before = outputs.argmax(1) == labels, full.argmax(1) == labels
    assert found.samples == len(x)
    assert found.shares[-1] == pytest.approx(0.4, abs=0.02)
    assert found.accuracy == pytest.approx(
        (float(right.double().mean()), float(before.double().mean()))
    )
    assert found.harm == pytest.approx(float((before & ~right).double().mean()))
    assert found.apart == pytest.approx(float(routed.discrepancies(outputs, full).mean()))
    costs = routed_costs(routed)
    assert found.macs == pytest.approx(costs.expected(found.shares[:-1]) / costs.given)
    assert found.mean_ms > 0
    assert set(found.to_json()) >= {"shares", "p95_ms", "harm"}
    assert "ms per sample mean" in str(found)


def test_stats_ask_for_a_routed_model_and_batches() -> None:
    with pytest.raises(swan.ModelError, match="add_switch"):
        swan.route_stats(net(), batches())
    routed = swan.add_switch(net(), "2", example_inputs=batches()[0], light=0.5)
    for wrong in ([], 3):
        with pytest.raises(swan.InputError, match="batch"):
            swan.route_stats(routed, wrong)
