"""`cut_` removes positions from tensors; Torch-Pruning's per-layer functions are the oracle."""

import copy

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from swan_surgery.models.slicing import cut_


def kept(size: int, gone: list[int]) -> Tensor:
    return torch.tensor([i for i in range(size) if i not in gone])


class One(nn.Module):
    """A single layer under the name `layer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def cut_layer(layer: nn.Module, **axes: dict[int, Tensor]) -> nn.Module:
    """A cut copy of a layer; keywords are tensor names."""
    model = One(copy.deepcopy(layer))
    cut_(model, {f"layer.{name}": axes[name] for name in axes})
    return model.layer


def assert_same_layer(one: nn.Module, two: nn.Module) -> None:
    first, second = one.state_dict(), two.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    for name in (
        "in_channels",
        "out_channels",
        "groups",
        "in_features",
        "out_features",
        "num_features",
        "num_parameters",
    ):
        assert getattr(one, name, None) == getattr(two, name, None), name


CONVS = [
    nn.Conv1d(5, 6, 3),
    nn.Conv2d(5, 6, 3),
    nn.Conv2d(5, 6, (1, 3), bias=False),
    nn.Conv3d(5, 6, 1),
]
TRANSPOSED = [nn.ConvTranspose1d(5, 6, 2), nn.ConvTranspose2d(5, 6, 3, bias=False)]


@pytest.mark.parametrize("layer", [*CONVS, *TRANSPOSED], ids=repr)
def test_outputs_of_convolutions_match_the_oracle(layer: nn.Module) -> None:
    gone = [0, 3, 5]
    keep = kept(6, gone)
    cuts = {"weight": {1 if layer.transposed else 0: keep}}
    if layer.bias is not None:
        cuts["bias"] = {0: keep}
    wanted = tp.prune_conv_out_channels(copy.deepcopy(layer), list(gone))
    assert_same_layer(cut_layer(layer, **cuts), wanted)


@pytest.mark.parametrize("layer", [*CONVS, *TRANSPOSED], ids=repr)
def test_inputs_of_convolutions_match_the_oracle(layer: nn.Module) -> None:
    gone = [1, 4]
    cuts = {"weight": {0 if layer.transposed else 1: kept(5, gone)}}
    wanted = tp.prune_conv_in_channels(copy.deepcopy(layer), list(gone))
    assert_same_layer(cut_layer(layer, **cuts), wanted)


def test_depthwise_convolution_matches_the_oracle() -> None:
    layer = nn.Conv2d(6, 6, 3, groups=6)
    gone = [2, 3]
    wanted = tp.prune_depthwise_conv_out_channels(copy.deepcopy(layer), list(gone))
    keep = kept(6, gone)
    result = cut_layer(layer, weight={0: keep}, bias={0: keep})
    assert_same_layer(result, wanted)
    assert result.groups == 4


@pytest.mark.parametrize("layer", [nn.Linear(5, 6), nn.Linear(5, 6, bias=False)], ids=repr)
def test_linear_matches_the_oracle(layer: nn.Linear) -> None:
    gone = [0, 2]
    cuts = {"weight": {0: kept(6, gone)}}
    if layer.bias is not None:
        cuts["bias"] = {0: kept(6, gone)}
    wanted = tp.prune_linear_out_channels(copy.deepcopy(layer), list(gone))
    assert_same_layer(cut_layer(layer, **cuts), wanted)
    wanted = tp.prune_linear_in_channels(copy.deepcopy(layer), list(gone))
    assert_same_layer(cut_layer(layer, weight={1: kept(5, gone)}), wanted)


def test_batch_norm_matches_the_oracle() -> None:
    layer = nn.BatchNorm2d(6)
    nn.init.normal_(layer.weight)
    layer.running_mean.normal_()
    gone = [1, 5]
    keep = kept(6, gone)
    names = ("weight", "bias", "running_mean", "running_var")
    result = cut_layer(layer, **{name: {0: keep} for name in names})
    assert_same_layer(result, tp.prune_batchnorm_out_channels(copy.deepcopy(layer), list(gone)))
    assert result.num_features == 4


def test_prelu_matches_the_oracle() -> None:
    layer = nn.PReLU(6)
    nn.init.normal_(layer.weight)
    wanted = tp.function.prune_prelu_out_channels(copy.deepcopy(layer), [0, 4])
    assert_same_layer(cut_layer(layer, weight={0: kept(6, [0, 4])}), wanted)


def test_grouped_convolution_keeps_its_groups_and_computes_the_sliced_function() -> None:
    layer = nn.Conv2d(6, 8, 3, groups=2, dtype=torch.float64)
    rows = torch.tensor([0, 2, 4, 6])  # positions 0 and 2 of each group of four
    columns = torch.tensor([0, 2])  # of the three inputs of each group
    result = cut_layer(layer, weight={0: rows, 1: columns}, bias={0: rows})
    assert (result.groups, result.in_channels, result.out_channels) == (2, 4, 4)
    x = torch.randn(1, 6, 5, 5, dtype=torch.float64)
    x[:, [1, 4]] = 0
    assert torch.allclose(result(x[:, [0, 2, 3, 5]]), layer(x)[:, rows], rtol=1e-12, atol=1e-12)


def test_depthwise_with_multiplier_keeps_the_multiplier() -> None:
    layer = nn.Conv2d(3, 6, 3, groups=3, dtype=torch.float64)
    rows = torch.tensor([0, 1, 4, 5])
    result = cut_layer(layer, weight={0: rows}, bias={0: rows})
    assert (result.groups, result.in_channels, result.out_channels) == (2, 2, 4)
    x = torch.randn(1, 3, 5, 5, dtype=torch.float64)
    assert torch.allclose(result(x[:, [0, 2]]), layer(x)[:, rows], rtol=1e-12, atol=1e-12)


def test_depthwise_cut_to_a_single_channel_still_runs() -> None:
    layer = nn.Conv2d(3, 3, 3, groups=3, bias=False)
    result = cut_layer(layer, weight={0: torch.tensor([1])})
    assert (result.groups, result.in_channels, result.out_channels) == (1, 1, 1)
    x = torch.randn(1, 3, 5, 5)
    assert torch.allclose(result(x[:, 1:2]), layer(x)[:, 1:2], atol=1e-6)


def test_grouped_transposed_convolution_computes_the_sliced_function() -> None:
    layer = nn.ConvTranspose2d(4, 6, 2, groups=2, dtype=torch.float64)
    rows = torch.tensor([0, 2])  # one input of each group
    columns = torch.tensor([0, 2])  # of three outputs of each group
    bias = torch.tensor([0, 2, 3, 5])
    result = cut_layer(layer, weight={0: rows, 1: columns}, bias={0: bias})
    assert (result.groups, result.in_channels, result.out_channels) == (2, 2, 4)
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    x[:, [1, 3]] = 0
    assert torch.allclose(result(x[:, rows]), layer(x)[:, bias], rtol=1e-12, atol=1e-12)


def test_depthwise_transposed_convolution_computes_the_sliced_function() -> None:
    layer = nn.ConvTranspose2d(4, 4, 2, groups=4, dtype=torch.float64)
    rows = torch.tensor([1, 2])
    result = cut_layer(layer, weight={0: rows}, bias={0: rows})
    assert (result.groups, result.in_channels, result.out_channels) == (2, 2, 2)
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    assert torch.allclose(result(x[:, rows]), layer(x)[:, rows], rtol=1e-12, atol=1e-12)


def test_frozen_batch_norm_s_buffers_are_cut_too() -> None:
    keep = torch.tensor([0, 3])
    names = ("weight", "bias", "running_mean", "running_var")
    result = cut_layer(FrozenBatchNorm2d(4), **{name: {0: keep} for name in names})
    assert result(torch.zeros(1, 2, 3, 3)).shape == (1, 2, 3, 3)


@pytest.mark.parametrize("position", [-1, 6, 100])
def test_a_position_outside_the_axis_is_refused(position: int) -> None:
    layer = One(nn.Conv2d(3, 6, 3))
    before = layer.layer.weight.clone()
    with pytest.raises(IndexError, match="axis 0 of size 6"):
        cut_(layer, {"layer.weight": {0: torch.tensor([0, position])}})
    assert torch.equal(layer.layer.weight, before)


def test_the_oracle_does_not_refuse_positions_outside_the_axis() -> None:
    """Torch-Pruning skips them in silence: why we check indices ourselves."""
    assert tp.prune_conv_out_channels(nn.Conv2d(3, 6, 3), [99]).weight.shape[0] == 6


class Tied(nn.Module):
    """Two modules with one parameter, and the parameter under a third name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
        self.second.weight = self.first.weight
        self.register_parameter("alias", self.first.weight)


