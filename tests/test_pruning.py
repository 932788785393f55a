"""`prune`: the smaller model is of the given kind and computes what the hard gates computed."""

import copy

import pytest
import torch
import torch.nn.utils.prune
import torchvision
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.cutting.plan import make_plan
from swan_surgery.cutting.step import apply_plan
from tests.closing import learnt_
from tests.gated_zoo import closed_zoo
from tests.zoo import ZOO


def assert_close(one, two) -> None:
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("name", sorted(ZOO))
def test_closed_equals_cut(name, share) -> None:
    gated = closed_zoo(name, share=share)
    small = swan.prune(gated)
    inputs = gated.example_inputs.args
    assert type(small) is type(gated.model)
    assert small.state_dict().keys() == gated.model.state_dict().keys()
    assert swan.count_params(small) < swan.count_params(gated.model)
    assert_close(small(*inputs), gated(*inputs))
    generator = torch.Generator().manual_seed(77)  # and on other data, and another batch size
    other = [torch.randn(3, *x.shape[1:], generator=generator, dtype=x.dtype) for x in inputs]
    assert_close(small(*other), gated(*other))


@pytest.mark.parametrize("name", ["resnet_projection", "densenet", "multi_output"])
def test_closed_equals_cut_in_training_too(name) -> None:
    gated = closed_zoo(name)
    small = swan.prune(gated).train()
    gated.train()
    inputs = gated.example_inputs.args
    assert_close(small(*inputs), gated(*inputs))


def test_dense_weights_survive_bit_for_bit() -> None:
    gated = closed_zoo("vgg")
    small = swan.prune(gated)
    kept = [unit in make_plan(gated.channels, gated.gates.open_mask()).open_units
            for unit in gated.channels.layer("features.0").out_units]  # fmt: skip
    wanted = gated.model.features[0].weight[torch.tensor(kept)]
    assert torch.equal(small.features[0].weight, wanted)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_width_attributes_follow_the_tensors(name) -> None:
    for module in swan.prune(closed_zoo(name)).modules():
        if isinstance(module, nn.Conv2d):
            out_channels, in_channels = module.weight.shape[:2]
            assert (module.out_channels, module.in_channels // module.groups) == (
                out_channels,
                in_channels,
            )
        elif isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == module.weight.shape
        elif isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(module.weight) == len(module.running_var)


def test_all_open_is_identity() -> None:
    gated = closed_zoo("resnet_projection", share=0.0)
    small = swan.prune(gated)
    for name, tensor in gated.model.state_dict().items():
        assert torch.equal(small.state_dict()[name], tensor)


def test_the_result_can_be_gated_and_cut_again() -> None:
    gated = closed_zoo("densenet", share=0.4)
    small = swan.prune(gated)
    again = swan.swanify(small, gated.example_inputs)
    with torch.no_grad():
        again.gates.logits.copy_(torch.randn(again.gates.num_units))
    smaller = swan.prune(again)
    assert swan.count_params(smaller) < swan.count_params(small)
    assert_close(smaller(*gated.example_inputs.args), again.eval()(*gated.example_inputs.args))


def test_cutting_composes() -> None:
    gated = closed_zoo("resnet_projection", share=0.4)
    gated.gates.min_width = 2  # a layer of one channel has no gate
    first = gated.gates.open_mask()
    small = swan.prune(gated)
    second = first.clone()
    for group in gated.channels.unit_groups:  # then close the first open unit of each group
        own = [unit for unit in group if first[unit]]
        if len(own) > 1:
            second[own[0]] = False
    again = swan.swanify(small, gated.example_inputs)
    with torch.no_grad():
        again.gates.logits.copy_(torch.where(second[first], 3.0, -3.0))
    twice = swan.prune(again)
    with gated.gates.holding(second):
        once = swan.prune(gated)
    for name, tensor in once.state_dict().items():
        assert torch.equal(tensor, twice.state_dict()[name])


def test_the_pruned_model_trains() -> None:
    small = swan.prune(closed_zoo("resnet_projection")).train()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    before = small.fc.weight.detach().clone()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small(x).square().sum().backward()
    optimizer.step()
    assert all(parameter.grad is not None for parameter in small.parameters())
    assert not torch.equal(small.fc.weight, before)


def test_no_gate_is_left_and_nothing_is_shared() -> None:
    gated = closed_zoo("vgg")
    small = swan.prune(gated)
    assert not any("swan_surgery" in type(module).__module__ for module in small.modules())
    pointers = {t.data_ptr() for t in gated.state_dict().values() if t.numel()}
    assert not pointers & {t.data_ptr() for t in small.state_dict().values() if t.numel()}


