"""Whole transformer blocks, feed-forward parts, and MLPs over tokens instead of attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.random_attention import Attention
from tests.random_layers import BLOCKS, BOTH, WIDTHS, Shape, conv_stack, entry, register
from tests.random_token_layers import MLP_FORMS, NORMS, SCALES, TOKENS, LayerScale, Mlp, Tokens


@register(
    BLOCKS,
    "feed_forward",
    easy=True,
    width=WIDTHS,
    hidden=(4, 2, 5),
    form=MLP_FORMS,
    norm=("layer", *list(NORMS)[1:]),
    scale=tuple(SCALES),
    order=("pre", "post", "bare"),
    bias=(True, False),
    own=(True, False),
)
class FeedForward(nn.Module):
    def __init__(self, shape: Shape, *, width, hidden, form, norm, scale, order, bias, own):
        super().__init__()
        self.entry, dim = entry(shape, width, own=own)
        self.tokens = Tokens(shape, dim, "plain")
        self.norm, self.order = NORMS[norm](dim), order
        self.mlp = Mlp(dim, hidden, form=form, bias=bias)
        self.scale = SCALES[scale](dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        tokens = self.tokens(x)
        if self.order == "pre":
            tokens = tokens + self.scale(self.mlp(self.norm(tokens)))
        elif self.order == "post":
            tokens = self.norm(tokens + self.scale(self.mlp(tokens)))
        else:
            tokens = self.scale(self.mlp(tokens))
        return self.tokens.back(tokens, x)


@register(
    BLOCKS,
    "transformer",
    easy=True,
    heads=(2, 3, 1),
    head_dim=(2, 1, 3),
    hidden=(4, 5),
    order=("pre", "post", "parallel", "sandwich"),
    norm=tuple(NORMS),
    mlp=MLP_FORMS,
    scale=tuple(SCALES),
    projection=("timm", "llama", "chunk", "vit"),
    core=("sdpa", "matmul"),
    scores=("none", "causal", "relative"),
    rotary=("none", "half"),
    tokens=TOKENS,
    final_norm=BOTH,
    own=(True, False),
)
class Transformer(nn.Module):
    """Pre-norm, post-norm, attention and MLP behind one norm, or a norm on both sides of each."""

    def __init__(
        self, shape, *, heads, head_dim, hidden, order, norm, mlp, scale, tokens, final_norm, own,
        **options,
    ):  # fmt: skip
        super().__init__()
        self.entry, dim = entry(shape, head_dim, own=own, multiple=heads)
        self.tokens, self.order = Tokens(shape, dim, tokens), order
        self.attn = Attention(dim, heads, head_dim, self.tokens.num_tokens, **options)
        self.mlp = Mlp(dim, hidden, form=mlp)
        self.norm1, self.norm2 = NORMS[norm](dim), NORMS[norm](dim)
        if order == "sandwich":
            self.norm3, self.norm4 = NORMS[norm](dim), NORMS[norm](dim)
        self.ls1, self.ls2 = SCALES[scale](dim), SCALES[scale](dim)
        self.norm = NORMS[norm](dim) if final_norm else nn.Identity()

    def _layer(self, x: Tensor) -> Tensor:
        if self.order == "parallel":
            normed = self.norm1(x)
            return x + self.ls1(self.attn(normed)) + self.ls2(self.mlp(normed))
        if self.order == "post":
            x = self.norm1(x + self.ls1(self.attn(x)))
            return self.norm2(x + self.ls2(self.mlp(x)))
        if self.order == "sandwich":
            x = x + self.norm3(self.ls1(self.attn(self.norm1(x))))
            return x + self.norm4(self.ls2(self.mlp(self.norm2(x))))
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        return self.tokens.back(self.norm(self._layer(self.tokens(x))), x)


@register(
    BLOCKS,
    "torch_transformer",
    easy=True,
    heads=(2, 3, 1),
    head_dim=(2, 1, 3),
    hidden=(4, 5),
    form=("encoder_layer", "encoder", "decoder_layer"),
    norm_first=(True, False),
    batch_first=(True, False),
    activation=("gelu", "relu"),
    bias=(True, False),
    dropout=(0.0, 0.1),
    tokens=TOKENS,
    own=(True, False),
)
class TorchTransformer(nn.Module):
    """torch.nn's own layers; the decoder reads a second stream of the same width."""

    def __init__(self, shape, *, heads, head_dim, hidden, form, tokens, own, **options):
        super().__init__()
        self.entry, dim = entry(shape, head_dim, own=own, multiple=heads)
        self.tokens = Tokens(shape, dim, tokens)
        self.batch_first = options["batch_first"]
        options |= {"d_model": dim, "nhead": heads, "dim_feedforward": hidden}
        self.memory = conv_stack(shape[0], dim, kernel=1) if form == "decoder_layer" else None
        if form == "decoder_layer":
            self.layer = nn.TransformerDecoderLayer(**options)
        else:
            self.layer = nn.TransformerEncoderLayer(**options)
        if form == "encoder":
            self.layer = nn.TransformerEncoder(
                self.layer, 2, norm=nn.LayerNorm(dim), enable_nested_tensor=False
            )

    def forward(self, x: Tensor) -> Tensor:
        own = self.entry(x)
        tokens = self.tokens(own)
        tokens = tokens if self.batch_first else tokens.transpose(0, 1)
        if self.memory is None:
            tokens = self.layer(tokens)
        else:
            order = (0, 2, 1) if self.batch_first else (2, 0, 1)
            tokens = self.layer(tokens, self.memory(x).flatten(2).permute(order))
        return self.tokens.back(tokens if self.batch_first else tokens.transpose(0, 1), own)


