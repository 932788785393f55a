"""Easy blocks, third part: zero-padded shortcuts, shared and functional weights, down- and upsampling."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.random_layers import BLOCKS, BOTH, WIDTHS, Shape, conv_stack, entry, register, stride_for


@register(BLOCKS, "option_a", easy=True, stride=(2, 1), extra=(1, 2, 4), front=(0, 1))
class OptionA(nn.Module):
    """Residual block whose shortcut is padded with `extra` zero channels, `front` of them in front."""

    def __init__(self, shape: Shape, *, stride, extra, front):
        super().__init__()
        self.stride = stride_for(shape, stride)
        self.pads = (0, 0, 0, 0, front, extra - front)
        self.conv1 = conv_stack(shape[0], shape[0], stride=self.stride)
        self.conv2 = conv_stack(shape[0], shape[0] + extra, activation="none")

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x[:, :, ::2, ::2] if self.stride == 2 else x
        return F.relu(self.conv2(self.conv1(x)) + F.pad(shortcut, self.pads))


@register(
    BLOCKS,
    "shared",
    easy=True,
    width=WIDTHS,
    form=("conv", "conv_bn", "residual", "two_tensors", "two_sizes", "tied", "bn_only"),
)
class Shared(nn.Module):
    """One module (or one parameter) used twice."""

    def __init__(self, shape: Shape, *, width, form):
        super().__init__()
        self.form = form
        self.first = conv_stack(shape[0], width)
        self.second = conv_stack(shape[0], width, activation="none")
        self.common = conv_stack(
            width, width, bn=form == "conv_bn", activation="relu" if form == "conv_bn" else "none"
        )
        if form == "tied":
            self.tied = nn.Conv2d(width, width, 3, padding=1)
            self.tied.weight = self.common[0].weight
        elif form == "bn_only":
            self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        if self.form in ("conv", "conv_bn"):
            return self.common(F.relu(self.common(first)))
        if self.form == "residual":
            first = first + F.relu(self.common(first))
            return first + F.relu(self.common(first))
        if self.form == "tied":
            return self.tied(F.relu(self.common(first)))
        second = self.second(x)
        if self.form == "two_sizes":
            pooled = F.adaptive_avg_pool2d(second, 1)
            return self.common(first) + self.common(pooled)
        if self.form == "bn_only":
            return torch.cat((self.norm(first), F.relu(self.norm(second))), 1)
        return torch.cat((self.common(first), self.common(second)), dim=1)


@register(
    BLOCKS,
    "functional",
    easy=True,
    width=WIDTHS,
    form=("conv2d", "module_weight", "linear", "matmul", "einsum", "batch_norm"),
    own=(True, False),
)
class Functional(nn.Module):
    """Functional calls on bare parameters, or on another module's weight."""

    def __init__(self, shape: Shape, *, width, form, own):
        super().__init__()
        self.form = form
        self.entry, channels = entry(shape, width, own=own)
        if form == "module_weight":
            self.conv = nn.Conv2d(channels, width, 3, padding=1)
        elif form == "batch_norm":
            self.gamma = nn.Parameter(torch.ones(channels))
            self.beta = nn.Parameter(torch.zeros(channels))
            self.register_buffer("mean", torch.randn(channels) * 0.3)
            self.register_buffer("var", torch.rand(channels) + 0.5)
        else:
            kernel = (3, 3) if form == "conv2d" else ()
            self.weight = nn.Parameter(torch.randn(width, channels, *kernel))
            self.bias = nn.Parameter(torch.zeros(width)) if form in ("conv2d", "linear") else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        if self.form == "conv2d":
            return F.conv2d(x, self.weight, self.bias, padding=1)
        if self.form == "module_weight":
            return F.conv2d(x, self.conv.weight, self.conv.bias, stride=1, padding=1)
        if self.form == "batch_norm":
            gamma, beta = self.gamma, self.beta
            return F.relu(F.batch_norm(x, self.mean, self.var, gamma, beta, self.training))
        if self.form == "linear":
            out = F.linear(x.permute(0, 2, 3, 1), self.weight, self.bias)
            return out.permute(0, 3, 1, 2).contiguous()
        if self.form == "matmul":
            out = torch.matmul(self.weight, x.flatten(2))
            return out.view(x.size(0), -1, x.size(2), x.size(3))
        return torch.einsum("bchw,oc->bohw", x, self.weight).contiguous()