@pytest.mark.parametrize("macs", [0.3, 0.5, 0.8])
def test_the_budget_in_real_macs(macs) -> None:
    gated = closed_zoo("resnet_option_a", share=0.0)
    inputs = gated.example_inputs
    small = swan.prune(gated, macs=macs)
    total, now = swan.count_macs(gated, inputs), swan.count_macs(small, inputs)
    assert now <= macs * total
    assert now >= macs * total - float(swan.marginal_macs(gated).max())
    # The given gates did not move.
    assert gated.gates.threshold == 0.5
    assert bool(gated.gates.open_mask().all())


def test_a_budget_above_what_is_open_opens_units_again() -> None:
    gated = closed_zoo("vgg", share=0.8)
    assert swan.count_params(swan.prune(gated, macs=1.0)) == swan.count_params(gated.model)


def test_a_plan_fits_any_copy_of_the_model() -> None:
    gated = closed_zoo("inception")
    plan = make_plan(gated.channels, gated.gates.open_mask())
    text = swan.PruningPlan.from_json(plan.to_json())
    base = copy.deepcopy(swan.unswanify(gated))
    cut = apply_plan(base, text)
    x = gated.example_inputs.args[0]
    assert_close(cut(x), gated(x))
    assert swan.count_params(base) > swan.count_params(cut)


def test_norms_without_tensors_follow_without_a_warning(recwarn) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1)
    ).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    gated = swan.swanify(model, x).eval()
    with torch.no_grad():
        gated.gates.logits[:4] = -3.0
    small = swan.prune(gated)
    assert small[1].num_features == 2
    assert_close(small(x), gated(x))
    assert not recwarn.list


def test_depthwise_groups_follow() -> None:
    small = swan.prune(closed_zoo("inverted_residual"))
    depthwise = small.block[1][0][0]
    assert depthwise.groups == depthwise.in_channels == depthwise.out_channels < 8


@pytest.mark.thorough
@pytest.mark.parametrize("verify", [True, False])
def test_resnet18(verify) -> None:
    x = torch.randn(2, 3, 64, 64)
    gated = swan.swanify(torchvision.models.resnet18(), x).eval()
    small = swan.prune(gated, macs=0.5, verify=verify, round_to=8)
    assert isinstance(small, torchvision.models.ResNet)
    assert swan.count_macs(small, x) <= 0.5 * swan.count_macs(gated, x)
    out: Tensor = small.eval()(x)
    assert out.shape == (2, 1000)


def test_bare_parameters_and_buffers_are_cut() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)
            self.gamma = nn.Parameter(torch.rand(6, 1, 1))
            self.register_buffer("mean", torch.zeros(1, 6, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.last((self.first(x) - self.mean) * self.gamma)

    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    gated = swan.swanify(Scaled().double(), x).eval()
    with torch.no_grad():
        gated.gates.logits[[1, 4]] = -3.0
    small = swan.prune(gated)
    assert small.gamma.shape == (4, 1, 1)
    assert isinstance(small.gamma, nn.Parameter)
    assert small.mean.shape == (1, 4, 1, 1)
    assert "mean" in dict(small.named_buffers())
    assert_close(small(x), gated(x))


def test_what_is_cut_in_inference_mode_can_be_trained() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    x = torch.randn(2, 3, 6, 6)
    with torch.inference_mode():
        small = swan.prune(learnt_(swan.swanify(model, x)), macs=0.5)
    small(x).sum().backward()
    assert all(bool(p.grad.any()) for p in small.parameters())


@pytest.mark.parametrize("score", [0.0, 2.0])
def test_scores_that_do_not_choose_are_warned_about(score) -> None:
    gated = swan.swanify(
        nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(1, 3)
    )
    with pytest.warns(swan.SwanWarning, match=f"all 8 scores are {score:g}"):
        swan.prune_by_score(gated, torch.full((8,), score), macs=0.5)


def test_a_masked_model_is_refused_with_the_way_out() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    torch.nn.utils.prune.ln_structured(model[0], "weight", 0.5, 2, 0)
    with pytest.raises(swan.ModelError, match=r"'0\.weight' is masked .*prune\.remove"):
        swan.swanify(model, torch.randn(1, 3, 6, 6))
    torch.nn.utils.prune.remove(model[0], "weight")
    assert swan.swanify(model, torch.randn(1, 3, 6, 6)).gates.num_units == 8
