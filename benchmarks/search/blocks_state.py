"""Python around the tensors: buffers, hooks, caches, modes, gradients, random numbers."""

import random

import torch
import torch.nn.functional as F
from kinds import Block, conv, kind
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@kind("moving_mean")
class MovingMean(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.register_buffer("mean", torch.zeros(channels))
        self.layer = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * x.mean((0, 2, 3)))
        return x - self.mean.view(1, -1, 1, 1)


@kind("reassigned_buffer")
class ReassignedBuffer(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.register_buffer("peak", torch.ones(()))
        self.layer = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        if self.training:
            self.peak = torch.maximum(self.peak, x.detach().abs().amax((0, 1, 2, 3)))
        return x / self.peak


@kind("buffer_arithmetic")
class BufferArithmetic(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.layer = nn.Conv2d(channels, channels, 3, padding=1)
        self.register_buffer("running_mean", torch.randn(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.running_var + 1e-5).rsqrt()
        shift = -self.running_mean * scale
        return F.relu(self.layer(x) * scale[:, None, None] + shift[:, None, None])


@kind("without_gradient")
class WithoutGradient(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.look, self.layer = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = torch.sigmoid(self.look(x))
        return x + self.layer(x) * scale


@kind("no_autocast")
class NoAutocast(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.layer = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return x + torch.tanh(self.layer(x))


class ClippedGradient(torch.autograd.Function):
    """Identity forward, clipped gradient backward."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # noqa: ANN001, ARG004 - torch's own
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # noqa: ANN001, ARG004 - torch's own
        return grad.clamp(-0.5, 0.5)


@kind("custom_backward")
class CustomBackward(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.one, self.two = conv(channels, channels), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(ClippedGradient.apply(self.one(x)))


@kind("checkpointed")
class Checkpointed(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.reentrant = rng.random() < 0.5
        self.inner = nn.Sequential(nn.Conv2d(channels, 6, 1), nn.GELU(), nn.Conv2d(6, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.inner, x, use_reentrant=self.reentrant)


@kind("random_numbers")
class RandomNumbers(Block):
    """Dropout, drop path or noise while training: nothing of it in eval mode."""

    draws = True

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.layer, self.mode = conv(channels, channels), rng.choice(("dropout", "path", "noise"))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.mode == "dropout":
            return F.dropout2d(y, 0.3, self.training)
        if not self.training:
            return x + y
        if self.mode == "path":
            return x + y * torch.bernoulli(torch.full((len(x), 1, 1, 1), 0.7, dtype=x.dtype))
        return x + y + 0.1 * torch.randn_like(y)


@kind("counting")
class Counting(Block):
    """Python state that changes with every call."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.layer, self.calls = conv(channels, channels), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x)


@kind("grid_cache")
class GridCache(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.shape: torch.Size | None = None
        self.grid: Tensor | None = None
        self.layer = nn.Conv2d(channels + 1, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.shape != x.shape:
            self.shape = x.shape
            rows = torch.linspace(-1, 1, x.shape[2], dtype=x.dtype)
            self.grid = rows.view(1, 1, -1, 1).expand(len(x), 1, *x.shape[2:])
        return F.relu(self.layer(torch.cat((x, self.grid), 1)))


@kind("forward_hook")
class ForwardHook(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.layer = nn.Conv2d(channels, channels, 3, padding=1)
        if rng.random() < 0.5:
            self.layer.register_forward_hook(_doubled)
        else:
            self.layer.register_forward_pre_hook(_halved)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x))


def _doubled(_module: nn.Module, _args: tuple[Tensor], out: Tensor) -> Tensor:
    return 2 * out


def _halved(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] / 2,)


@kind("container_hook")
class ContainerHook(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.inner = nn.Sequential(conv(channels, 6), nn.Conv2d(6, channels, 1))
        self.inner.register_forward_hook(_doubled)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


@kind("frozen_mode")
class FrozenMode(Block):
    """A batch-norm that stays in eval mode whatever the model does."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.layer, self.norm = nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)
        self.norm.eval()

    def train(self, mode: bool = True) -> "FrozenMode":  # noqa: FBT001, FBT002 - torch's own
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.layer(x)))


@kind("train_only_branch")
class TrainOnlyBranch(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.one, self.more = conv(channels, channels), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return y + self.more(x) if self.training else y


@kind("in_place_writes")
class InPlaceWrites(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.layer = nn.Conv2d(channels, 8, 3, padding=1)
        self.out_channels = 8

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        y[:, 2:5] *= 0.5
        y[:, ::2] += 0.25 * y[:, 1::2].clone()
        return y.clamp_(-1, 1)


@kind("functional_weights")
class FunctionalWeights(Block):
    """Weights built in the forward pass from bare parameters."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.left = nn.Parameter(torch.randn(6, 3) * 0.5)
        self.right = nn.Parameter(torch.randn(3, channels) * 0.5)
        self.out_channels = 6

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.left @ self.right)[:, :, None, None]
        return F.leaky_relu(F.conv2d(x, weight), 0.1)


@kind("table_of_positions")
class TableOfPositions(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.table = nn.Parameter(torch.randn(1, channels, 4, 4))
        self.layer = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        table = F.interpolate(self.table, x.shape[2:], mode="bicubic", align_corners=False)
        return self.layer(x + table)


@kind("swapped_module")
class SwappedModule(Block):
    """Which module runs is chosen by a Python number that depends on the size."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.small, self.large = conv(channels, channels, 1), conv(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.small(x) if x.shape[-1] < 10 else self.large(x)
