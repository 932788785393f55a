"""A network of drawn blocks from one seed: the same seed is the same network, weights and inputs."""

import random
from dataclasses import dataclass

import blocks_odd  # noqa: F401  importing a block file registers its kinds
import blocks_plain  # noqa: F401
import blocks_state  # noqa: F401
import blocks_tokens  # noqa: F401
import torch
from kinds import KINDS, conv, width
from torch import Tensor, nn


HEADS = ("classifier", "dense", "pyramid", "tokens", "pair")


@dataclass(frozen=True)
class Recipe:
    """What was drawn: enough to say in one line what a network is made of."""

    seed: int
    blocks: tuple[str, ...]
    head: str
    batch: int
    size: tuple[int, int]


class Network(nn.Module):
    """Stem, blocks, head; the head sees the map behind the first block as well."""

    def __init__(self, stem: nn.Module, blocks: list[nn.Module], head: str, channels: int) -> None:
        super().__init__()
        self.stem, self.blocks, self.kind = stem, nn.ModuleList(blocks), head
        if head == "classifier":
            self.norm = nn.BatchNorm2d(channels)
            self.fc = nn.Linear(channels, 5)
        else:
            self.last = nn.Conv2d(channels, 3, 1)
            self.fc = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> object:
        x = first = self.stem(x)
        for i, block in enumerate(self.blocks):
            x = block(x)
            first = x if i == 0 else first
        if self.kind == "classifier":
            return self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(self.norm(x), 1), 1))
        if self.kind == "dense":
            return nn.functional.interpolate(self.last(x), scale_factor=2)
        if self.kind == "pyramid":
            # Quantised maps have ties, and rounding would choose which of them gets the gradient.
            ramp = torch.linspace(0, 1e-3, x.shape[2] * x.shape[3], dtype=x.dtype)
            largest = (x + ramp.view(x.shape[2:])).amax((2, 3))
            return {"low": self.last(x), "means": [first.mean((2, 3)), largest]}
        if self.kind == "tokens":
            return self.fc(x.flatten(2).transpose(1, 2))
        return self.last(x), self.fc(x.mean((2, 3)))


def drawn(seed: int, kinds: tuple[str, ...] = ()) -> tuple[Recipe, nn.Module, Tensor]:
    """The network of a seed, float64 and in eval mode, and its example input.

    `kinds` takes the place of the drawn blocks: for shrinking.
    """
    rng = random.Random(seed)  # noqa: S311 - nothing secret
    names = tuple(rng.choice(sorted(KINDS)) for _ in range(rng.choice((1, 2, 2, 3, 4))))
    names = kinds or names
    head, batch = rng.choice(HEADS), rng.choice((1, 2, 3))
    size = rng.choice(((8, 8), (8, 10), (12, 8)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        channels = width(rng)
        stem = conv(3, channels, norm=rng.random() < 0.5)
        blocks = []
        for name in names:
            blocks.append(KINDS[name](channels, random.Random(rng.random())))  # noqa: S311
            channels = blocks[-1].out_channels
        model = Network(stem, blocks, head, channels).double()
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0.1, 0.4)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, 0.0, 0.3)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        model.eval()
        example = torch.randn(batch, 3, *size, dtype=torch.float64)
    return Recipe(seed, names, head, batch, size), model, example


def other_inputs(recipe: Recipe) -> list[Tensor]:
    """Two more sizes and another batch, from the same seed."""
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    height, wide = recipe.size
    shapes = [
        (recipe.batch, height, wide),
        (1 + recipe.batch % 3, height, wide),
        (recipe.batch, height + 4, wide),
        (2, 10, 14),
    ]
    return [torch.randn(b, 3, h, w, dtype=torch.float64, generator=generator) for b, h, w in shapes]
