"""The networks of `quality.py`: He's CIFAR ResNets with their pretrained weights, and torchvision's."""

from pathlib import Path

import torch
from torch import nn

from swan_surgery.experiments.networks import CifarResNet, small_resnet50, small_vgg16


def build(network: str, share: float = 1.0) -> nn.Module:
    """A network with random weights; `share` of its MACs if it is to be uniformly thinner."""
    factor = share**0.5
    if network in ("resnet20", "resnet56"):
        first, second, third = (max(1, round(factor * width)) for width in (16, 32, 64))
        return CifarResNet(int(network.removeprefix("resnet")), (first, second, third))
    if network == "resnet50":
        return small_resnet50(max(1, round(64 * factor)))
    if network == "vgg16_bn":
        return small_vgg16()
    raise SystemExit(
        f"unknown network {network!r}; there are resnet20, resnet56, resnet50, vgg16_bn"
    )


def load_pretrained_(model: nn.Module, network: str, folder: Path) -> None:
    """Read `<network>-*.th`, as published by Yerlan Idelbayev for the CIFAR ResNets."""
    files = sorted(folder.glob(f"{network}-*.th"))
    if not files:
        raise SystemExit(f"--pretrained {folder}: no file {network}-*.th")
    state = torch.load(  # noqa: TID251 - published as a pickle of tensors
        files[0], weights_only=True, map_location="cpu"
    )["state_dict"]
    model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
