"""Blocks of one odd tensor operation each: arithmetic, slices and moves of channels, literal widths, reductions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.random_layers import BLOCKS, WIDTHS, Shape, conv_stack, entry, register


def _halves(x: Tensor):
    return x.chunk(2, dim=1)


def _fold_into_batch(x: Tensor) -> Tensor:
    alone = F.avg_pool2d(x.reshape(-1, 1, x.size(2), x.size(3)), 3, 1, 1)
    return alone.reshape(x.size(0), -1, x.size(2), x.size(3))


def _maxout(x: Tensor) -> Tensor:
    return x.reshape(x.size(0), x.size(1) // 2, 2, x.size(2), x.size(3)).amax(2)


UNARY = {
    "scalar": lambda x: x * 0.5,
    "offset": lambda x: x + 0.25,
    "negate": lambda x: -x,
    "abs": lambda x: x.abs(),
    "clamp": lambda x: x.clamp(-0.5, 0.8),
    "clamp_offset": lambda x: torch.clamp(x, min=0.1),
    "square": lambda x: x.tanh() ** 2,
    "exp": lambda x: torch.exp(-x.abs()),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "self_gate": lambda x: x * torch.sigmoid(x),
    "self_add": lambda x: x + F.relu(x),
    "half": lambda x: x[:, : x.shape[1] // 2],
    "second_half": lambda x: x[:, x.shape[1] // 2 :],
    "narrow": lambda x: x.narrow(1, 0, x.size(1) // 2),
    "every_other": lambda x: x[:, ::2],
    "swap_halves": lambda x: torch.cat((_halves(x)[1], _halves(x)[0]), 1),
    "add_halves": lambda x: _halves(x)[0] + _halves(x)[1],
    "gate_halves": lambda x: _halves(x)[0] * torch.sigmoid(_halves(x)[1]),
    "glu": lambda x: F.glu(x, dim=1),
    "maxout": _maxout,
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, dims=1),
    "unbind": lambda x: torch.stack(x.unbind(1), 1),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=1),
    "pixel_shuffle": lambda x: F.avg_pool2d(F.pixel_shuffle(x, 2), 2),
    "space_to_depth": lambda x: F.pixel_unshuffle(F.interpolate(x, scale_factor=2.0), 2)[:, 1::4],
    "fold_into_batch": _fold_into_batch,
    "transpose": lambda x: x.transpose(2, 3).contiguous(),
    "rotate": lambda x: torch.rot90(x, 1, (2, 3)).contiguous(),
}


@register(BLOCKS, "unary", form=tuple(UNARY), width=WIDTHS, own=(True, False))
class Unary(nn.Module):
    def __init__(self, shape: Shape, *, form, width, own):
        super().__init__()
        multiple = 4 if form == "pixel_shuffle" else 2
        self.entry, _ = entry(shape, width, own=own, multiple=multiple)
        self.function = UNARY[form]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.entry(x))


BINARY = {
    "subtract": lambda x, y: x - y,
    "weighted_add": lambda x, y: torch.add(x, y, alpha=2),
    "multiply": lambda x, y: x * y.tanh(),
    "divide": lambda x, y: x / (1 + y.abs()),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "where": lambda x, y: torch.where(x > y, x, y),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
    "addcmul": lambda x, y: torch.addcmul(x, y, y.tanh(), value=0.5),
    "hypot": torch.hypot,
    "stack_mean": lambda x, y: torch.stack((x, y), dim=1).mean(1),
    "stack_sum": lambda x, y: torch.stack((x, y)).sum(0),
    "stack_max": lambda x, y: torch.stack((x, y), dim=-1).amax(-1),
    "interleave": lambda x, y: torch.stack((x, y), 2).flatten(1, 2),
    "concat_sum": lambda x, y: torch.cat((x + y, y), 1),
    "spatial_gate": lambda x, y: x * torch.sigmoid(y[:, :1]),
}


@register(BLOCKS, "binary", form=tuple(BINARY), width=WIDTHS, reads=("branches", "trunk"))
class Binary(nn.Module):
    """Two branches of equal width, or the trunk and one branch, met by one operation."""

    def __init__(self, shape: Shape, *, form, width, reads):
        super().__init__()
        on_trunk = reads == "trunk"
        width = shape[0] if on_trunk else width
        self.left = nn.Identity() if on_trunk else conv_stack(shape[0], width)
        self.right = conv_stack(shape[0], width, kernel=1)
        self.function = BINARY[form]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.left(x), self.right(x))


LITERAL = {
    "view": lambda x, c, h, w: x.view(-1, c, h, w),
    "split": lambda x, c, h, w: torch.cat(x.split([c - 1, 1], 1)[::-1], 1),
    "split_drop": lambda x, c, h, w: x.split([c - 1, 1], 1)[0],
    "split_size": lambda x, c, h, w: torch.cat(torch.split(x, c // 2, dim=1)[::-1], 1),
    "slice": lambda x, c, h, w: x[:, :2],
    "last": lambda x, c, h, w: x[:, -2:],
    "gather": lambda x, c, h, w: x[:, [1, 0, c - 1]],
    "groups": lambda x, c, h, w: x.view(-1, 2, c // 2, h, w).transpose(1, 2).reshape(-1, c, h, w),
    "group_mean": lambda x, c, h, w: x.view(-1, 2, c // 2, h, w).mean(1),
    "expand": lambda x, c, h, w: x[:, :1].expand(-1, c, -1, -1) + x,
    "flat_view": lambda x, c, h, w: x.view(-1, c * h * w).relu().view(-1, c, h, w),
    "arange": lambda x, c, h, w: x * torch.arange(1.0, c + 1).view(1, c, 1, 1) / c,
    "zeros": lambda x, c, h, w: x + torch.zeros(1, c, 1, 1, dtype=torch.float32),
}


@register(BLOCKS, "literal", form=tuple(LITERAL), width=WIDTHS, own=(True, False))
class Literal(nn.Module):
    """Code that repeats a width as a number: wrong after pruning unless rewritten or pinned."""

    def __init__(self, shape: Shape, *, form, width, own):
        super().__init__()
        self.entry, channels = entry(shape, width, own=own, multiple=2)
        self.sizes = (channels, shape[1], shape[2])
        self.function = LITERAL[form]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.entry(x), *self.sizes)


def _channel_attention(x: Tensor) -> Tensor:
    rows = x.flatten(2)
    weights = torch.softmax(rows @ rows.transpose(1, 2), dim=-1)
    return (weights @ rows).view(x.shape) + x


REDUCTION = {
    "softmax": lambda x: F.softmax(x, dim=1),
    "log_softmax": lambda x: x.log_softmax(1),
    "mean": lambda x: x - x.mean(1, keepdim=True),
    "sum": lambda x: x * torch.sigmoid(x.sum(dim=1, keepdim=True)),
    "max": lambda x: x + x.amax(1, keepdim=True),
    "argmax": lambda x: x + x.argmax(1, keepdim=True).to(x.dtype),
    "cumsum": lambda x: torch.cumsum(x, dim=1) / 4,
    "norm": lambda x: x / (1 + x.norm(dim=1, keepdim=True)),
    "std": lambda x: x + x.std(dim=(1, 2, 3), keepdim=True),
    "sort": lambda x: x.sort(dim=1)[0],
    "fft": lambda x: torch.fft.fft(x, dim=1).real / 2,
    "diff": lambda x: torch.diff(x, dim=1),
    "conv_over_channels": lambda x: F.avg_pool3d(x.unsqueeze(1), (2, 1, 1), 1).squeeze(1),
    "channel_attention": _channel_attention,
}


@register(BLOCKS, "reduction", form=tuple(REDUCTION), width=WIDTHS, own=(True, False))
class Reduction(nn.Module):
    """Operations that mix channels, or that no rule is expected to know."""

    def __init__(self, shape: Shape, *, form, width, own):
        super().__init__()
        self.entry, _ = entry(shape, width, own=own, multiple=2)
        self.function = REDUCTION[form]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.entry(x))
