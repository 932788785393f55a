"""Blocks met less often: learned scales, norms over channels, constants, weight standardisation, noise, other layouts."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

from tests.random_layers import BLOCKS, WIDTHS, Shape, conv_stack, entry, register


@register(
    BLOCKS,
    "scale",
    form=("scale", "bias", "affine", "layer_scale", "scalar", "scalar_bias", "weight_scale"),
    width=WIDTHS,
    own=(True, False),
)
class Scale(nn.Module):
    """Learned per-channel or scalar factors and offsets as bare parameters."""

    def __init__(self, shape: Shape, *, form, width, own):
        super().__init__()
        self.form = form
        self.entry, channels = entry(shape, width, own=own)
        size = 1 if form.startswith("scalar") else channels
        self.factor = nn.Parameter(torch.ones(size, 1, 1))
        if form in ("bias", "affine", "scalar_bias"):
            self.offset = nn.Parameter(torch.zeros(1, size, 1, 1))
        if form in ("layer_scale", "weight_scale"):
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        if self.form == "layer_scale":
            return x + self.factor * self.conv(x)
        if self.form == "weight_scale":
            return F.conv2d(x, self.conv.weight * self.factor.unsqueeze(1), padding=1)
        x = x * self.factor
        return x if self.form in ("scale", "scalar") else F.relu(x + self.offset)


@register(
    BLOCKS,
    "norm",
    form=(
        "layer_channels_last",
        "layer_full",
        "functional",
        "group",
        "group_one",
        "instance",
        "instance_affine",
        "instance_running",
        "local_response",
        "batch_no_affine",
        "batch_no_running",
        "frozen",
    ),
    width=WIDTHS,
    own=(True, False),
)
class Norm(nn.Module):
    """Every normalisation beside the plain BatchNorm2d."""

    def __init__(self, shape: Shape, *, form, width, own):
        super().__init__()
        self.entry, channels = entry(shape, width, own=own, multiple=2)
        factories = {
            "layer_channels_last": lambda: nn.LayerNorm(channels),
            "layer_full": lambda: nn.LayerNorm([channels, *shape[1:]]),
            "functional": nn.Identity,
            "group": lambda: nn.GroupNorm(2, channels),
            "group_one": lambda: nn.GroupNorm(1, channels),
            "instance": lambda: nn.InstanceNorm2d(channels),
            "instance_affine": lambda: nn.InstanceNorm2d(channels, affine=True),
            "instance_running": lambda: nn.InstanceNorm2d(channels, track_running_stats=True),
            "local_response": lambda: nn.LocalResponseNorm(3, k=1.0),
            "batch_no_affine": lambda: nn.BatchNorm2d(channels, affine=False),
            "batch_no_running": lambda: nn.BatchNorm2d(channels, track_running_stats=False),
            "frozen": lambda: FrozenBatchNorm2d(channels),
        }
        self.form = form
        self.norm = factories[form]()

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        if self.form == "layer_channels_last":
            return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()
        if self.form == "functional":
            return F.relu(F.layer_norm(x, x.shape[1:]))
        return F.relu(self.norm(x))


CONSTANTS = {
    "multiply": lambda x, constant: x * constant,
    "add": lambda x, constant: F.relu(x + constant),
    "concat": lambda x, constant: torch.cat((x, constant.expand_as(x)), 1),
    "ones_like": lambda x, constant: x + torch.ones_like(x),
    "dynamic_ramp": lambda x, constant: x * x.new_ones(x.shape[1]).cumsum(0).view(1, -1, 1, 1) / 4,
    "scalar_tensor": lambda x, constant: x * torch.tensor(0.5),
    "permutation": lambda x, constant: x[:, constant[0, :, 0, 0].argsort()],
    "mask": lambda x, constant: x.masked_fill(constant < 0, 0.0),
}


@register(BLOCKS, "constant", form=tuple(CONSTANTS), width=WIDTHS, own=(True, False))
class Constant(nn.Module):
    """A registered buffer of shape (1, C, 1, 1), or a tensor made on the spot, meets the channels."""

    def __init__(self, shape: Shape, *, form, width, own):
        super().__init__()
        self.entry, channels = entry(shape, width, own=own)
        self.register_buffer("constant", torch.randn(1, channels, 1, 1))
        self.function = CONSTANTS[form]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.entry(x), self.constant)


@register(BLOCKS, "blur", form=("literal", "dynamic", "expanded"), width=WIDTHS, own=(True, False))
class Blur(nn.Module):
    """Fixed depthwise kernel whose group count is a literal or read from the input."""

    def __init__(self, shape: Shape, *, form, width, own):
        super().__init__()
        self.entry, self.channels = entry(shape, width, own=own)
        self.form = form
        rows = 1 if form == "expanded" else self.channels
        self.register_buffer("kernel", torch.rand(rows, 1, 3, 3) / 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        if self.form == "literal":
            return F.conv2d(x, self.kernel, padding=1, groups=self.channels)
        kernel = self.kernel
        if self.form == "expanded":
            kernel = kernel + x.new_zeros(x.shape[1], 1, 1, 1)
        return F.conv2d(x, kernel, padding=1, groups=x.shape[1])


@register(BLOCKS, "weight_standard", width=WIDTHS, form=("row", "unit_length", "column", "softmax"))
class WeightStandard(nn.Module):
    """The convolution's weight is normalised inside forward, over its input axis or all of it."""

    def __init__(self, shape: Shape, *, width, form):
        super().__init__()
        self.form = form
        self.weight = nn.Parameter(torch.randn(width, shape[0], 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.form == "row":
            centred = weight - weight.mean(dim=(1, 2, 3), keepdim=True)
            weight = centred / (weight.std(dim=(1, 2, 3), keepdim=True) + 0.5)
        elif self.form == "unit_length":
            weight = weight / (1 + weight.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
        elif self.form == "column":
            weight = weight - weight.mean(dim=0, keepdim=True)
        else:
            weight = weight.softmax(dim=1)
        return F.relu(F.conv2d(x, weight, padding=1))


@register(
    BLOCKS,
    "stochastic",
    form=(
        "dropout",
        "dropout2d",
        "functional",
        "inplace",
        "depth",
        "noise",
        "alpha",
        "train_branch",
        "unused",
    ),
    width=WIDTHS,
)
class Stochastic(nn.Module):
    """Code that differs between training and evaluation, and a module that is never called."""

    def __init__(self, shape: Shape, *, form, width):
        super().__init__()
        self.form = form
        width = shape[0] if form == "depth" else width
        self.conv = conv_stack(shape[0], width)
        modules = {
            "dropout": lambda: nn.Dropout(0.3),
            "dropout2d": lambda: nn.Dropout2d(0.3),
            "inplace": lambda: nn.Dropout(0.3, inplace=True),
            "depth": lambda: StochasticDepth(0.3, "row"),
            "alpha": lambda: nn.AlphaDropout(0.3),
            "train_branch": lambda: nn.Conv2d(width, width, 1),
            "unused": lambda: nn.Conv2d(width, 3, 1),
        }
        if form in modules:
            self.added = modules[form]()

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        if self.form == "depth":
            return x + self.added(out)
        if self.form == "functional":
            return F.dropout(out, 0.3, training=self.training)
        if self.form == "noise":
            return out + 0.1 * torch.randn_like(out) if self.training else out
        if self.form == "train_branch":
            return out + self.added(out) if self.training else out
        return out if self.form == "unused" else self.added(out)


@register(
    BLOCKS,
    "layout",
    form=("conv1d", "conv3d", "linear_last", "unfold", "batch_norm1d", "bilinear"),
    width=WIDTHS,
)
class Layout(nn.Module):
    """Layers that see the channels on another axis or among other axes."""

    def __init__(self, shape: Shape, *, form, width):
        super().__init__()
        channels = shape[0]
        self.form = form
        factories = {
            "conv1d": lambda: nn.Conv1d(channels, width, 3, padding=1),
            "conv3d": lambda: nn.Conv3d(channels, width, (1, 3, 3), padding=(0, 1, 1)),
            "linear_last": lambda: nn.Linear(channels, width),
            "unfold": lambda: nn.Linear(channels * 9, width),
            "batch_norm1d": lambda: nn.BatchNorm1d(channels),
            "bilinear": lambda: nn.Bilinear(channels, channels, width),
        }
        self.layer = factories[form]()

    def forward(self, x: Tensor) -> Tensor:
        size = (x.size(0), -1, x.size(2), x.size(3))
        if self.form == "conv3d":
            return self.layer(x.unsqueeze(2)).squeeze(2)
        if self.form in ("conv1d", "batch_norm1d"):
            return F.relu(self.layer(x.flatten(2))).view(size)
        if self.form == "unfold":
            columns = F.unfold(x, 3, padding=1).transpose(1, 2)
            return F.relu(self.layer(columns)).transpose(1, 2).reshape(size)
        last = x.permute(0, 2, 3, 1).contiguous()
        out = self.layer(last) if self.form == "linear_last" else self.layer(last, last.tanh())
        return out.permute(0, 3, 1, 2).contiguous()