def test_tied_parameters_stay_tied() -> None:
    model = Tied()
    wanted = model.first.weight[[1, 4]].clone()
    cut_(model, {"alias": {0: torch.tensor([1, 4])}})  # named by its first name
    assert model.first.weight is model.second.weight
    assert model.alias is model.first.weight
    assert torch.equal(model.alias, wanted)
    assert (model.first.out_features, model.second.out_features) == (2, 2)


def test_a_module_registered_twice_is_cut_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 6)})
    model["b"] = model["a"]
    cut_(model, {"a.weight": {0: torch.tensor([0, 5])}, "a.bias": {0: torch.tensor([0, 5])}})
    assert model["a"] is model["b"]
    assert model["b"].weight.shape == (2, 4)
    assert model["b"].bias.shape == (2,)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_requires_grad_stays(requires_grad: bool) -> None:
    layer = nn.Conv2d(3, 6, 3).requires_grad_(requires_grad)
    result = cut_layer(layer, weight={0: torch.tensor([1, 2])}, bias={0: torch.tensor([1, 2])})
    assert [p.requires_grad for p in result.parameters()] == [requires_grad] * 2


def test_the_oracle_loses_requires_grad() -> None:
    """Torch-Pruning makes frozen weights trainable again: why slicing is our own."""
    layer = nn.Conv2d(3, 6, 3).requires_grad_(requires_grad=False)
    assert tp.prune_conv_out_channels(layer, [0]).weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_stays(dtype: torch.dtype) -> None:
    assert (
        cut_layer(nn.Linear(4, 6, dtype=dtype), weight={0: torch.tensor([1])}).weight.dtype == dtype
    )


