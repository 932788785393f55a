"""Which channels of a layer go, chosen together: what the next layer can read out of those that stay.

Optimal brain surgeon with blocks (Hassibi and Stork 1993; Kurtic et al. 2022, arXiv:2203.07259), for channels: with
G the covariance of what a convolution reads and W its weights, taking away channel j and solving for the rest costs
tr(W_j [(G^-1)_jj]^-1 W_j'). Channels go one after the other, with W and G^-1 brought up to date. How many go in each layer stays
what the given scores say; scores are handed to the channels in the new order. None of it is part of the package.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swan_surgery as swan


_POSITIONS = 32  # of each image
_DAMPING = 0.01


def correlated(
    gated: swan.GatedModel,
    dense: nn.Module,
    scores: Tensor,
    batches: Sequence[tuple[Tensor, Tensor]],
    seed: int,
) -> Tensor:
    """Scores with the same values in each layer that one convolution alone reads, in the order of what it would lose.

    Args:
        gated: of `dense`.
        dense: the network, whose modules bear the names of the layers.
        scores: (units,).
        batches: images and labels.
        seed: of the positions drawn.
    """
    found = scores.double().clone()
    modules = dict(dense.eval().named_modules())
    layers = gated.channels.layers
    for layer in layers:
        reader = modules[layer.name]
        units = list(layer.in_units)
        alone = [own.name for own in layers if set(own.in_units) & set(units)] == [layer.name]
        makers = [own for own in layers if set(own.out_units) & set(units)]
        if not isinstance(reader, nn.Conv2d) or reader.groups > 1 or len(set(units)) < len(units):
            continue
        if not alone or len(makers) != 1 or min(units) < 0:
            continue
        covariance = _covariance(dense, reader, batches, torch.Generator().manual_seed(seed))
        values = sorted(found[units].tolist())
        order = _order(covariance, reader, _output_scale(modules, layer.name))
        for value, channel in zip(values, order, strict=True):
            found[units[channel]] = value
    return found


def _output_scale(modules: dict[str, nn.Module], name: str) -> Tensor | float:
    """What a batch-norm behind a convolution multiplies its outputs with; by the names that torchvision gives."""
    places = [name.replace("conv", "bn")]
    head, _, number = name.rpartition(".")
    if number.isdigit():
        places.append(f"{head}.{int(number) + 1}")
    for place in places:
        norm = modules.get(place)
        if isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None:
            return (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().double()
    return 1.0


@torch.no_grad()
def _covariance(
    dense: nn.Module,
    reader: nn.Conv2d,
    batches: Sequence[tuple[Tensor, Tensor]],
    generator: torch.Generator,
) -> Tensor:
    """Of the patches that it reads, at some positions of every image: float64 (C taps, C taps)."""
    rows: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        del module
        patches = F.unfold(
            args[0],
            reader.kernel_size,
            dilation=reader.dilation,
            padding=reader.padding,
            stride=reader.stride,
        )
        count = min(_POSITIONS, patches.shape[2])
        drawn = torch.randint(patches.shape[2], (len(patches), count), generator=generator)
        index = drawn.to(patches.device)[:, None].expand(-1, patches.shape[1], -1)
        rows.append(patches.gather(2, index).transpose(1, 2).flatten(0, 1))

    handle = reader.register_forward_pre_hook(keep)
    try:
        for x, _ in batches:
            dense(x)
    finally:
        handle.remove()
    x = torch.cat(rows).double()
    x = x - x.mean(0)
    return x.T @ x / len(x)


@torch.no_grad()
def _order(covariance: Tensor, reader: nn.Conv2d, scale: Tensor | float) -> list[int]:
    """Channels in the order in which they go."""
    taps = covariance.shape[0] // reader.in_channels
    weight = reader.weight.detach().double().flatten(1)
    weight = weight * (scale[:, None] if isinstance(scale, Tensor) else scale)
    damping = _DAMPING * covariance.diagonal().mean()
    inverse = torch.linalg.inv(covariance + damping * torch.eye(len(covariance)).to(covariance))
    left, gone = list(range(reader.in_channels)), []
    while left:
        own = [slice(taps * j, taps * (j + 1)) for j in left]
        blocks = torch.linalg.inv(torch.stack([inverse[place, place] for place in own]))
        parts = torch.stack([weight[:, place] for place in own])
        losses = (parts @ blocks * parts).sum((1, 2))
        least = int(losses.argmin())
        place = own[least]
        weight = weight - weight[:, place] @ blocks[least] @ inverse[place]
        inverse = inverse - inverse[:, place] @ blocks[least] @ inverse[place]
        gone.append(left.pop(least))
    return gone


__all__ = ["correlated"]
