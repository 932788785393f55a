"""Heads of random networks: how the last feature map, and one from the middle, become the output."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.random_layers import ACTIVATIONS, BOTH, HEADS, WIDTHS, Shape, conv_stack, register


NUM_CLASSES = 3

REDUCTIONS = {
    "adaptive_avg": lambda x: torch.flatten(F.adaptive_avg_pool2d(x, 1), 1),
    "adaptive_max": lambda x: F.adaptive_max_pool2d(x, (1, 1)).flatten(1),
    "mean": lambda x: x.mean((2, 3)),
    "mean_twice": lambda x: x.mean(-1).mean(-1),
    "amax": lambda x: x.amax(dim=(-2, -1)),
    "squeeze": lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1),
    "index": lambda x: x[:, :, 0, 0],
    "sum": lambda x: x.flatten(2).sum(-1) / 8,
    "module_flatten": nn.Flatten(),
    "torch_flatten": lambda x: torch.flatten(x, 1),
    "method_flatten": lambda x: x.flatten(1),
    "view": lambda x: x.contiguous().view(x.size(0), -1),
    "view_shape": lambda x: x.contiguous().view(x.shape[0], -1),
    "reshape": lambda x: x.reshape(x.size(0), -1),
    "reshape_product": lambda x: x.reshape(-1, x.size(1) * x.size(2) * x.size(3)),
    "pool_flatten": lambda x: F.adaptive_avg_pool2d(x, 2).flatten(1),
    "channels_last_flatten": lambda x: x.permute(0, 2, 3, 1).flatten(1),
    "pool_concat": lambda x: torch.cat((x.mean((2, 3)), x.amax((2, 3))), 1),
}
POOLED = {"mean": 1, "pool_flatten": 4, "pool_concat": 2, "adaptive_avg": 1, "adaptive_max": 1}
POOLED |= {"mean_twice": 1, "amax": 1, "squeeze": 1, "index": 1, "sum": 1}


def num_features(shape: Shape, reduce: str) -> int:
    """Width of a reduced map: every flattening form keeps all positions."""
    return shape[0] * POOLED.get(reduce, shape[1] * shape[2])


@register(HEADS, "classifier", easy=True, reduce=tuple(REDUCTIONS), bias=(True, False))
class Classifier(nn.Module):
    def __init__(self, shape: Shape, mid: Shape, *, reduce, bias):
        super().__init__()
        self.reduce = REDUCTIONS[reduce]
        self.fc = nn.Linear(num_features(shape, reduce), NUM_CLASSES, bias=bias)

    def forward(self, x: Tensor, mid: Tensor) -> Tensor:
        return self.fc(self.reduce(x))


@register(HEADS, "conv_classifier", easy=True, activation=("none", "relu"))
class ConvClassifier(nn.Module):
    """SqueezeNet's head: the classes are channels until the last pool."""

    def __init__(self, shape: Shape, mid: Shape, *, activation):
        super().__init__()
        self.conv = conv_stack(shape[0], NUM_CLASSES, kernel=1, bn=False, activation=activation)

    def forward(self, x: Tensor, mid: Tensor) -> Tensor:
        return torch.flatten(F.adaptive_avg_pool2d(self.conv(x), (1, 1)), 1)


@register(
    HEADS,
    "mlp",
    easy=True,
    reduce=("mean", "module_flatten", "view", "pool_concat"),
    hidden=WIDTHS,
    depth=(1, 2),
    bn=(True, False),
    activation=("relu", "sigmoid", "hardswish", "prelu_shared"),
    residual=BOTH,
)
class MLPHead(nn.Module):
    """Hidden linears with BatchNorm1d and dropout, optionally with a residual one."""

    def __init__(
        self, shape: Shape, mid: Shape, *, reduce, hidden, depth, bn, activation, residual
    ):
        super().__init__()
        self.reduce = REDUCTIONS[reduce]
        widths = [num_features(shape, reduce), *[hidden] * depth]
        layers = []
        for in_features, out_features in pairwise(widths):
            layers.append(nn.Linear(in_features, out_features, bias=not bn))
            layers.extend([nn.BatchNorm1d(out_features)] if bn else [])
            layers.extend([ACTIVATIONS[activation](out_features), nn.Dropout(0.2)])
        self.layers = nn.Sequential(*layers)
        self.residual = nn.Linear(hidden, hidden) if residual else None
        self.fc = nn.Linear(hidden, NUM_CLASSES)

    def forward(self, x: Tensor, mid: Tensor) -> Tensor:
        x = self.layers(self.reduce(x))
        if self.residual is not None:
            x = F.relu(x + self.residual(x))
        return self.fc(x)


@register(HEADS, "segmentation", easy=True, upsample=BOTH, hidden=BOTH, bias=(True, False))
class Segmentation(nn.Module):
    """A map of classes, optionally brought to the size of the map in the middle."""

    def __init__(self, shape: Shape, mid: Shape, *, upsample, hidden, bias):
        super().__init__()
        self.upsample = upsample
        self.hidden = conv_stack(shape[0], 4) if hidden else nn.Identity()
        self.conv = nn.Conv2d(4 if hidden else shape[0], NUM_CLASSES, 1, bias=bias)

    def forward(self, x: Tensor, mid: Tensor) -> Tensor:
        out = self.conv(self.hidden(x))
        if self.upsample:
            return F.interpolate(out, mid.shape[-2:], mode="bilinear", align_corners=False)
        return out


@register(
    HEADS,
    "multi_output",
    easy=True,
    container=("tuple", "dict", "list", "nested"),
    features=BOTH,
)
class MultiOutput(nn.Module):
    """Classes and a map at once; `features` also returns the raw trunk, which pins it."""

    def __init__(self, shape: Shape, mid: Shape, *, container, features):
        super().__init__()
        self.container, self.features = container, features
        self.fc = nn.Linear(shape[0], NUM_CLASSES)
        self.map = nn.Conv2d(mid[0], 2, 1)

    def forward(self, x: Tensor, mid: Tensor):
        logits, side = self.fc(x.mean((2, 3))), self.map(mid)
        extra = x if self.features else side.mean()
        if self.container == "dict":
            return {"out": logits, "side": side, "extra": extra}
        if self.container == "list":
            return [logits, side, extra]
        if self.container == "nested":
            return {"out": (logits, [side]), "extra": extra}
        return logits, side, extra


@register(HEADS, "auxiliary", where=("mid", "last"))
class Auxiliary(nn.Module):
    """GoogLeNet's habit: a second classifier that only exists in training."""

    def __init__(self, shape: Shape, mid: Shape, *, where):
        super().__init__()
        self.on_mid = where == "mid"
        self.fc = nn.Linear(shape[0], NUM_CLASSES)
        self.aux = conv_stack((mid if self.on_mid else shape)[0], 4, kernel=1)
        self.aux_fc = nn.Linear(4, NUM_CLASSES)

    def forward(self, x: Tensor, mid: Tensor):
        out = self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        if self.training:
            return out, self.aux_fc(self.aux(mid if self.on_mid else x).mean((2, 3)))
        return out


@register(HEADS, "backbone", scaled=BOTH)
class Backbone(nn.Module):
    """No head at all: the trunk's channels are the output."""

    def __init__(self, shape: Shape, mid: Shape, *, scaled):
        super().__init__()
        self.scaled = scaled

    def forward(self, x: Tensor, mid: Tensor) -> Tensor:
        return x * 0.5 if self.scaled else x
