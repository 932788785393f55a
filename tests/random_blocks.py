"""Easy blocks, first part: plain convolutions, residual blocks and concatenations."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.random_layers import (
    ACTIVATIONS,
    BLOCKS,
    BOTH,
    WIDTHS,
    Shape,
    conv_stack,
    register,
    stride_for,
)


@register(
    BLOCKS,
    "plain",
    easy=True,
    width=WIDTHS,
    kernel=(1, 3),
    stride=(1, 2),
    bn=BOTH,
    bias=BOTH,
    activation=tuple(ACTIVATIONS),
    padding=("zeros", "none", "reflect", "replicate", "circular", "same", "dilated"),
)
class Plain(nn.Module):
    def __init__(self, shape: Shape, *, width, kernel, stride, bn, bias, activation, padding):
        super().__init__()
        stride = 1 if padding == "same" else stride_for(shape, stride)
        options = {"bias": bias}
        if padding in ("reflect", "replicate", "circular"):
            options["padding_mode"] = padding
        elif padding == "same":
            options["padding"] = "same"
        elif padding == "dilated":
            options |= {"dilation": 2, "padding": kernel - 1}
        elif padding == "none" and shape[1] > 5:
            options["padding"] = 0
        self.layers = conv_stack(
            shape[0], width, kernel=kernel, stride=stride, bn=bn, activation=activation, **options
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@register(
    BLOCKS,
    "residual",
    easy=True,
    width=WIDTHS,
    keep=(True, False),
    stride=(1, 2),
    hidden=WIDTHS,
    depth=(1, 2, 3),
    bn=(True, False),
    activation=("relu", "none", "silu", "sigmoid", "relu_inplace"),
    addition=("operator", "inplace", "torch", "twice"),
)
class Residual(nn.Module):
    """Post-activation residual; `keep` asks for the identity shortcut, else it is a projection."""

    def __init__(
        self, shape: Shape, *, width, keep, stride, hidden, depth, bn, activation, addition
    ):
        super().__init__()
        stride = 1 if keep else stride_for(shape, stride)
        width = shape[0] if keep else width
        widths = [shape[0], *[hidden] * (depth - 1), width]
        stacks = [
            conv_stack(
                widths[i],
                widths[i + 1],
                stride=stride if i == 0 else 1,
                bn=bn,
                activation="relu" if i < depth - 1 else "none",
            )
            for i in range(depth)
        ]
        self.branch = nn.Sequential(*stacks)
        project = {"kernel": 1, "stride": stride, "bn": bn, "activation": "none"}
        self.shortcut = None if keep else conv_stack(shape[0], width, **project)
        self.addition = addition
        self.activation = ACTIVATIONS[activation](width)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.shortcut is None else self.shortcut(x)
        out = self.branch(x)
        if self.addition == "inplace":
            out += identity
        elif self.addition == "torch":
            out = torch.add(out, identity)
        else:
            out = identity + out
        if self.addition == "twice":
            out = out + identity
        return self.activation(out)


@register(
    BLOCKS,
    "preactivation",
    easy=True,
    width=WIDTHS,
    hidden=WIDTHS,
    stride=(1, 2),
    shortcut=("identity", "raw", "activated"),
)
class PreActivation(nn.Module):
    """BN-ReLU-conv residual whose projection reads the raw or the activated trunk."""

    def __init__(self, shape: Shape, *, width, hidden, stride, shortcut):
        super().__init__()
        if shortcut == "identity":
            width, stride = shape[0], 1
        stride = stride_for(shape, stride)
        self.bn1 = nn.BatchNorm2d(shape[0])
        self.conv1 = nn.Conv2d(shape[0], hidden, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, width, 3, 1, 1, bias=False)
        self.reads = shortcut
        if shortcut != "identity":
            self.project = nn.Conv2d(shape[0], width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        if self.reads == "identity":
            return out + x
        return out + self.project(x if self.reads == "raw" else activated)


@register(
    BLOCKS,
    "concat",
    easy=True,
    width=WIDTHS,
    form=("inception", "dense", "zeros", "zeros_like", "self", "nested"),
)
class Concat(nn.Module):
    """Concatenations: branches, DenseNet growth, the trunk itself, constant zeros, the trunk twice."""

    def __init__(self, shape: Shape, *, width, form):
        super().__init__()
        self.form, channels = form, shape[0]
        self.one = conv_stack(channels, width, kernel=1)
        self.three = conv_stack(channels, width)
        if form == "dense":
            grown = channels + width
            self.grow = nn.Sequential(
                nn.BatchNorm2d(grown), nn.ReLU(), nn.Conv2d(grown, width, 3, padding=1)
            )
        elif form == "inception":
            self.pooled = nn.Sequential(
                nn.MaxPool2d(3, 1, 1), conv_stack(channels, width, kernel=1)
            )

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        if self.form == "dense":
            first = torch.cat([x, one], 1)
            return torch.cat([first, self.grow(first), self.three(x)], 1)
        three = self.three(x)
        if self.form == "inception":
            return torch.cat((one, three, self.pooled(x)), dim=1)
        if self.form == "zeros":
            zeros = x.new_zeros(x.shape[0], 2, x.shape[2], x.shape[3])
            return torch.cat((one, zeros, three), dim=1)
        if self.form == "zeros_like":
            return torch.cat((torch.zeros_like(one), three), dim=1)
        if self.form == "self":
            return torch.cat((one, x, one), dim=-3)
        return torch.cat((torch.cat((one, three), 1), x), 1)


@register(BLOCKS, "raw_concat", easy=True, width=WIDTHS, conv=BOTH)
class RawConcat(nn.Module):
    """Concatenates the network's own input, whose channels nobody may cut."""

    uses_raw = True

    def __init__(self, shape: Shape, *, width, conv):
        super().__init__()
        self.layers = conv_stack(shape[0], width) if conv else nn.Identity()

    def forward(self, x: Tensor, raw: Tensor) -> Tensor:
        return torch.cat((self.layers(x), F.adaptive_avg_pool2d(raw, x.shape[-2:])), dim=1)