@pytest.mark.parametrize(
    ("layer", "layout"),
    [
        (nn.Conv2d(4, 6, 3), torch.channels_last),
        (nn.Conv3d(4, 6, 3), torch.channels_last_3d),
    ],
    ids=["2d", "3d"],
)
def test_channels_last_stays(layer: nn.Module, layout: torch.memory_format) -> None:
    layer = layer.to(memory_format=layout)
    result = cut_layer(layer, weight={0: torch.tensor([0, 3]), 1: torch.tensor([1, 2])})
    assert result.weight.is_contiguous(memory_format=layout)
    assert not result.weight.is_contiguous()
    assert torch.equal(result.weight, layer.weight[[0, 3]][:, [1, 2]])


def test_plain_layout_stays_plain() -> None:
    result = cut_layer(nn.Conv2d(4, 6, 3), weight={1: torch.tensor([1, 2])})
    assert result.weight.is_contiguous()


def test_the_result_shares_no_memory_with_what_was_cut() -> None:
    model = One(nn.Linear(4, 6))
    before = model.layer.weight
    cut_(model, {"layer.weight": {0: torch.arange(6)}})
    assert model.layer.weight.data_ptr() != before.data_ptr()
    assert torch.equal(model.layer.weight, before)


def test_gradients_are_dropped_and_what_is_not_named_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    model(torch.ones(1, 4)).sum().backward()
    untouched = model[1].bias
    cut_(model, {"0.weight": {0: torch.tensor([0])}, "0.bias": {0: torch.tensor([0])}})
    assert model[0].weight.grad is None
    assert model[1].bias is untouched
    assert untouched.grad is not None


def test_cutting_works_on_meta() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, device="meta"))
    cut_(model, {"0.weight": {0: torch.tensor([2, 3])}})
    assert model[0].weight.shape == (2, 3, 3, 3)
    assert model[0].weight.is_meta


def test_cutting_composes() -> None:
    layer = nn.Linear(4, 6)
    first, second = torch.tensor([0, 2, 3, 5]), torch.tensor([1, 3])
    twice = cut_layer(cut_layer(layer, weight={0: first}), weight={0: second})
    assert torch.equal(twice.weight, cut_layer(layer, weight={0: first[second]}).weight)
