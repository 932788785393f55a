"""What the GPU script would run in some minutes: numbers in, numbers out."""

import time
from dataclasses import replace

import pytest
import torch
from gpu_clock import Clock, OutOfTimeError, seconds_since_start
from gpu_methods import close_at_random_
from gpu_plan import (
    ASSUMED,
    PARTS,
    State,
    deciding_seconds,
    epochs_for,
    plan,
    plan_part,
    rates_from,
    reserve,
    seconds_of,
)
from gpu_right import error, random_descriptions, read_report
from gpu_runs import DECIDING, FEWEST, LONGER, METHODS, MOST, Run, figure5_runs, longer_runs
from gpu_training import one_cycle
from quality_data import batches, synthetic
from quality_networks import build
from tables_gpu import right_sentence

import swan_surgery as swan


H100, CPU = ASSUMED["h100"], ASSUMED["cpu"]
IMAGES = 50_000


def fitting(planned):
    return [own.item for own in planned if own.fits]


@pytest.mark.parametrize("minutes", [2, 4, 8, 15, 60])
@pytest.mark.parametrize("rates", [H100, CPU], ids=["h100", "cpu"])
def test_a_plan_stays_within_its_minutes(minutes, rates):
    found = plan(minutes, rates, PARTS, IMAGES, State())
    planned = sum(own.seconds for _, _, items in found for own in items if own.fits)
    assert planned <= 60 * minutes - reserve(minutes) - rates.start
    for _, given, items in found:
        assert sum(own.seconds for own in items if own.fits) <= given


def test_eight_minutes_on_an_h100_decide_the_claim_about_vgg():
    found = {part: fitting(items) for part, _, items in plan(8, H100, PARTS, IMAGES, State())}
    runs = [(run.network, run.method, run.budget) for run in found["figure5"]]
    wanted = [("vgg16_bn", method, budget) for budget in (0.05, 0.1) for method in DECIDING]
    assert runs[: 1 + len(wanted)] == [("vgg16_bn", "dense", 1.0), *wanted]
    assert len({run.epochs for run in found["figure5"]}) == 1
    assert found["right"]
    assert found["speed"]


def test_epochs_are_the_most_that_let_the_deciding_runs_fit():
    for seconds in (200, 300, 400):
        epochs = epochs_for("vgg16_bn", seconds, H100, IMAGES)
        assert FEWEST < epochs < MOST
        assert deciding_seconds("vgg16_bn", epochs, H100, IMAGES) <= seconds
        assert deciding_seconds("vgg16_bn", epochs + 1, H100, IMAGES) > seconds
    assert epochs_for("vgg16_bn", 1e9, H100, IMAGES) == MOST
    assert epochs_for("vgg16_bn", 1, H100, IMAGES) == FEWEST


def test_every_method_meets_every_budget_once_in_a_seed():
    runs = list(figure5_runs("resnet50", 7, seed=1))
    assert len({run.key for run in runs}) == len(runs) == 2 + 4 * len(METHODS)
    assert {run.budget for run in runs} == {1.0, 0.5, 0.25, 0.1, 0.05}
    assert {(run.epochs, run.dense_epochs, run.seed) for run in runs} == {(7, 14, 1)}
    longer = list(longer_runs(0))
    assert {run.epochs for run in longer} == {epochs for epochs, _ in LONGER.values()} == {50, 100}


def test_a_later_session_goes_on_with_the_epochs_of_the_first():
    first, epochs = plan_part("figure5", 250, H100, IMAGES, State())
    done = {run.key for run in fitting(first)}
    state = State(done, epochs, {("figure5", "vgg16_bn", 0)})
    second, again = plan_part("figure5", 2000, H100, IMAGES, state)
    assert again["vgg16_bn"] == epochs["vgg16_bn"]
    assert not done & {run.key for run in fitting(second)}
    own = [run for run in fitting(second) if run.network == "vgg16_bn" and run.seed == 0]
    assert {run.epochs for run in own} == {epochs["vgg16_bn"]}
    assert len(own) + len(done) == 2 + 4 * len(METHODS)
    # The weights of a dense network that are not at hand cost their epochs again.
    key, slower = own[0].key, plan_part("figure5", 2000, H100, IMAGES, replace(state, dense=()))[0]
    cost = {own.item.key: own.seconds for own in second}[key]
    dearer = {own.item.key: own.seconds for own in slower}[key]
    assert dearer == pytest.approx(cost + own[0].dense_epochs * IMAGES / H100.images["vgg16_bn"])


