"""Channels split into unequal parts, with sizes as numbers or from attributes: partial convolutions, ghosts, CSP."""

import torch
from torch import Tensor, nn

from tests.random_layers import BLOCKS, WIDTHS, Shape, conv_stack, entry, register


def _literal(first: int, second: int):
    """`x.split([8, 8], dim=1)`: both numbers stand in the code."""
    return lambda m, x: x.split([first, second], dim=1)


SPLITS = {
    "literal": _literal,
    "attributes": lambda *_: lambda m, x: x.split([m.dim_conv, m.dim_untouched], dim=1),
    "list": lambda *_: lambda m, x: torch.split(x, m.split_sizes, dim=1),
    "slices": lambda *_: lambda m, x: (x[:, : m.dim_conv], x[:, m.dim_conv :]),
    "shape": lambda *_: lambda m, x: x.split([m.dim_conv, x.shape[1] - m.dim_conv], dim=1),
    "tensor_split": lambda *_: lambda m, x: x.tensor_split([m.dim_conv], dim=1),
}


@register(
    BLOCKS,
    "split",
    width=WIDTHS,
    form=tuple(SPLITS),
    use=("partial", "both", "gate", "ghost"),
    last=(True, False),
    own=(True, False),
)
class Split(nn.Module):
    """FasterNet's partial convolution, one branch per part, a gate by one part, GhostNet's cut."""

    def __init__(self, shape: Shape, *, width, form, use, last, own):
        super().__init__()
        self.entry, channels = entry(shape, width, own=own, multiple=2)
        self.dim_conv = channels // 2 if use == "gate" else 1
        self.dim_untouched = channels - self.dim_conv
        self.split_sizes = [self.dim_conv, self.dim_untouched]
        self.split, self.use = SPLITS[form](*self.split_sizes), use
        self.first = conv_stack(self.dim_conv, self.dim_conv)
        self.second = conv_stack(self.dim_untouched, self.dim_untouched, kernel=1)
        out = self.dim_untouched if use == "gate" else channels
        self.last = conv_stack(out, width, kernel=1) if last else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        left, right = self.split(self, x)
        if self.use == "gate":
            return self.last(torch.sigmoid(self.first(left)) * right)
        if self.use == "ghost":
            out = torch.cat((self.second(right), x), dim=1)
            return self.last(out[:, : self.dim_conv + self.dim_untouched, :, :])
        right = self.second(right) if self.use == "both" else right
        return self.last(torch.cat((self.first(left), right), dim=1))
