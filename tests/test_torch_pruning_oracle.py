"""Torch-Pruning's DependencyGraph is the oracle: on classic networks its groups are our units."""

import random
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
import torchvision
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.channels import PINNED, ChannelMap
from tests.zoo import ZOO


Slots = set[tuple[str, int, int]]


def oracle_slots(graph: tp.DependencyGraph, model: nn.Module, name: str, index: int) -> Slots:
    """What Torch-Pruning removes together with one output channel of a layer."""
    layer = model.get_submodule(name)
    names = {module: found for found, module in model.named_modules()}
    function = (
        tp.prune_linear_out_channels
        if isinstance(layer, nn.Linear)
        else tp.prune_depthwise_conv_out_channels
        if layer.groups == layer.out_channels > 1
        else tp.prune_conv_out_channels
    )
    found: Slots = set()
    for dependency, indices in graph.get_pruning_group(layer, function, idxs=[index]):
        target = dependency.target.module
        if target not in names:
            continue  # an element-wise operation has nothing to remove
        found |= _slots_of(
            names[target], target, int(graph.is_out_channel_pruning_fn(dependency.handler)), indices
        )
    return found


def _slots_of(name: str, module: nn.Module, is_out: int, indices: list[int]) -> Slots:
    found: Slots = set()
    transposed = bool(getattr(module, "transposed", False))
    depthwise = isinstance(module, nn.Conv2d) and module.groups == module.out_channels > 1
    for index in indices:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            found |= {(f"{name}.{part}", 0, index) for part in ("weight", "bias")}
            found |= {(f"{name}.{part}", 0, index) for part in ("running_mean", "running_var")}
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            if is_out or depthwise:
                found.add((f"{name}.weight", int(transposed), index))
                if module.bias is not None:
                    found.add((f"{name}.bias", 0, index))
            else:
                found.add((f"{name}.weight", int(not transposed), index))
        else:
            raise TypeError(f"no slots known for {type(module).__name__}")
    return found


def compare(model: nn.Module, x: Tensor, num_layers: int | None = None) -> None:
    """Every gated layer (or a sample of them), first, middle and last channel."""
    channels = swan.channel_map(model, x)
    for parameter in model.parameters():
        parameter.requires_grad_()  # Torch-Pruning traces through autograd
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
    gated = [layer for layer in channels.layers if layer.out_units.count(PINNED) == 0]
    assert gated
    if num_layers is not None and num_layers < len(gated):
        gated = random.Random(0).sample(gated, num_layers)  # noqa: S311 - a sample, no secret
    for layer in gated:
        for index in sorted({0, len(layer.out_units) // 2, len(layer.out_units) - 1}):
            ours = set(channels.slots(layer.out_units[index]))
            assert ours == oracle_slots(graph, model, layer.name, index), f"{layer.name}[{index}]"
    assert_outputs_agree(channels, model)


def assert_outputs_agree(channels: ChannelMap, model: nn.Module) -> None:
    """What we pin, in models without a special mechanism, is the output alone."""
    assert {pin.op for pin in channels.pins} == {"output"}


class ResidualChain(nn.Module):
    """Two residual blocks on one trunk, then a wider trunk by projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.wide, self.short = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.one(x))
        x = F.relu(x + self.two(x))
        x = F.relu(self.wide(x) + self.short(x))
        return self.fc(x.mean((2, 3)))


class SmallDenseNet(nn.Module):
    """torchvision's DenseNet121 block structure in small."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torchvision.models.DenseNet(
            growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=2, num_classes=3
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


CHAIN = nn.Sequential(
    nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(),
    nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 3),
)  # fmt: skip
SMALL: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "chain": lambda: (CHAIN.eval(), torch.randn(2, 3, 8, 8)),
    "residual": lambda: (ResidualChain().eval(), torch.randn(2, 3, 8, 8)),
    "small_densenet": lambda: (SmallDenseNet().eval(), torch.randn(2, 3, 32, 32)),
}
FROM_ZOO = (
    "vgg", "resnet_projection", "resnet_preactivation", "densenet", "inverted_residual",
    "inception", "unet", "squeeze_excite",
)  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_units_are_the_oracle_s_groups_on_small_networks(name: str) -> None:
    compare(*SMALL[name]())


@pytest.mark.parametrize("name", FROM_ZOO)
def test_units_are_the_oracle_s_groups_on_the_zoo(name: str) -> None:
    model, (x,) = ZOO[name]()
    compare(model, x)


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        *(
            pytest.param(name, marks=pytest.mark.thorough)
            for name in ("resnet50", "mobilenet_v2", "vgg11_bn", "densenet121")
        ),
    ],
)
def test_units_are_the_oracle_s_groups_on_torchvision(name: str) -> None:
    model = torchvision.models.get_model(name, weights=None, num_classes=10).eval()
    compare(model, torch.randn(1, 3, 64, 64), num_layers=6)


def test_the_comparison_can_fail() -> None:
    model, x = ResidualChain().eval(), torch.randn(2, 3, 8, 8)
    channels = swan.channel_map(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
    ours = set(channels.slots(channels.layer("stem").out_units[1]))
    assert ours == oracle_slots(graph, model, "stem", 1)
    assert ours != oracle_slots(graph, model, "stem", 2)
    assert ours != oracle_slots(graph, model, "wide", 1)
