"""What all training frameworks' callbacks share, and the error where a framework is missing."""

import pytest
import torch
from torch import nn

import swan_surgery as swan
from swan_surgery.environment.extras import needed_from
from swan_surgery.integrations.steps import add_penalty, check_inside, finish
from tests.test_plan import mlp, zoo_gated


def test_a_missing_framework_is_named_with_its_extra() -> None:
    with (
        pytest.raises(
            swan.MissingExtraError,
            match=r"^no_such_framework is not installed; pip install 'swan-surgery\[lightning\]'$",
        ),
        needed_from("lightning"),
    ):
        import no_such_framework  # type: ignore[import-not-found]  # noqa: F401, PLC0415


class TestAddPenalty:
    def test_it_joins_the_gradient_that_is_there(self) -> None:
        gated = mlp(3, 8, 2)
        objective = swan.Objective(gated, l0=0.5)
        gated.gates.logits.grad = torch.ones(8)
        with torch.no_grad():  # as some frameworks call their hooks
            add_penalty(objective, 1.0)
        found = gated.gates.logits.grad.clone()
        gated.gates.logits.grad = None
        objective(1.0).backward()
        torch.testing.assert_close(found, 1 + gated.gates.logits.grad)
        add_penalty(objective, 1.0)
        torch.testing.assert_close(2 * (found - 1), gated.gates.logits.grad)

    def test_without_a_gradient_it_is_the_gradient(self) -> None:
        gated = mlp(3, 8, 2)
        add_penalty(swan.Objective(gated, l0=0.5), 1.0)
        assert bool((gated.gates.logits.grad > 0).all())

    def test_under_curvature_the_gates_move_and_the_optimizer_sees_zero(self) -> None:
        gated = mlp(3, 8, 2).train()
        objective = swan.Objective(gated, macs=0.5)
        gated(torch.randn(4, 3)).square().mean().backward()
        add_penalty(objective, 1.0)
        assert not bool(gated.gates.logits.grad.any())
        assert int(gated.gates.open_mask().sum()) == 4


class TestFinish:
    @pytest.mark.parametrize("name", ["resnet_projection", "vgg", "densenet"])
    @pytest.mark.parametrize("learning", ["curvature", "gradient"])
    def test_budget_met_though_the_ramp_is_not_over(self, name, learning) -> None:
        gated = zoo_gated(name).train()
        ramp = swan.CosineRamp(0, 100)
        objective = swan.Objective(gated, macs=0.5, learning=learning, ramp=ramp)
        objective(1)
        total = swan.count_macs(gated, gated.example_inputs)
        assert swan.hard_macs(gated) > 0.5 * total
        small = finish(objective, [torch.randn(4, 3, 8, 8)], inputs_of=None, num_batches=None)
        assert swan.count_macs(small, gated.example_inputs) == swan.hard_macs(gated) <= 0.5 * total
        x = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(small.eval()(x), gated.eval()(x), rtol=1e-4, atol=1e-5)

    def test_gates_within_the_budget_stay_as_they_are(self) -> None:
        gated = mlp(3, 8, 2)
        objective = swan.Objective(gated, macs=0.5)
        objective(1)
        before = gated.gates.logits.detach().clone()
        finish(objective, None, inputs_of=None, num_batches=None)
        assert torch.equal(gated.gates.logits.detach(), before)

    def test_calibrated_on_what_inputs_of_takes_from_so_many_batches(self) -> None:
        gated = zoo_gated("resnet_projection")
        batches = [{"pixels": torch.randn(4, 3, 8, 8) + i} for i in range(3)]
        small = finish(
            swan.Objective(gated, l0=0.1), batches, inputs_of=lambda b: b["pixels"], num_batches=2
        )
        twin = zoo_gated("resnet_projection")
        swan.calibrate(twin, [batch["pixels"] for batch in batches[:2]])
        wanted = swan.prune(twin).state_dict()
        for key, value in small.state_dict().items():
            torch.testing.assert_close(value, wanted[key])
        assert swan.count_params(small) < swan.count_params(gated.model)

    def test_without_statistics_no_batch_is_read(self) -> None:
        class Unreadable:
            def __iter__(self):
                raise AssertionError("read")

        finish(swan.Objective(mlp(3, 8, 2), l0=0.1), Unreadable(), inputs_of=None, num_batches=None)


def test_a_model_that_is_not_trained_is_refused() -> None:
    gated = mlp(3, 4, 2)
    check_inside(swan.Objective(gated, l0=0.1), nn.Sequential(nn.ReLU(), gated))
    with pytest.raises(swan.ModelError, match="is no part of Sequential, which is trained"):
        check_inside(swan.Objective(gated, l0=0.1), nn.Sequential(mlp(3, 4, 2)))
