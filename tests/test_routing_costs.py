"""What a routed model costs in the mean: as its parts run, as `route_stats` says, and as a closed mask is cut."""

import pytest
import torch
from torch import nn

import swan_surgery as swan
from tests.test_routing import images, plain
from tests.test_routing_places import batches, net


AFTER = {"one": "2", "nested": ["2", "5"]}


@pytest.mark.parametrize("decide", ["predicted", "margin"])
@pytest.mark.parametrize("kind", AFTER)
def test_the_mean_is_what_inputs_take(kind: str, decide: str) -> None:
    """Three ways to say it: by shares, as it runs, and by `route_stats`."""
    model, x = net(), torch.cat(batches())
    routed = swan.add_switch(
        model, AFTER[kind], example_inputs=x[:4], light=0.5, decide=decide
    ).eval()
    given = swan.count_macs(model, x[:4])
    dear = swan.expected_macs(routed, [0.0] * routed.num_switches)
    assert float(swan.expected_macs(routed)) == swan.hard_macs(routed) == given  # nothing looks yet
    assert swan.count_macs(routed, x[:4]) == given
    assert float(dear) > given  # the switch, or the light branch, on top
    certificate = swan.calibrate_switch(routed, [x], share=0.6)
    found = swan.expected_macs(routed)
    assert float(found) == pytest.approx(certificate.macs * given, rel=1e-12)
    stats = swan.route_stats(routed, [x])
    assert swan.expected_macs(routed, stats.shares) == swan.expected_macs(routed, stats.shares[:-1])
    assert float(swan.expected_macs(routed, stats.shares)) == pytest.approx(stats.macs * given)
    # As the batch runs, the parts of the batch one by one: 4 of its samples cost that in the mean.
    assert swan.count_macs(routed, x) == pytest.approx(float(found) * len(x) / 4, rel=1e-12)
    assert found.dtype is torch.float64
    assert found < dear


@pytest.mark.parametrize("decide", ["predicted", "margin"])
def test_a_mask_counts_at_its_gates_and_exactly_as_it_is_cut(decide: str) -> None:
    model = plain()
    routed = swan.add_switch(
        model, ["0", "2"], example_inputs=images(), light=1.0, mask=True, decide=decide
    ).eval()
    shares = [0.25, 0.5]
    full = swan.add_switch(model, ["0", "2"], example_inputs=images(), light=1.0, decide=decide)
    bank = routed.gated.gates
    with torch.no_grad():
        bank.logits.fill_(40.0)
    assert float(swan.expected_macs(routed, shares).detach()) == pytest.approx(
        float(swan.expected_macs(full, shares))
    )
    with torch.no_grad():
        bank.logits[:3] = -2.0
    small = swan.cut_mask(routed)
    assert swan.hard_macs(routed, shares) == swan.expected_macs(small, shares)
    assert swan.hard_macs(routed, shares) < swan.expected_macs(full, shares)
    swan.expected_macs(routed, shares).backward()
    assert bank.logits.grad is not None
    assert bool((bank.logits.grad[:3] > 0).all())
    assert swan.expected_macs(routed, shares) < swan.expected_macs(routed, [0.0, 0.0])


def test_an_ending_costs_nothing_behind_its_switch() -> None:
    default = torch.tensor([1.0, 0, 0, 0, 0])
    routed = swan.add_switch(
        plain(), "2", example_inputs=images(), light=None, default=default, mask=True
    )
    front = 6 * (3 * 8 * 9 * 64 + 16 * 64 + 64)
    with torch.no_grad():
        routed.gated.gates.logits.fill_(40.0)
    assert swan.hard_macs(routed, [1.0]) == front


def test_a_module_on_both_sides_is_priced_on_both() -> None:
    shared = nn.Conv2d(8, 8, 3, padding=1)
    layers = (nn.Conv2d(3, 8, 1), shared, nn.ReLU(), nn.Conv2d(8, 8, 1), shared, nn.Conv2d(8, 4, 1))
    x = torch.randn(2, 3, 4, 4)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 3)).eval()
    own = nn.Sequential(nn.Flatten(), nn.Linear(128, 3))
    for mask in (False, True):
        routed = swan.add_switch(
            model, "2", example_inputs=x, light=own, decide="predicted", mask=mask
        ).eval()
        if mask:
            routed.gated.gates.logits.data.fill_(40.0)
        wanted = swan.count_macs(routed, x)
        assert float(swan.hard_macs(routed)) == pytest.approx(wanted)


def test_shares_that_cannot_be_are_refused() -> None:
    routed = swan.add_switch(net(), "2", example_inputs=batches()[0], light=0.5)
    for wrong in ([], [0.5, 0.6], [-0.1], [1.2], [0.2, 0.2, 0.6], ["a"], 0.5):
        with pytest.raises(swan.InputError, match="leave at each of 1 switches"):
            swan.expected_macs(routed, wrong)
    routed.thresholds = [0.5]
    with pytest.raises(swan.InputError, match="thresholds were set by hand"):
        swan.hard_macs(routed)
    gated = swan.swanify(net(), batches()[0])
    for cost in (swan.expected_macs, swan.hard_macs):
        with pytest.raises(swan.InputError, match="routed model"):
            cost(gated, [0.5])
        with pytest.raises(swan.ModelError, match="expected a gated model, got Sequential"):
            cost(net())
    for other in (swan.marginal_macs, lambda m: swan.Objective(m, macs=0.5)):
        with pytest.raises(
            swan.ModelError, match=r"got RoutedModel; it has a switch.*routed\.gated"
        ):
            other(routed)
