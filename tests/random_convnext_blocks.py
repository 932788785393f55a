"""Blocks of modern convnets: ConvNeXt, and the global response norm of its second version."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.random_layers import BLOCKS, BOTH, WIDTHS, Shape, entry, register
from tests.random_token_layers import LayerNorm2d


class ResponseNorm(nn.Module):
    """ConvNeXt V2's GRN: norms over space, divided by their mean over channels."""

    def __init__(self, dim: int, form: str) -> None:
        super().__init__()
        self.form = form
        shape = (1, 1, 1, dim) if form == "reference" else (dim,)
        self.gamma = nn.Parameter(torch.zeros(shape))
        self.beta = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "timm":
            x_g = x.norm(p=2, dim=(1, 2), keepdim=True)
            x_n = x_g / (x_g.mean(dim=-1, keepdim=True) + 1e-6)
            shape = (1, 1, 1, -1)
            return x + torch.addcmul(self.beta.view(shape), self.gamma.view(shape), x * x_n)
        if self.form == "channels_first":
            gx = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
            nx = gx / (gx.mean(dim=1, keepdim=True) + 1e-6)
            return self.gamma[:, None, None] * (x * nx) + self.beta[:, None, None] + x
        gx = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        nx = gx / (gx.mean(dim=-1, keepdim=True) + 1e-6)
        return self.gamma * (x * nx) + self.beta + x


@register(
    BLOCKS,
    "response_norm",
    width=WIDTHS,
    form=("reference", "timm", "channels_first"),
    block=BOTH,
    own=(True, False),
)
class ResponseNormBlock(nn.Module):
    """GRN alone, or inside the block of ConvNeXt V2."""

    def __init__(self, shape: Shape, *, width, form, block, own):
        super().__init__()
        self.entry, channels = entry(shape, width, own=own)
        self.form = form
        hidden = 2 * channels if block else channels
        self.norm = nn.LayerNorm(channels) if block else None
        self.grow = nn.Linear(channels, hidden) if block else nn.Identity()
        self.shrink = nn.Linear(hidden, channels) if block else nn.Identity()
        self.grn = ResponseNorm(hidden, form)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        out = x.permute(0, 2, 3, 1)
        out = self.grow(out if self.norm is None else self.norm(out))
        if self.form == "channels_first":
            out = self.grn(out.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        else:
            out = self.grn(out)
        out = self.shrink(F.gelu(out)).permute(0, 3, 1, 2).contiguous()
        return out if self.norm is None else x + out


@register(
    BLOCKS,
    "convnext",
    easy=True,
    width=WIDTHS,
    form=("reference", "conv", "torchvision"),
    hidden=(4, 2, 5),
    scale=BOTH,
    kernel=(3, 5),
    own=(True, False),
)
class ConvNeXt(nn.Module):
    """Depthwise convolution, layer-norm, two pointwise layers, layer scale, residual."""

    def __init__(self, shape: Shape, *, width, form, hidden, scale, kernel, own):
        super().__init__()
        self.entry, dim = entry(shape, width, own=own)
        self.form = form
        self.dwconv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        is_conv = form == "conv"
        self.norm = LayerNorm2d(dim) if is_conv else nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Conv2d(dim, hidden, 1) if is_conv else nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.pwconv2 = nn.Conv2d(hidden, dim, 1) if is_conv else nn.Linear(hidden, dim)
        shape = (dim,) if form == "reference" else (dim, 1, 1)
        self.gamma = nn.Parameter(torch.ones(shape)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        out = self.dwconv(x)
        if self.form == "conv":
            out = self.pwconv2(self.act(self.pwconv1(self.norm(out))))
        else:
            out = out.permute(0, 2, 3, 1)
            out = self.pwconv2(self.act(self.pwconv1(self.norm(out))))
            if self.gamma is not None and self.form == "reference":
                out = self.gamma * out
            out = out.permute(0, 3, 1, 2)
        if self.gamma is not None and self.form != "reference":
            out = self.gamma * out
        return x + out
