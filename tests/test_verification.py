"""Verification finds what was cut wrongly, and names the first module that computes something else."""

import math

import pytest
import torch
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.cutting.plan import make_plan
from swan_surgery.cutting.step import apply_plan_
from swan_surgery.cutting.verification import (
    first_difference,
    relative_error,
    tensor_error,
    verify_pruned,
)
from swan_surgery.gates import GatedModel
from tests.fingerprints import assert_same_fingerprint, fingerprint
from tests.gated_zoo import drawn_zoo
from tests.zoo import ZOO


def cut(name: str = "resnet_projection", dtype: torch.dtype = torch.float64):
    gated = drawn_zoo(name, dtype=dtype)
    plan = make_plan(gated.channels, gated.gates.open_mask())
    return gated, swan.prune(gated, verify=False), plan


@pytest.mark.parametrize("name", sorted(ZOO))
def test_a_right_cut_passes(name) -> None:
    assert verify_pruned(*cut(name)) <= 1e-9


@pytest.mark.parametrize(
    ("dtype", "worst"),
    [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 1e-9), (torch.float16, 1e-9)],
)
def test_every_precision(dtype, worst) -> None:
    gated, small, plan = cut(dtype=dtype)
    before = fingerprint(gated), fingerprint(small)
    assert verify_pruned(gated, small, plan) <= worst  # half precision is decided in float64
    assert_same_fingerprint(before[0], fingerprint(gated))
    assert_same_fingerprint(before[1], fingerprint(small))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["stem.0", "reduce.0", "middle.0", "expand.0", "downsample.0", "second.2.0", "fc"]
)
def test_a_weight_that_was_changed_names_its_module(name, dtype) -> None:
    gated, small, plan = cut(dtype=dtype)
    with torch.no_grad():
        small.get_submodule(name).weight.view(-1)[0] += 1
    before = fingerprint(gated), fingerprint(small)
    with pytest.raises(swan.VerificationError, match=rf"in module '{name}'.*ignore=") as caught:
        verify_pruned(gated, small, plan)
    assert caught.value.module == name
    assert_same_fingerprint(before[0], fingerprint(gated))
    assert_same_fingerprint(before[1], fingerprint(small))


def test_the_first_of_two_is_named() -> None:
    gated, small, plan = cut()
    with torch.no_grad():
        small.fc.weight[0, 0] += 1
        small.expand[0].weight[0, 0] += 1
    with pytest.raises(swan.VerificationError) as caught:
        verify_pruned(gated, small, plan)
    assert caught.value.module == "expand.0"


def test_channels_in_another_order_are_found() -> None:
    gated, small, plan = cut("unet")
    with torch.no_grad():
        first = small.up
        assert first.out_channels > 1
        first.weight.copy_(first.weight.flip(1))  # transposed: outputs on axis 1
        first.bias.copy_(first.bias.flip(0))
    with pytest.raises(swan.VerificationError, match="in module 'up'"):
        verify_pruned(gated, small, plan)


def test_a_wrong_statistic_is_found() -> None:
    gated, small, plan = cut("vgg")
    small.features[4].running_mean[0] += 0.5
    with pytest.raises(swan.VerificationError, match=r"'classifier\.0'"):
        verify_pruned(gated, small, plan)


def test_a_layer_of_the_wrong_width_is_found() -> None:
    gated, small, plan = cut("vgg")
    small.classifier[0] = nn.Linear(3, small.classifier[0].out_features).double()
    with pytest.raises(swan.VerificationError, match="relative error inf"):
        verify_pruned(gated, small, plan)


def test_the_plan_of_other_units_is_found() -> None:
    gated, small, plan = cut("vgg")
    mask = torch.ones(plan.num_units, dtype=torch.bool)
    mask[plan.open_units[0]] = False
    with pytest.raises(swan.VerificationError):
        verify_pruned(gated, small, make_plan(gated.channels, mask))


def test_prune_raises_it(monkeypatch) -> None:
    gated, _, _ = cut("vgg")
    real = apply_plan_

    def wrong(model, plan):
        result = real(model, plan)
        result.features[3].weight.data[0] = 0
        return result

    monkeypatch.setattr("swan_surgery.cutting.pruning.apply_plan_", wrong)
    before = fingerprint(gated)
    with pytest.raises(swan.VerificationError, match=r"'features\.3'"):
        swan.prune(gated)
    assert_same_fingerprint(before, fingerprint(gated))
    swan.prune(gated, verify=False)


def test_every_output_is_compared() -> None:
    gated, small, plan = cut("multi_output")
    with torch.no_grad():
        small.map.bias[1] += 1
    with pytest.raises(swan.VerificationError, match="'map'"):
        verify_pruned(gated, small, plan)


