"""The registry of block kinds: each maps [B, C, H, W] to [B, out_channels, H', W'] at any size."""

import random
from collections.abc import Callable

from torch import nn


KINDS: dict[str, Callable[[int, random.Random], nn.Module]] = {}


def kind(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Class decorator: draw `name`; the class takes (channels, rng) and sets `out_channels`."""

    def add(factory: type[nn.Module]) -> type[nn.Module]:
        if name in KINDS:
            raise ValueError(f"{name!r} is registered twice")
        KINDS[name] = factory
        return factory

    return add


class Block(nn.Module):
    """Keeps its input's channels unless a subclass says otherwise."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.out_channels = channels


def width(rng: random.Random) -> int:
    return rng.choice((4, 6, 8))


def conv(inputs: int, outputs: int, kernel: int = 3, *, norm: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=not norm)
    ]
    if norm:
        layers.append(nn.BatchNorm2d(outputs))
    return nn.Sequential(*layers, nn.ReLU())
