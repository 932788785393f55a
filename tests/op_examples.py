"""One example per operation with a channel rule: convolution -> operation -> convolution.

`EXAMPLES[name]` runs the operation `aten.name` on the first convolution's output, in its natural
position. Operations that only run on other devices stand in `ELSEWHERE`, with the reason.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.closing import image, prepared


aten = torch.ops.aten


@dataclass(frozen=True)
class Example:
    """`function(module, x)` maps (2, `width`, 4, ...) to (2, `out`, ...), `rank` spatial axes.

    `module.own` is a norm's or a weight's worth of parameters, `module.gain` has shape (width,).
    `gated`: whether channels of the first convolution must be gateable. `inference`: composite
    operations reach a dispatch mode in one piece only under `torch.inference_mode()`. `layer` makes
    `module.layer`, for operations that want parameters of their own.
    """

    function: Callable[[nn.Module, Tensor], Tensor]
    width: int = 8
    out: int = 8
    rank: int = 2
    gated: bool = True
    inference: bool = False
    layer: Callable[[], nn.Module] = nn.Identity


class ExampleNet(nn.Module):
    """The smallest network around one operation."""

    def __init__(self, example: Example) -> None:
        super().__init__()
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[example.rank - 1]
        self.first = kind(3, example.width, 1)
        self.last = kind(example.out, 2, 1)
        self.gain = nn.Parameter(torch.ones(example.width))
        self.offset = nn.Parameter(torch.ones(example.width))
        self.register_buffer("mean", torch.zeros(example.width))
        self.register_buffer("variance", torch.ones(example.width))
        self.matrix = nn.Parameter(torch.ones(5, example.width))
        self.layer = example.layer()
        self.example = example

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        with torch.inference_mode() if self.example.inference else nullcontext():
            x = self.example.function(self, x)
        return self.last(x)


def build(example: Example) -> tuple[nn.Module, Tensor]:
    model = prepared(ExampleNet(example))
    with torch.no_grad():
        model.variance.uniform_(0.5, 1.5)
    return model, image(2, 3, *[4] * example.rank)


EXAMPLES: dict[str, Example] = {}


def pixels(x: Tensor) -> Tensor:
    """(B, C, H, W) as (B, H*W, C)."""
    return x.flatten(2).transpose(1, 2)


def maps(x: Tensor) -> Tensor:
    """(B, H*W, C) as (B, C, H, W), for 4 x 4 images."""
    return x.transpose(1, 2).unflatten(2, (4, 4))


def gate_by(values: Tensor, x: Tensor) -> Tensor:
    """Multiply by something of one value per channel."""
    return x * values.reshape(x.shape[0], x.shape[1], 1, 1)


def add(name: str, function: Callable[[nn.Module, Tensor], Tensor], **options) -> None:
    if name in EXAMPLES:
        raise ValueError(f"two examples for {name}")
    EXAMPLES[name] = Example(function, **options)


# --- convolutions and products ---------------------------------------------------------------


def kernel(m: nn.Module) -> Tensor:
    return m.matrix[:, :, None, None]


CONV = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
add("convolution", lambda m, x: aten.convolution(x, kernel(m), None, *CONV), out=5)
add(
    "_convolution",
    lambda m, x: aten._convolution(x, kernel(m), None, *CONV, False, False, False, False),
    out=5,
    inference=True,
)
add("mkldnn_convolution", lambda m, x: aten.mkldnn_convolution(x.float(), kernel(m).float(), None, [0, 0], [1, 1], [1, 1], 1).double(), out=5)  # fmt: skip
add("linear", lambda m, x: maps(F.linear(pixels(x), m.matrix)), out=5, inference=True)
add("mm", lambda m, x: (pixels(x).flatten(0, 1) @ m.matrix.t()).view(x.shape[0], 4, 4, -1).permute(0, 3, 1, 2), out=5)  # fmt: skip
add("addmm", lambda m, x: torch.addmm(m.gain[:1], pixels(x).flatten(0, 1), m.matrix.t()).view(x.shape[0], 4, 4, -1).permute(0, 3, 1, 2), out=5)  # fmt: skip
add("bmm", lambda m, x: maps(torch.bmm(pixels(x), m.matrix.t().expand(x.shape[0], -1, -1))), out=5)
add("baddbmm", lambda m, x: maps(torch.baddbmm(m.gain[:1], pixels(x), m.matrix.t().expand(x.shape[0], -1, -1))), out=5)  # fmt: skip
add("mv", lambda m, x: (pixels(x).flatten(0, 1) @ m.gain).view(x.shape[0], 1, 4, 4), out=1, gated=False)  # fmt: skip
add("addmv", lambda m, x: torch.addmv(m.gain[:1], pixels(x).flatten(0, 1), m.gain).view(x.shape[0], 1, 4, 4), out=1, gated=False)  # fmt: skip
add("dot", lambda m, x: x * torch.dot(x[0, :, 0, 0], m.gain), gated=False)
add("einsum", lambda m, x: aten.einsum("bchw,oc->bohw", [x, m.matrix]), out=5, inference=True, gated=False)  # fmt: skip
add("_trilinear", lambda m, x: x * aten._trilinear(x[:, :, 0, 0], m.gain[None], x[:, :, 0, 0], [], [], [], [1]).view(-1, 1, 1, 1), gated=False)  # fmt: skip

# --- normalisation ---------------------------------------------------------------------------


def norm_arguments(m: nn.Module) -> tuple[Tensor, ...]:
    return m.gain, m.offset, m.mean, m.variance


add("native_batch_norm", lambda m, x: aten.native_batch_norm(x, *norm_arguments(m), False, 0.1, 1e-5)[0])  # fmt: skip
add("batch_norm", lambda m, x: aten.batch_norm(x, *norm_arguments(m), False, 0.1, 1e-5, False), inference=True)  # fmt: skip
add("_native_batch_norm_legit", lambda m, x: aten._native_batch_norm_legit(x, *norm_arguments(m), False, 0.1, 1e-5)[0])  # fmt: skip
add("_native_batch_norm_legit_no_training", lambda m, x: aten._native_batch_norm_legit_no_training(x, *norm_arguments(m), 0.1, 1e-5)[0])  # fmt: skip
add("_batch_norm_no_update", lambda m, x: aten._batch_norm_no_update(x, *norm_arguments(m), 0.1, 1e-5)[0])  # fmt: skip
add("_batch_norm_with_update", lambda m, x: aten._batch_norm_with_update(x, m.gain, m.offset, m.mean.clone(), m.variance.clone(), 0.1, 1e-5)[0])  # fmt: skip
add("native_layer_norm", lambda m, x: F.layer_norm(x, x.shape[1:]))
add("native_group_norm", lambda m, x: F.group_norm(x, 2))
add("_weight_norm", lambda m, x: aten.convolution(x, aten._weight_norm(kernel(m), kernel(m)[:, :1], 0), None, *CONV), out=5, gated=False, inference=True)  # fmt: skip
add("_weight_norm_interface", lambda m, x: aten.convolution(x, aten._weight_norm_interface(kernel(m), kernel(m)[:, :1].contiguous(), 0)[0], None, *CONV), out=5, gated=False)  # fmt: skip

# --- reductions over pixels, and what else leaves the channel axis alone ----------------------

for name in ("mean", "sum", "amax", "amin", "nansum", "logsumexp"):
    add(name, lambda m, x, name=name: x * getattr(torch, name)(x, (2, 3), keepdim=True))
add("nanmean", lambda m, x: x * aten.nanmean(x, [2, 3], True), inference=True)
add("var", lambda m, x: x * aten.var(x, [2, 3], correction=0, keepdim=True))
add("std", lambda m, x: x * aten.std(x, [2, 3], correction=0, keepdim=True))
add("var_mean", lambda m, x: x * aten.var_mean(x, [2, 3], correction=0, keepdim=True)[1])
add("std_mean", lambda m, x: x * aten.std_mean(x, [2, 3], correction=0, keepdim=True)[0], inference=True)  # fmt: skip
add("norm", lambda m, x: x * aten.norm(x, 2, [2, 3], True), inference=True)
add("linalg_vector_norm", lambda m, x: x / (1 + torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)))  # fmt: skip
for name in ("max", "min", "median"):
    add(name, lambda m, x, name=name: x * getattr(torch, name)(x, 2, keepdim=True).values)
for name in ("argmax", "argmin"):
    add(name, lambda m, x, name=name: x * getattr(torch, name)(x, 2, keepdim=True).double())
add("prod", lambda m, x: x * torch.prod(x, 2, keepdim=True))
add("any", lambda m, x: x * torch.any(x > 0, 2, keepdim=True).double())
add("all", lambda m, x: x * torch.all(x > 0, 2, keepdim=True).double())
add("count_nonzero", lambda m, x: x * aten.count_nonzero(x > 0, [2]).unsqueeze(2).double())
add("aminmax", lambda m, x: x * torch.aminmax(x, dim=2, keepdim=True).max)
add("_softmax", lambda m, x: F.softmax(x, 2))
add("_log_softmax", lambda m, x: F.log_softmax(x, 2))
add("softmax", lambda m, x: aten.softmax(x, 2), inference=True)
add("log_softmax", lambda m, x: aten.log_softmax(x, 2), inference=True)
add("_safe_softmax", lambda m, x: aten._safe_softmax(x, 2))
for name in ("cumsum", "cumprod", "logcumsumexp"):
    add(name, lambda m, x, name=name: getattr(torch, name)(x, 3))
for name in ("cummax", "cummin"):
    add(name, lambda m, x, name=name: getattr(torch, name)(x, 3).values)
add("sort", lambda m, x: x.sort(2).values)
add("topk", lambda m, x: x.topk(2, 2).values)

# --- pooling, resampling, padding -------------------------------------------------------------

add("max_pool1d", lambda m, x: aten.max_pool1d(x, [2]), rank=1, inference=True)
add("max_pool2d", lambda m, x: aten.max_pool2d(x, [2, 2]), inference=True)
add("max_pool3d", lambda m, x: aten.max_pool3d(x, [2, 2, 2]), rank=3, inference=True)
add("max_pool2d_with_indices", lambda m, x: F.max_pool2d(x, 2))
add("max_pool3d_with_indices", lambda m, x: F.max_pool3d(x, 2), rank=3)
add("avg_pool1d", lambda m, x: F.avg_pool1d(x, 2), rank=1, inference=True)
add("avg_pool2d", lambda m, x: F.avg_pool2d(x, 2))
add("avg_pool3d", lambda m, x: F.avg_pool3d(x, 2), rank=3)
add("_adaptive_avg_pool2d", lambda m, x: F.adaptive_avg_pool2d(x, 2))
add("_adaptive_avg_pool3d", lambda m, x: F.adaptive_avg_pool3d(x, 2), rank=3)
add("adaptive_avg_pool1d", lambda m, x: F.adaptive_avg_pool1d(x, 2), rank=1, inference=True)
add("adaptive_avg_pool2d", lambda m, x: F.adaptive_avg_pool2d(x, 2), inference=True)
add("adaptive_max_pool1d", lambda m, x: aten.adaptive_max_pool1d(x, [2])[0], rank=1, inference=True)
add("adaptive_max_pool2d", lambda m, x: F.adaptive_max_pool2d(x, 2))
add("adaptive_max_pool3d", lambda m, x: F.adaptive_max_pool3d(x, 2), rank=3)
for mode, rank, name in (
    ("nearest", 1, "upsample_nearest1d"), ("nearest", 2, "upsample_nearest2d"),
    ("nearest", 3, "upsample_nearest3d"), ("nearest-exact", 1, "_upsample_nearest_exact1d"),
    ("nearest-exact", 2, "_upsample_nearest_exact2d"), ("nearest-exact", 3, "_upsample_nearest_exact3d"),
    ("linear", 1, "upsample_linear1d"), ("bilinear", 2, "upsample_bilinear2d"),
    ("trilinear", 3, "upsample_trilinear3d"), ("bicubic", 2, "upsample_bicubic2d"),
):  # fmt: skip
    add(name, lambda m, x, mode=mode: F.interpolate(x, scale_factor=2.0, mode=mode), rank=rank)
for mode in ("bilinear", "bicubic"):
    add(
        f"_upsample_{mode}2d_aa",
        lambda m, x, mode=mode: F.interpolate(x, size=(2, 2), mode=mode, antialias=True),
    )
for rank in (1, 2, 3):
    for mode, name in (("reflect", "reflection"), ("replicate", "replication")):
        add(
            f"{name}_pad{rank}d",
            lambda m, x, mode=mode, rank=rank: F.pad(x, [1] * (2 * rank), mode=mode),
            rank=rank,
        )
add("constant_pad_nd", lambda m, x: F.pad(x, (1, 1)))
add("grid_sampler_2d", lambda m, x: F.grid_sample(x, x.new_zeros(x.shape[0], 2, 2, 2), align_corners=False))  # fmt: skip
add("grid_sampler_3d", lambda m, x: F.grid_sample(x, x.new_zeros(x.shape[0], 2, 2, 2, 3), align_corners=False), rank=3)  # fmt: skip
add("glu", lambda m, x: F.glu(x, 1), out=4)

# --- boxes, and values that decide what is selected -------------------------------------------


def boxes(x: Tensor) -> Tensor:
    """One box in each image."""
    return torch.tensor([[0, 0, 0, 2, 3], [1, 1, 0, 3, 3]], dtype=x.dtype, device=x.device)


def first(index: Tensor) -> Tensor:
    """1.0, by way of what was selected."""
    return (index.reshape(-1)[:1] >= 0).double()


add("torchvision.roi_align", lambda m, x: torchvision.ops.roi_align(x, boxes(x), 4))
add("torchvision.roi_pool", lambda m, x: torchvision.ops.roi_pool(x, boxes(x), 4))
add("torchvision.ps_roi_align", lambda m, x: torchvision.ops.ps_roi_align(x, boxes(x), 2), out=2, gated=False)  # fmt: skip
add("torchvision.nms", lambda m, x: x * first(torchvision.ops.nms(pixels(x)[0], x[0, 0].flatten(), 0.5)), width=4, out=4, gated=False)  # fmt: skip
add("nonzero", lambda m, x: x * first((x > -9).nonzero()), gated=False)
add("masked_select", lambda m, x: x * first(torch.masked_select(x, x > -9).abs()), gated=False)

# --- movement ---------------------------------------------------------------------------------

add("view", lambda m, x: F.relu(x.view(x.shape[0], x.shape[1], 16)).view(x.shape))
add("_unsafe_view", lambda m, x: aten._unsafe_view(x, [x.shape[0], x.shape[1], 2, 8]))
add("reshape", lambda m, x: aten.reshape(x, [x.shape[0], x.shape[1], 2, 8]), inference=True)
add("_reshape_alias", lambda m, x: aten._reshape_alias(x, x.shape, x.stride()))
add("permute", lambda m, x: F.relu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
add("transpose", lambda m, x: x.transpose(2, 3))
add("t", lambda m, x: gate_by(x[:, :, 0, 0].t().relu().t(), x))
add("unsqueeze", lambda m, x: gate_by(x.mean((2, 3)).unsqueeze(2), x))
add("squeeze", lambda m, x: gate_by(F.avg_pool2d(x, 4).squeeze(3), x))
add("expand", lambda m, x: x.mean((2, 3), keepdim=True).expand(x.shape))
add("select", lambda m, x: gate_by(x.select(3, 1)[:, :, 0], x))
add("unbind", lambda m, x: gate_by(x.unbind(3)[1][:, :, 0], x))
add("alias", lambda m, x: aten.alias(x))
add("as_strided", lambda m, x: torch.as_strided(x, x.shape, x.stride()))
add("flip", lambda m, x: x.flip(3))
add("roll", lambda m, x: x.roll(1, 2))
add("rot90", lambda m, x: aten.rot90(x, 1, [2, 3]))
add("repeat", lambda m, x: x.repeat(1, 2, 1, 1), out=16)
add("tile", lambda m, x: aten.tile(x, [1, 2, 1, 1]), out=16, inference=True)
add("repeat_interleave", lambda m, x: aten.repeat_interleave(x, 2, 3), inference=True)
add("pixel_shuffle", lambda m, x: F.pixel_shuffle(x, 2), width=24, out=6)
add("pixel_unshuffle", lambda m, x: F.pixel_unshuffle(x, 2), out=32)
add("channel_shuffle", lambda m, x: aten.channel_shuffle(x, 2), width=12, out=12)
add("native_channel_shuffle", lambda m, x: aten.native_channel_shuffle(x, 2), width=12, out=12, inference=True)  # fmt: skip
add("unfold", lambda m, x: gate_by(x.unfold(3, 2, 2).mean((2, 3, 4)), x))
add("movedim", lambda m, x: aten.movedim(x, [2], [3]), inference=True)
add("swapaxes", lambda m, x: aten.swapaxes(x, 2, 3), inference=True)
add("diagonal", lambda m, x: gate_by(x.diagonal(0, 2, 3).sum(2), x))
add("index_select", lambda m, x: x.index_select(3, torch.tensor([1, 0])))
add("index", lambda m, x: x[:, :, torch.tensor([1, 0])])
add("flatten", lambda m, x: aten.flatten(x, 2).unsqueeze(3), inference=True)
add("unflatten", lambda m, x: aten.unflatten(x, 2, [2, 2]).mean(2), inference=True)
add("split", lambda m, x: torch.cat(x.split(x.shape[1] // 2, 1)[::-1], 1))
add("split_with_sizes", lambda m, x: torch.cat(x.split([1, 3], 2)[::-1], 2))
add("split_copy", lambda m, x: torch.cat(aten.split_copy(x, 2, 2)[::-1], 2))
add("chunk", lambda m, x: torch.cat(aten.chunk(x, 2, 1)[::-1], 1), inference=True)
add("unsafe_split", lambda m, x: torch.cat(torch.unsafe_split(x, x.shape[1] // 2, 1)[::-1], 1))
add(
    "unsafe_split_with_sizes", lambda m, x: torch.cat(aten.unsafe_split_with_sizes(x, [1, 3], 2), 2)
)
add("unsafe_chunk", lambda m, x: torch.cat(aten.unsafe_chunk(x, 2, 1)[::-1], 1), inference=True)
add("slice", lambda m, x: x[:, :, 1:3])
add("narrow", lambda m, x: aten.narrow(x, 2, 1, 2), inference=True)
add("cat", lambda m, x: torch.cat((x, F.relu(x)), 1), out=16)
add("concat", lambda m, x: aten.concat([x, F.relu(x)], 1), out=16, inference=True)
add("embedding", lambda m, x: x + F.embedding(torch.tensor([[0, 4, 2, 1]]), m.matrix).transpose(1, 2)[..., None])  # fmt: skip
add("index_put", lambda m, x: x.index_put((torch.tensor([1]),), F.silu(x[:1])))
add("_index_put_impl", lambda m, x: aten._index_put_impl(x, [torch.tensor([1])], F.silu(x[:1])))
add("stack", lambda m, x: torch.stack((x, F.relu(x)), 2).mean(2))

# --- elementwise ------------------------------------------------------------------------------

add("copy", lambda m, x: torch.zeros_like(x).copy_(x))
add("hardswish", lambda m, x: F.hardswish(x))
add("_prelu_kernel", lambda m, x: F.prelu(x, m.gain))
add("native_dropout", lambda m, x: aten.native_dropout(x, 0.0, True)[0], gated=False)
add("dropout", lambda m, x: aten.dropout(x, 0.5, False), inference=True)
add("feature_dropout", lambda m, x: aten.feature_dropout(x, 0.5, False), inference=True)
add("alpha_dropout", lambda m, x: aten.alpha_dropout(x, 0.5, False), inference=True)
add("rsub", lambda m, x: aten.rsub(x, 1.0))
add("where", lambda m, x: torch.where(x > 0, x, 0.1))
add("_to_copy", lambda m, x: x.float().double())
add("log_sigmoid_forward", lambda m, x: F.logsigmoid(x))
add("masked_fill", lambda m, x: x.masked_fill(x > 0.5, 0.2))
add("rrelu_with_noise", lambda m, x: F.rrelu(x))
add("contiguous", lambda m, x: aten.contiguous(x), inference=True)
add("clamp", lambda m, x: x.clamp(-0.2, 0.4))
add("fill", lambda m, x: x + torch.empty_like(x).fill_(0.3))
add("bucketize", lambda m, x: torch.bucketize(x, torch.tensor([-0.5, 0.0, 0.5], dtype=x.dtype, device=x.device)).double())  # fmt: skip
add("lerp", lambda m, x: torch.lerp(x, F.relu(x), 0.3))

# --- constants --------------------------------------------------------------------------------


def column(x: Tensor, values: Tensor) -> Tensor:
    return x * values.view(1, -1, 1, 1)


add(
    "zeros", lambda m, x: x + torch.zeros(x.shape[1], dtype=x.dtype, device=x.device).view(-1, 1, 1)
)
add("ones", lambda m, x: column(x, torch.ones(x.shape[1], dtype=x.dtype, device=x.device)))
add("full", lambda m, x: column(x, torch.full((x.shape[1],), 0.5, dtype=x.dtype, device=x.device)))
add("empty", lambda m, x: column(x, torch.empty(x.shape[1], dtype=x.dtype, device=x.device).fill_(2)))  # fmt: skip
add("empty_strided", lambda m, x: column(x, torch.empty_strided((x.shape[1],), (1,), dtype=x.dtype, device=x.device).fill_(2)))  # fmt: skip
add("new_zeros", lambda m, x: x + x.new_zeros(x.shape[1], 1, 1))
add("new_ones", lambda m, x: column(x, x.new_ones(x.shape[1])))
add("new_full", lambda m, x: column(x, x.new_full((x.shape[1],), 0.5)))
add("new_empty", lambda m, x: column(x, x.new_empty(x.shape[1]).fill_(2)))
add("new_empty_strided", lambda m, x: column(x, x.new_empty_strided((x.shape[1],), (1,)).fill_(2)))
add("zeros_like", lambda m, x: x + torch.zeros_like(x))
add("ones_like", lambda m, x: x * torch.ones_like(x))
add("full_like", lambda m, x: x * torch.full_like(x, 0.5))
add("empty_like", lambda m, x: x * torch.empty_like(x).fill_(0.5))
add("scalar_tensor", lambda m, x: x * aten.scalar_tensor(0.5, dtype=x.dtype, device=x.device))
add("zero", lambda m, x: x + torch.empty_like(x).zero_())
# What is drawn in eval mode, one value or more per channel, pins what it meets.
add(
    "rand",
    lambda m, x: column(x, torch.rand(x.shape[1], dtype=x.dtype, device=x.device).sign()),
    gated=False,
)
add("randn", lambda m, x: column(x, torch.randn(x.shape[1], dtype=x.dtype, device=x.device).abs().sign()), gated=False)  # fmt: skip
add("rand_like", lambda m, x: x * torch.rand_like(x).sign(), gated=False)
add("randn_like", lambda m, x: x * torch.randn_like(x).abs().sign(), gated=False)
add("bernoulli", lambda m, x: x * torch.bernoulli(torch.ones_like(x)), gated=False)
add("uniform", lambda m, x: x * torch.empty_like(x).uniform_(1, 2).sign(), gated=False)
add("normal", lambda m, x: x * torch.empty_like(x).normal_().abs().sign(), gated=False)
add("arange", lambda m, x: column(x, torch.arange(x.shape[1], dtype=x.dtype, device=x.device)), gated=False)  # fmt: skip
add("linspace", lambda m, x: column(x, torch.linspace(0.0, 1.0, 8, dtype=x.dtype, device=x.device)), gated=False)  # fmt: skip
add("eye", lambda m, x: maps(pixels(x) @ torch.eye(8, dtype=x.dtype, device=x.device)), gated=False)
add("lift_fresh", lambda m, x: x * torch.tensor(0.5))
add("_local_scalar_dense", lambda m, x: x * torch.ones(1, device="cpu").item())


# --- recurrent layers -------------------------------------------------------------------------


def recurrent(m: nn.Module, x: Tensor) -> Tensor:
    return maps(m.layer(pixels(x))[0])


def one_step(m: nn.Module, x: Tensor) -> Tensor:
    state = m.layer(x.mean((2, 3)))
    return (state[0] if isinstance(state, tuple) else state)[:, :, None, None]


def packed(m: nn.Module, x: Tensor) -> Tensor:
    data = pack_padded_sequence(pixels(x), torch.tensor([16, 16]), batch_first=True)
    return maps(pad_packed_sequence(data, batch_first=True)[0])


LAYER = {"batch_first": True}
add("lstm", recurrent, out=6, inference=True, layer=lambda: nn.LSTM(8, 6, **LAYER))
add("gru", recurrent, out=6, inference=True, layer=lambda: nn.GRU(8, 6, **LAYER))
add("rnn_tanh", recurrent, out=6, inference=True, layer=lambda: nn.RNN(8, 6, **LAYER))
add("rnn_relu", recurrent, out=6, inference=True, layer=lambda: nn.RNN(8, 6, nonlinearity="relu", **LAYER))  # fmt: skip
add("lstm_cell", one_step, out=6, inference=True, layer=lambda: nn.LSTMCell(8, 6))
add("gru_cell", one_step, out=6, inference=True, layer=lambda: nn.GRUCell(8, 6))
add("rnn_tanh_cell", one_step, out=6, inference=True, layer=lambda: nn.RNNCell(8, 6))
add("rnn_relu_cell", one_step, out=6, inference=True, layer=lambda: nn.RNNCell(8, 6, nonlinearity="relu"))  # fmt: skip
add("_pack_padded_sequence", packed)
add("_pad_packed_sequence", packed, inference=True)
# --- rows at positions -----------------------------------------------------------------------


def rows(x: Tensor) -> Tensor:
    """Positions along the third axis."""
    return torch.tensor([2, 0, 2, 1], device=x.device)


def places(x: Tensor) -> Tensor:
    """The same, one for every value."""
    return rows(x)[:, None].expand_as(x)


def unpooled(x: Tensor, rank: int) -> Tensor:
    pool, unpool = ((F.max_pool2d, F.max_unpool2d), (F.max_pool3d, F.max_unpool3d))[rank - 2]
    values, indices = pool(x, 2, return_indices=True)
    return unpool(values, indices, 2)


def deformed(m: nn.Module, x: Tensor) -> Tensor:
    """Sampled between the pixels, the lower half of the channels elsewhere than the upper."""
    offset = torch.full((x.shape[0], 4, 4, 4), 0.3, dtype=x.dtype, device=x.device)
    mask = torch.full((x.shape[0], 2, 4, 4), 0.6, dtype=x.dtype, device=x.device)
    return torchvision.ops.deform_conv2d(x, offset, kernel(m), m.matrix[:, 0], mask=mask)


add("index_add", lambda m, x: x.index_add(2, rows(x), F.relu(x)))
add("index_copy", lambda m, x: x.index_copy(2, rows(x)[2:], F.relu(x)[:, :, :2]))
add("index_fill", lambda m, x: x.index_fill(2, rows(x), 0.0))
add("gather", lambda m, x: x.gather(2, x.argsort(2)))
add("scatter", lambda m, x: x.scatter(2, places(x)[:, :, 1:2], F.relu(x)))
add("scatter_add", lambda m, x: torch.zeros_like(x).scatter_add_(2, places(x), F.relu(x)))
add("scatter_reduce", lambda m, x: x.scatter_reduce(2, places(x), F.relu(x), "mean"))
add("max_unpool2d", lambda m, x: unpooled(x, 2))
add("max_unpool3d", lambda m, x: unpooled(x, 3), rank=3)
add("torchvision.deform_conv2d", deformed, out=5)


ELSEWHERE = {
    "cudnn_convolution": "runs on CUDA only",
    "cudnn_batch_norm": "runs on CUDA only",
    "miopen_batch_norm": "runs on ROCm only",
    "native_batch_norm_legit": "the name of _native_batch_norm_legit in older versions of torch",
    "_fused_rms_norm": "runs on accelerators only; the CPU takes mean, mul and rsqrt",
    "pointwise": "no operation: the shared rule of all that torch tags as pointwise",
    "sym_size": "reads a size under symbolic shapes; eager runs give plain integers",
}


POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda x: x + F.relu(x),
    "add scalar": lambda x: x + 0.3,
    "sub": lambda x: x - F.relu(x),
    "mul": lambda x: x * torch.sigmoid(x),
    "div": lambda x: x / (1 + x.abs()),
    "pow": lambda x: x.pow(2),
    "maximum": lambda x: torch.maximum(x, -x),
    "addcmul": lambda x: torch.addcmul(x, x, F.relu(x), value=0.5),
    "atan2": lambda x: torch.atan2(x, x.abs() + 1),
    "relu_": lambda x: x.relu_(),
    "mul_": lambda x: x.mul_(0.5),
    "sub_": lambda x: x.sub_(0.2),
    "elu": F.elu,
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "hardtanh": F.hardtanh,
    "hardsigmoid": F.hardsigmoid,
    "leaky_relu": F.leaky_relu,
    "threshold": lambda x: F.threshold(x, 0.1, 0.2),
    "softshrink": F.softshrink,
    "exp": torch.exp,
    "erf": torch.erf,
    "sin": torch.sin,
    "floor": torch.floor,
    "comparison": lambda x: (x > 0.1).double(),
    "logical": lambda x: ((x > 0) & (x < 1)).double(),
    "nan_to_num": torch.nan_to_num,
    "abs": torch.abs,
    "remainder": lambda x: torch.remainder(x, 0.7),
}
