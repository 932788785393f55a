"""Parts of transformers and modern convnets as users write them: norms, tokens, positions, MLPs, masks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.random_layers import Shape


class LlamaRMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * x


class T5LayerNorm(LlamaRMSNorm):
    """T5's name and order of operations, with a division where others multiply."""

    def forward(self, x: Tensor) -> Tensor:
        variance = (x * x).mean(dim=-1, keepdim=True)
        return x / torch.sqrt(variance + self.variance_epsilon) * self.weight


class GemmaRMSNorm(LlamaRMSNorm):
    """The weight is stored as a distance from one."""

    def forward(self, x: Tensor) -> Tensor:
        normed = x * torch.rsqrt(torch.mean(x**2, -1, keepdim=True) + self.variance_epsilon)
        return normed * (1.0 + self.weight)


class FunctionalRMSNorm(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.variance_epsilon)


RMS_NORMS = {
    "module": nn.RMSNorm,
    "no_affine": lambda dim: nn.RMSNorm(dim, elementwise_affine=False),
    "functional": FunctionalRMSNorm,
    "llama": LlamaRMSNorm,
    "t5": T5LayerNorm,
    "gemma": GemmaRMSNorm,
}
NORMS = {
    "layer": nn.LayerNorm,
    "layer_no_bias": lambda dim: nn.LayerNorm(dim, bias=False),
    "layer_no_affine": lambda dim: nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6),
    "rms": nn.RMSNorm,
    "llama": LlamaRMSNorm,
}


class LayerNorm2d(nn.LayerNorm):
    """Torchvision's: the channels are moved to the end and back."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class LayerScale(nn.Module):
    def __init__(self, dim: int, *, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.gamma) if self.inplace else x * self.gamma


SCALES = {
    "none": lambda _: nn.Identity(),
    "layer_scale": LayerScale,
    "inplace": lambda dim: LayerScale(dim, inplace=True),
}


class Mlp(nn.Module):
    """A transformer's feed-forward part on the last axis."""

    def __init__(self, dim: int, hidden: int, *, form: str = "gelu", bias: bool = True) -> None:
        super().__init__()
        self.form = form
        self.fc1 = nn.Linear(dim, 2 * hidden if form == "packed" else hidden, bias=bias)
        self.up = nn.Linear(dim, hidden, bias=bias) if form in ("swiglu", "geglu") else None
        self.norm = nn.LayerNorm(hidden) if form == "normed" else nn.Identity()
        self.drop = nn.Dropout(0.1 if form == "dropout" else 0.0)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "swiglu":
            return self.fc2(F.silu(self.fc1(x)) * self.up(x))
        if self.form == "geglu":
            return self.fc2(self.up(x) * F.gelu(self.fc1(x), approximate="tanh"))
        if self.form == "packed":
            gate, value = self.fc1(x).chunk(2, dim=-1)
            return self.fc2(F.silu(gate) * value)
        if self.form == "relu_squared":
            return self.fc2(F.relu(self.fc1(x)).square())
        return self.drop(self.fc2(self.norm(self.drop(F.gelu(self.fc1(x))))))


MLP_FORMS = ("gelu", "swiglu", "geglu", "packed", "normed", "dropout", "relu_squared")


class Tokens(nn.Module):
    """A feature map as tokens: plain, with positions, or with a class token in front."""

    def __init__(self, shape: Shape, dim: int, form: str) -> None:
        super().__init__()
        self.num_extra = int(form in ("class", "class_position"))
        self.num_tokens = shape[1] * shape[2] + self.num_extra
        if self.num_extra:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        has_position = form in ("position", "class_position")
        self.pos_embed = (
            nn.Parameter(torch.zeros(1, self.num_tokens, dim)) if has_position else None
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        if self.num_extra:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        return x if self.pos_embed is None else x + self.pos_embed

    def back(self, tokens: Tensor, x: Tensor) -> Tensor:
        """The tokens as a map of the size of `x`, without the class token."""
        tokens = tokens[:, self.num_extra :] if self.num_extra else tokens
        size = (x.size(0), -1, x.size(2), x.size(3))
        return tokens.transpose(1, 2).reshape(size).contiguous()


TOKENS = ("plain", "position", "class", "class_position")


def rotate_half(x: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat((-right, left), dim=-1)


def rotate_slices(x: Tensor) -> Tensor:
    left = x[..., : x.shape[-1] // 2]
    right = x[..., x.shape[-1] // 2 :]
    return torch.cat((-right, left), dim=-1)


def rotate_pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).reshape(x.shape)


class Rotary(nn.Module):
    """Rotary position embedding of queries or keys [B, heads, N, head_dim]."""

    ROTATIONS = {"half": rotate_half, "slices": rotate_slices, "pairs": rotate_pairs}  # noqa: RUF012

    def __init__(self, head_dim: int, num_tokens: int, form: str) -> None:
        super().__init__()
        steps = torch.arange(0, head_dim, 2) / head_dim
        self.register_buffer("inv_freq", 100.0**-steps, persistent=False)
        self.register_buffer("position", torch.arange(num_tokens), persistent=False)
        self.is_paired = form == "pairs"
        self.rotate = self.ROTATIONS[form]

    def forward(self, x: Tensor) -> Tensor:
        angles = self.position[:, None] * self.inv_freq[None, :]
        angles = angles.repeat_interleave(2, -1) if self.is_paired else torch.cat((angles,) * 2, -1)
        return x * angles.cos() + self.rotate(x) * angles.sin()


class ScoreBias(nn.Module):
    """What is added to attention scores [B, heads, N, N]: a learned table, slopes, or a mask."""

    def __init__(self, form: str, heads: int, num_tokens: int) -> None:
        super().__init__()
        self.form, self.num_tokens = form, num_tokens
        distance = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)[None, :]
        index, num_distances = distance + num_tokens - 1, 2 * num_tokens - 1
        if form == "relative":
            self.register_buffer("relative_position_index", index, persistent=False)
            self.relative_position_bias_table = nn.Parameter(torch.zeros(num_distances, heads))
        elif form == "embedding":
            self.register_buffer("bucket", index, persistent=False)
            self.relative_attention_bias = nn.Embedding(num_distances, heads)
        elif form == "alibi":
            self.register_buffer("distance", -distance.abs() / 8, persistent=False)
            self.slopes = nn.Parameter(torch.ones(heads, 1, 1))
        else:
            blocked = torch.zeros(num_tokens, num_tokens).masked_fill(distance < 0, float("-inf"))
            self.register_buffer("mask", blocked, persistent=False)

    def forward(self) -> Tensor:
        if self.form == "relative":
            bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
            bias = bias.view(self.num_tokens, self.num_tokens, -1)
            return bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        if self.form == "embedding":
            return self.relative_attention_bias(self.bucket).permute(2, 0, 1).unsqueeze(0)
        return self.slopes * self.distance if self.form == "alibi" else self.mask


SCORE_BIASES = ("none", "causal", "relative", "embedding", "alibi")