def test_the_mode_does_not_matter() -> None:
    gated, small, plan = cut("vgg")  # it has dropout
    gated.train()
    small.train()
    gated.gates.mode = "soft"
    assert verify_pruned(gated, small, plan) <= 1e-9
    assert gated.training
    assert small.training


def test_first_difference_of_equal_models_is_the_output() -> None:
    gated, small, plan = cut("vgg")
    mask = torch.zeros(plan.num_units, dtype=torch.bool)
    mask[list(plan.open_units)] = True
    assert first_difference(gated, small, mask, gated.example_inputs) == "the output"


def test_an_activation_in_place_does_not_shift_the_blame() -> None:
    # The in-place ReLU behind classifier.0 overwrites what that layer put out, in one model only.
    gated, small, plan = cut("vgg")
    with torch.no_grad():
        small.classifier[3].bias[0] += 1
    with pytest.raises(swan.VerificationError, match=r"in module 'classifier\.3'"):
        verify_pruned(gated, small, plan)


class TestErrors:
    @pytest.mark.parametrize(
        ("one", "two", "wanted"),
        [
            ([1.0, 2.0], [1.0, 2.0], 0.0),
            ([1.0, 4.0], [1.0, 5.0], 0.25),
            ([0.0, -4.0], [1.0, -4.0], 0.25),
            ([math.nan, 4.0], [math.nan, 4.0], 0.0),
            ([math.nan, 4.0], [math.nan, 3.0], 0.25),
            ([math.nan, 4.0], [1.0, 4.0], math.inf),
            ([math.inf, 4.0], [math.inf, 4.0], 0.0),
            ([math.inf, 4.0], [-math.inf, 4.0], math.inf),
            ([1.0], [1.0, 2.0], math.inf),
            ([], [], 0.0),
        ],
    )
    def test_tensor_error(self, one, two, wanted) -> None:
        assert tensor_error(torch.tensor(one), torch.tensor(two)) == wanted

    def test_zero_against_something_is_not_equal(self) -> None:
        assert tensor_error(torch.zeros(2), torch.tensor([0.0, 1e-30])) > 1

    def test_relative_error_is_that_of_the_worst_output(self) -> None:
        gated, small, plan = cut("multi_output")
        mask = torch.zeros(plan.num_units, dtype=torch.bool)
        mask[list(plan.open_units)] = True
        inputs = gated.example_inputs
        out: dict[str, Tensor] = small(*inputs.args)
        with torch.no_grad():
            small.map.bias += 0.25
        wanted = 0.25 / float(out["map"].detach().abs().max())
        assert relative_error(gated, small, mask, inputs) == pytest.approx(wanted)

    def test_missing_outputs_are_not_equal(self) -> None:
        gated, small, plan = cut("vgg")
        mask = torch.ones(plan.num_units, dtype=torch.bool)

        class Twice(nn.Module):
            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                return small(x), small(x)

        assert relative_error(gated, Twice(), mask, gated.example_inputs) == math.inf


def test_large_values_are_judged_relative_to_the_output() -> None:
    gated, small, plan = cut("vgg", torch.float32)
    assert isinstance(gated, GatedModel)
    with torch.no_grad():
        for model in (gated.model, small):
            model.classifier[3].weight *= 1e20
            model.classifier[3].bias *= 1e20
    assert verify_pruned(gated, small, plan) <= 1e-4


class BatchBound(nn.Module):
    """Right for one sample alone once it is cut: what a number fixed by mistake would do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)[:1]


def test_a_model_that_is_right_for_the_mapped_batch_alone_is_refused() -> None:
    model, (image,) = ZOO["vgg"]()
    gated = swan.swanify(model.double().eval(), image[:1].double())
    plan = make_plan(gated.channels, gated.gates.open_mask())
    whole = swan.prune(gated, verify=False)
    assert verify_pruned(gated, whole, plan) <= 1e-9
    with pytest.raises(swan.VerificationError, match="does not compute"):
        verify_pruned(gated, BatchBound(whole), plan)


class Shifted(nn.Module):
    """Off by a rounding error, for more than one sample only."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * (1 + 1e-11 * (len(x) > 1))


def test_the_error_is_that_of_the_worse_batch() -> None:
    model, (image,) = ZOO["vgg"]()
    gated = swan.swanify(model.double().eval(), image[:1].double())
    plan = make_plan(gated.channels, gated.gates.open_mask())
    whole = swan.prune(gated, verify=False)
    assert verify_pruned(gated, Shifted(whole), plan) == pytest.approx(1e-11, rel=0.1)