@register(
    BLOCKS,
    "transposed",
    easy=True,
    width=WIDTHS,
    groups=(1, 2),
    stride=(1, 2),
    bn=BOTH,
    own=(True, False),
)
class Transposed(nn.Module):
    def __init__(self, shape: Shape, *, width, groups, stride, bn, own):
        super().__init__()
        self.entry, channels = entry(shape, width, own=own, multiple=groups)
        is_larger = stride == 2 and shape[1] < 8
        kernel, stride, padding = (2, 2, 0) if is_larger else (3, 1, 1)
        self.up = nn.ConvTranspose2d(
            channels, groups * width, kernel, stride, padding, groups=groups, bias=not bn
        )
        self.norm = nn.BatchNorm2d(groups * width) if bn else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.up(self.entry(x))))


@register(
    BLOCKS,
    "unet",
    easy=True,
    width=WIDTHS,
    down=("max", "avg", "f_max", "conv"),
    up=("nearest", "bilinear", "interpolate_size", "interpolate_scale", "transposed"),
    merge=("concat", "add"),
)
class UNet(nn.Module):
    """One level down and up again, with the skip concatenated or added."""

    def __init__(self, shape: Shape, *, width, down, up, merge):
        super().__init__()
        self.encode = conv_stack(shape[0], width)
        downs = {"max": nn.MaxPool2d(2), "avg": nn.AvgPool2d(2)}
        if down == "conv":
            downs["conv"] = nn.Conv2d(width, width, 2, 2)
        self.down = downs.get(down) if min(shape[1:]) > 1 else nn.Identity()
        self.inner = conv_stack(width, width)
        is_even = shape[1] % 2 == 0 and shape[2] % 2 == 0
        self.up = up if is_even else "interpolate_size"
        if self.up in ("nearest", "bilinear"):
            self.upsample = nn.Upsample(scale_factor=2, mode=self.up)
        elif self.up == "transposed":
            self.upsample = nn.ConvTranspose2d(width, width, 2, 2)
        self.merge = merge
        self.decode = conv_stack(2 * width if merge == "concat" else width, width)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.encode(x)
        low = F.max_pool2d(skip, 2) if self.down is None else self.down(skip)
        low = self.inner(low)
        if self.up == "interpolate_size":
            high = F.interpolate(low, size=skip.shape[-2:], mode="bilinear", align_corners=False)
        elif self.up == "interpolate_scale":
            high = F.interpolate(low, scale_factor=2.0)
        else:
            high = self.upsample(low)
        merged = torch.cat([skip, high], dim=1) if self.merge == "concat" else skip + high
        return self.decode(merged)


POOLS = {
    "max": lambda x: F.max_pool2d(x, 3, stride=2, padding=1),
    "avg": lambda x: F.avg_pool2d(x, 2, count_include_pad=False),
    "ceil": lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
    "adaptive": lambda x: F.adaptive_max_pool2d(x, 3),
    "max_avg": lambda x: F.max_pool2d(x, 2) + F.avg_pool2d(x, 2),
    "divisor": lambda x: F.avg_pool2d(x.relu(), 2, divisor_override=3),
    "pad": lambda x: F.pad(x, (0, 1, 1, 0)),
    "reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "pad_value": lambda x: F.pad(x, (1, 0, 0, 1), value=0.5),
}


@register(BLOCKS, "pool", easy=True, form=tuple(POOLS))
class Pool(nn.Module):
    """Pooling and padding without parameters, straight on the trunk."""

    def __init__(self, shape: Shape, *, form):
        super().__init__()
        self.pool = POOLS[form if shape[1] >= 4 else "pad"]

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x)