class Affine(nn.Module):
    """ResMLP's replacement of layer-norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.beta, self.alpha, x)


@register(
    BLOCKS,
    "mixer",
    easy=True,
    width=WIDTHS,
    hidden=(4, 3),
    form=("mixer", "resmlp", "spatial_gate", "pool"),
    scale=BOTH,
    own=(True, False),
)
class Mixer(nn.Module):
    """Tokens are mixed by linears over positions (MLP-Mixer, ResMLP, gMLP) or by pooling."""

    def __init__(self, shape: Shape, *, width, hidden, form, scale, own):
        super().__init__()
        self.entry, dim = entry(shape, width, own=own)
        self.tokens, self.form = Tokens(shape, dim, "plain"), form
        length = self.tokens.num_tokens
        norm = Affine if form == "resmlp" else nn.LayerNorm
        self.norm1, self.norm2 = norm(dim), norm(dim)
        self.scale = LayerScale(dim) if scale else nn.Identity()
        self.channel_mlp = Mlp(dim, hidden)
        if form == "mixer":
            self.token_mlp = Mlp(length, hidden)
        elif form == "resmlp":
            self.token_mlp = nn.Linear(length, length)
        elif form == "spatial_gate":
            self.grow, self.shrink = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)
            self.gate_norm = nn.LayerNorm(hidden)
            self.token_mlp = nn.Linear(length, length)
        else:
            self.norm1 = nn.GroupNorm(1, dim)
            self.pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)

    def _mix(self, tokens: Tensor) -> Tensor:
        if self.form == "spatial_gate":
            left, right = F.gelu(self.grow(tokens)).chunk(2, dim=-1)
            gate = self.token_mlp(self.gate_norm(right).transpose(-1, -2)).transpose(-1, -2)
            return self.shrink(left * gate)
        return self.token_mlp(tokens.transpose(1, 2)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        if self.form == "pool":
            normed = self.norm1(x)
            tokens = self.tokens(x + self.pool(normed) - normed)
        else:
            tokens = self.tokens(x)
            tokens = tokens + self.scale(self._mix(self.norm1(tokens)))
        return self.tokens.back(tokens + self.scale(self.channel_mlp(self.norm2(tokens))), x)