def test_a_dense_network_is_not_trained_for_nothing():
    run = Run("figure5", "vgg16_bn", "dense", 1.0, 0, FEWEST, 2 * FEWEST)
    alone = seconds_of(run, H100, IMAGES, has_dense=False)
    assert fitting(plan_part("figure5", 1.2 * alone, H100, IMAGES, State())[0]) == []


def test_gates_cost_more_for_their_share_of_the_epochs():
    plain, gated = (Run("figure5", "vgg16_bn", m, 0.1, 0, 10, 20) for m in ("tp-l2", "ours"))
    difference = seconds_of(gated, H100, IMAGES, has_dense=True) - seconds_of(
        plain, H100, IMAGES, has_dense=True
    )
    own = 0.35 * 10 * IMAGES * (1 / H100.gated["vgg16_bn"] - 1 / H100.images["vgg16_bn"])
    assert difference == pytest.approx(own)


def test_measured_rates_come_before_assumed_ones():
    rates = rates_from({"source": "here", "images": {"vgg16_bn": 7.0}, "gated": {}, "setup": {}})
    assert rates.images["vgg16_bn"] == 7.0
    assert rates.images["resnet50"] == H100.images["resnet50"]


def test_a_clock_ends_with_the_one_it_was_made_of():
    clock = Clock.of(0.05)
    assert clock.within(100).end == clock.end
    assert 0 < clock.within(0.01).left() <= 0.01
    clock.check()
    time.sleep(0.06)
    with pytest.raises(OutOfTimeError):
        clock.check()
    assert seconds_since_start() > 0.1


def test_one_cycle_rises_and_falls_to_zero():
    rates = [one_cycle(step, 100, 0.15) for step in range(101)]
    assert rates[15] == max(rates) == 1.0
    assert rates[0] == pytest.approx(0.04)
    assert rates[100] == pytest.approx(0)
    assert rates[:16] == sorted(rates[:16])
    assert rates[15:] == sorted(rates[15:], reverse=True)


def test_a_random_cut_keeps_one_share_of_every_layer_and_meets_the_budget():
    gated = swan.swanify(build("resnet20").eval(), torch.zeros(1, 3, 32, 32))
    total = swan.hard_macs(gated)
    keep = close_at_random_(gated, 0.25, seed=3)
    assert 0.24 < swan.hard_macs(gated) / total <= 0.25
    assert 0.3 < keep < 0.6
    small = swan.prune(gated)
    for block, width in ((small.layer1[1], 16), (small.layer3[2], 64)):
        assert abs(block.conv1.out_channels - keep * width) <= 1
    other = gated.gates.open_mask()
    close_at_random_(gated, 0.25, seed=4)
    assert not torch.equal(other, gated.gates.open_mask())


def test_random_networks_are_the_same_every_time():
    first = random_descriptions(3)
    assert len(first) == 3
    assert first == random_descriptions(3)


def test_an_error_is_never_hidden_by_nan():
    one = [torch.tensor([1.0, float("nan")])]
    assert error(one, [torch.tensor([1.0, float("nan")])]) == 0
    assert error(one, [torch.tensor([1.0, 2.0])]) == float("inf")
    assert error([torch.tensor([4.0])], [torch.tensor([3.0])]) == 0.25
    assert error([torch.ones(2)], [torch.ones(3)]) == float("inf")


def test_failures_are_read_from_the_report_of_pytest(tmp_path):
    report = tmp_path / "found.xml"
    cases = '<testcase name="a"/><testcase name="b"><failure message="no&#10;way"/></testcase>'
    cases += '<testcase name="c"><skipped/></testcase>'
    report.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    found = read_report(report)
    assert found == {"passed": 1, "failed": {"b": "no"}, "skipped": 1}
    said = right_sentence({"right/tests": {"device": "cuda", **found}})
    assert said == "Tests on cuda: 1 passed, 1 failed, 1 skipped: b."


def test_batches_are_drawn_as_before():
    x, y = next(batches(synthetic(64).train, 32, torch.Generator().manual_seed(5)))
    again, _ = next(batches(synthetic(64).train, 32, torch.Generator().manual_seed(5)))
    assert x.shape == (32, 3, 32, 32)
    assert y.shape == (32,)
    assert torch.equal(x, again)
