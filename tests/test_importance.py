"""Scores of units: by hand, by finite differences, and what they leave alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swan_surgery as swan
from tests.fingerprints import assert_same_fingerprint, fingerprint
from tests.test_gate_learning import gate_gradient, two_widths
from tests.test_objective import zoo_gated


def square_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


class TestGradients:
    @pytest.mark.parametrize(("score", "power"), [("taylor", 1), ("fisher", 2)])
    def test_by_finite_differences(self, score, power) -> None:
        gated = two_widths()
        batches = [torch.randn(5, 4, dtype=torch.float64) for _ in range(3)]
        found = swan.importance(gated, score, batches=batches, loss=square_loss)
        own = [gate_gradient(gated, x).abs() ** power for x in batches]
        torch.testing.assert_close(found, torch.stack(own).mean(0), rtol=1e-5, atol=1e-12)

    def test_num_batches(self) -> None:
        gated = two_widths()
        batches = [torch.randn(5, 4, dtype=torch.float64) for _ in range(3)]
        first = swan.importance(gated, batches=batches, loss=square_loss, num_batches=1)
        assert torch.equal(first, swan.importance(gated, batches=batches[:1], loss=square_loss))

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_works_without_gradients_and_gated_in_place(self, mode) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 2))
        gated = swan.swanify(model, torch.zeros(1, 4))
        assert gated.runs_in_place
        batches = [torch.randn(8, 4)]
        with mode():
            scores = swan.importance(gated, batches=batches, loss=square_loss)
        assert bool((scores > 0).any())


class TestWeights:
    def test_magnitude_by_hand(self) -> None:
        model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[1.0], [3.0]]))
            model[1].weight.copy_(torch.tensor([[2.0, 4.0]]))
        gated = swan.swanify(model, torch.zeros(1, 1, dtype=torch.float64))
        wanted = torch.tensor([1 / 5 + 4 / 10, 9 / 5 + 16 / 10], dtype=torch.float64)
        torch.testing.assert_close(swan.importance(gated, "magnitude"), wanted)

    def test_batch_norm_scales_or_else_the_magnitude(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(3, 2),
            nn.BatchNorm1d(2),
            nn.ReLU(),
            nn.Linear(2, 4),
            nn.ReLU(),
            nn.Linear(4, 1),
        )
        with torch.no_grad():
            model[1].weight.copy_(torch.tensor([0.5, -2.0]))
        gated = swan.swanify(model, torch.zeros(2, 3))
        found = swan.importance(gated, "bn_scale")
        first = list(gated.channels.layer("0").out_units)
        second = list(gated.channels.layer("3").out_units)
        assert found[first].tolist() == [0.25, 4.0]
        assert torch.equal(found[second], swan.importance(gated, "magnitude")[second])

    def test_random_follows_the_generator(self) -> None:
        gated = two_widths()
        one, two = (
            swan.importance(gated, "random", generator=torch.Generator().manual_seed(seed))
            for seed in (1, 2)
        )
        again = swan.importance(gated, "random", generator=torch.Generator().manual_seed(1))
        assert torch.equal(one, again)
        assert not torch.equal(one, two)


class TestPurity:
    @pytest.mark.parametrize("score", ["magnitude", "bn_scale", "taylor", "fisher", "random"])
    def test_nothing_changes(self, score) -> None:
        gated = zoo_gated("vgg").train()  # dropout and batch-norm
        generator = torch.Generator().manual_seed(0)
        batches = [torch.randn_like(gated.example_inputs.args[0])]
        before = fingerprint(gated)
        swan.importance(gated, score, batches=batches, loss=square_loss, generator=generator)
        assert_same_fingerprint(before, fingerprint(gated))

    def test_nothing_changes_when_the_loss_raises(self) -> None:
        gated = zoo_gated("vgg").train()
        before = fingerprint(gated)

        def broken(model: nn.Module, batch: Tensor) -> Tensor:
            raise RuntimeError("no labels")

        with pytest.raises(RuntimeError, match="no labels"):
            swan.importance(gated, batches=[torch.zeros(1)], loss=broken)
        assert_same_fingerprint(before, fingerprint(gated))
        gated.eval()
        assert gated.gates.values().requires_grad is False


class TestPruneByScore:
    @pytest.mark.parametrize("per_cost", [True, False])
    @pytest.mark.parametrize(
        "budget", [{"macs": 0.5}, {"params": 0.4}, {"macs": 0.6, "params": 0.5}]
    )
    def test_meets_the_budget_and_leaves_the_gated_model(self, per_cost, budget) -> None:
        gated = zoo_gated("resnet_option_a")
        before = fingerprint(gated)
        scores = swan.importance(gated, "magnitude")
        small = swan.prune_by_score(gated, scores, per_cost=per_cost, **budget)
        assert_same_fingerprint(before, fingerprint(gated))
        dense = swan.unswanify(gated)
        counts = {
            "macs": [swan.count_macs(m, gated.example_inputs) for m in (small, dense)],
            "params": [swan.count_params(m) for m in (small, dense)],
        }
        for name, share in budget.items():
            after, whole = counts[name]
            assert after <= share * whole

    def test_keeps_the_highest_scores(self) -> None:
        model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
        gated = swan.swanify(model)
        scores = torch.tensor([1.0, 9.0, 2.0, 8.0, 3.0, 7.0])
        small = swan.prune_by_score(gated, scores, macs=0.5)
        assert torch.equal(small[0].weight, model[0].weight[[1, 3, 5]])

    def test_round_to_keeps_the_highest_scores_too(self) -> None:
        model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        scores = torch.tensor([1.0, 9.0, 2.0, 8.0, 3.0, 7.0, 6.0, 0.5])
        with pytest.warns(swan.SwanWarning, match=r"multiples of 4 channels leave 50\.0%"):
            small = swan.prune_by_score(swan.swanify(model), scores, macs=0.7, round_to=4)
        assert torch.equal(small[0].weight, model[0].weight[[1, 3, 5, 6]])


class TestBadInput:
    def test_a_loss_of_outputs_and_labels_is_told_how_it_is_called(self) -> None:
        net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        gated = swan.swanify(net, torch.zeros(1, 3))
        batches = [(torch.randn(4, 3), torch.randint(2, (4,)))]
        with pytest.raises(TypeError) as caught:
            swan.importance(gated, "fisher", batches=batches, loss=nn.functional.cross_entropy)
        assert "loss(model, batch)" in caught.value.__notes__[0]

    def test_scores_that_need_data(self) -> None:
        with pytest.raises(swan.InputError, match="needs batches"):
            swan.importance(two_widths(), "taylor")
        with pytest.raises(swan.InputError, match="yielded no batch"):
            swan.importance(two_widths(), "taylor", batches=[], loss=square_loss)

    def test_unknown_score(self) -> None:
        with pytest.raises(swan.InputError, match="magnitude, bn_scale, taylor, fisher, random"):
            swan.importance(two_widths(), "luck")

    @pytest.mark.parametrize(
        ("loss", "message"),
        [
            (lambda m, b: m(b), "must return a scalar tensor; got"),
            (lambda m, b: 1.0, "scalar tensor; got float"),
            (lambda m, b: m(b).detach().sum(), "does not depend on the model"),
            (lambda m, b: m(b).sum() * float("nan"), "is nan"),
        ],
    )
    def test_losses(self, loss, message) -> None:
        batch = torch.randn(5, 4, dtype=torch.float64)
        with pytest.raises(swan.InputError, match=message):
            swan.importance(two_widths(), batches=[batch], loss=loss)

    @pytest.mark.parametrize(
        "scores", [torch.ones(3), torch.full((14,), -1.0), torch.full((14,), float("nan"))]
    )
    def test_scores(self, scores) -> None:
        with pytest.raises(swan.InputError, match="scores must"):
            swan.prune_by_score(two_widths(), scores, macs=0.5)

    def test_no_budget(self) -> None:
        with pytest.raises(swan.InputError, match=r"macs=0\.5 or params=0\.5"):
            swan.prune_by_score(two_widths(), torch.ones(14))


def test_a_copy_scores_the_same() -> None:
    gated = zoo_gated("densenet")
    assert torch.equal(
        swan.importance(gated, "magnitude"), swan.importance(copy.deepcopy(gated), "magnitude")
    )
    batches = [torch.randn_like(gated.example_inputs.args[0])]
    one = swan.importance(gated, batches=batches, loss=lambda m, b: F.relu(m(b)).sum())
    two = swan.importance(gated, batches=batches, loss=lambda m, b: F.relu(m(b)).sum())
    assert torch.equal(one, two)
