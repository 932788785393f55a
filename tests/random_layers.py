"""The parts random networks are made of: the block registry, activations, conv-norm stacks, random parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d


Shape = tuple[int, int, int]  # C, H, W of one sample
Option = int | float | bool | str | None


@dataclass(frozen=True)
class Kind:
    """A block or head class and, per constructor option, the values to draw from (simplest first)."""

    factory: type[nn.Module]
    options: Mapping[str, tuple[Option, ...]]
    easy: bool  # one of the mechanisms whose laws must hold without pins


BLOCKS: dict[str, Kind] = {}
HEADS: dict[str, Kind] = {}
WIDTHS = (2, 3, 4, 5, 6)
BOTH = (False, True)


def register(table: dict[str, Kind], name: str, *, easy: bool = False, **options):
    """Class decorator: draw `name` with these options; refuses a name that is taken."""

    def add(factory: type[nn.Module]) -> type[nn.Module]:
        if name in table:
            raise ValueError(f"{name!r} is registered twice")
        table[name] = Kind(factory, {key: tuple(values) for key, values in options.items()}, easy)
        return factory

    return add


class Call(nn.Module):
    """A functional activation in module clothes; fx sees the function, not this module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "relu": lambda _: nn.ReLU(),
    "none": lambda _: nn.Identity(),
    "relu_inplace": lambda _: nn.ReLU(inplace=True),
    "f_relu": lambda _: Call(F.relu),
    "f_relu_inplace": lambda _: Call(lambda x: F.relu(x, inplace=True)),
    "method_relu_": lambda _: Call(lambda x: x.relu_()),
    "torch_relu": lambda _: Call(torch.relu),
    "relu6": lambda _: nn.ReLU6(inplace=True),
    "leaky_relu": lambda _: nn.LeakyReLU(0.1),
    "gelu": lambda _: nn.GELU(),
    "f_gelu_tanh": lambda _: Call(lambda x: F.gelu(x, approximate="tanh")),
    "silu": lambda _: nn.SiLU(inplace=True),
    "mish": lambda _: nn.Mish(),
    "hardswish": lambda _: nn.Hardswish(),
    "hardtanh": lambda _: nn.Hardtanh(),
    "elu": lambda _: nn.ELU(),
    "tanh": lambda _: nn.Tanh(),
    "method_tanh": lambda _: Call(lambda x: x.tanh()),
    "prelu": nn.PReLU,
    "prelu_shared": lambda _: nn.PReLU(),
    "sigmoid": lambda _: nn.Sigmoid(),
    "f_sigmoid": lambda _: Call(torch.sigmoid),
    "hardsigmoid": lambda _: nn.Hardsigmoid(),
    "softplus": lambda _: nn.Softplus(),
    "f_threshold": lambda _: Call(lambda x: F.threshold(x, -0.1, 0.2)),
}


def stride_for(shape: Shape, stride: int) -> int:
    """The stride, but 1 on a map already small: no axis ever falls below 2."""
    return stride if shape[1] >= 4 else 1


def conv_stack(
    in_channels: int,
    out_channels: int,
    *,
    kernel: int = 3,
    stride: int = 1,
    bn: bool = True,
    activation: str = "relu",
    **conv_options,
) -> nn.Sequential:
    """Convolution, optional batch-norm, activation: [B, C, H, W] -> [B, C', H/stride, W/stride]."""
    conv_options.setdefault("padding", kernel // 2)
    conv_options.setdefault("bias", not bn)
    layers: list[nn.Module] = [nn.Conv2d(in_channels, out_channels, kernel, stride, **conv_options)]
    if bn:
        layers.append(nn.BatchNorm2d(out_channels))
    layers.append(ACTIVATIONS[activation](out_channels))
    return nn.Sequential(*layers)


def entry(shape: Shape, width: int, *, own: bool, multiple: int = 1) -> tuple[nn.Module, int]:
    """What a block puts before itself: its own convolution, or the trunk where its width divides."""
    if not own and shape[0] % multiple == 0:
        return nn.Identity(), shape[0]
    return conv_stack(shape[0], multiple * width), multiple * width


_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    FrozenBatchNorm2d,
)
# Parameters of these names multiply: near zero, they would hide what they meet.
_FACTORS = ("gamma", "alpha")


def _fill_factor(factor: Tensor, generator: torch.Generator) -> None:
    factor.uniform_(0.5, 1.5, generator=generator)
    flipped = torch.rand(factor.shape, generator=generator) < 0.25
    factor[flipped] *= -1


def _fill_norm(norm: nn.Module, generator: torch.Generator) -> None:
    if norm.weight is not None:
        _fill_factor(norm.weight, generator)
    if getattr(norm, "bias", None) is not None:
        norm.bias.normal_(0, 0.3, generator=generator)
    if getattr(norm, "running_mean", None) is not None:
        norm.running_mean.normal_(0, 0.3, generator=generator)
        norm.running_var.uniform_(0.5, 1.5, generator=generator)


def _fill_parameters(module: nn.Module, generator: torch.Generator) -> None:
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    for name, parameter in module.named_parameters(recurse=False):
        if name in _FACTORS or (name == "weight" and parameter.dim() < 2):
            _fill_factor(parameter, generator)
            continue
        if parameter.dim() < 2:
            parameter.normal_(0, 0.3, generator=generator)
            continue
        num_outputs = module.out_channels if transposed else parameter.shape[0]
        fan_in = max(parameter.numel() // num_outputs, 1)
        if num_outputs == 1 and name != "weight":
            fan_in = 4  # no matrix: one embedding or offset for every sample
        parameter.normal_(0, fan_in**-0.5, generator=generator)


@torch.no_grad()
def randomise_(model: nn.Module, generator: torch.Generator) -> None:
    """Fill every parameter and running statistic so that activations stay of order one."""
    for module in model.modules():
        if isinstance(module, _NORMS):
            _fill_norm(module, generator)
        elif isinstance(module, nn.PReLU):
            module.weight.uniform_(0.05, 0.5, generator=generator)
        else:
            _fill_parameters(module, generator)
