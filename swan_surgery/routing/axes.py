"""Which axis of what crosses holds the channels."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd


def channel_axis_of(trunk: nn.Module, crossing: Tensor) -> int:
    """By the last layer of the trunk whose width is that of an axis: behind convolutions 1, behind linear layers the last.

    Where nothing says otherwise it is axis 1 of images and rows, and the last one of sequences.
    """
    if crossing.ndim <= 2:
        return crossing.ndim - 1
    last = crossing.ndim - 1
    fallback = 1 if crossing.ndim > 3 else last
    for module in reversed(list(trunk.modules())):
        width = _width(module)
        fits = [axis for axis in (1, last) if crossing.shape[axis] == width]
        if len(fits) == 1:
            return fits[0]
        if fits:
            return 1 if isinstance(module, (_ConvNd, _NormBase, nn.GroupNorm)) else last
    return fallback


def _width(module: nn.Module) -> int | None:
    if isinstance(module, _ConvNd):
        return module.out_channels
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    weight = getattr(module, "weight", None)
    is_norm = isinstance(module, (_NormBase, nn.LayerNorm, nn.RMSNorm))
    if is_norm and isinstance(weight, torch.Tensor) and weight.ndim == 1:
        return weight.shape[0]
    return None
