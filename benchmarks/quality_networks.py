"""The networks of `quality.py`: He's CIFAR ResNets with their pretrained weights, and torchvision's."""

from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions and a shortcut without parameters (option A of He et al.)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        added = out_channels - in_channels
        self.pad = (added // 2, added - added // 2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']."""
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, *self.pad))
        return F.relu(h + x)


class CifarResNet(nn.Module):
    """6n + 2 layers for 32x32 images; state-dict keys as in the published weights."""

    def __init__(self, depth: int, widths: tuple[int, int, int] = (16, 32, 64)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        before = widths[0]
        for stage, width in enumerate(widths):
            blocks = []
            for index in range((depth - 2) // 6):
                blocks.append(Block(before, width, 2 if stage and not index else 1))
                before = width
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(before, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 10]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def build(network: str, share: float = 1.0) -> nn.Module:
    """A network with random weights; `share` of its MACs if it is to be uniformly thinner."""
    factor = share**0.5
    if network in ("resnet20", "resnet56"):
        first, second, third = (max(1, round(factor * width)) for width in (16, 32, 64))
        return CifarResNet(int(network.removeprefix("resnet")), (first, second, third))
    if network == "resnet50":
        model = torchvision.models.resnet50(
            weights=None, num_classes=10, width_per_group=max(1, round(64 * factor))
        )
        model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        model.maxpool = nn.Identity()
        return model
    if network == "vgg16_bn":
        model = torchvision.models.vgg16_bn(weights=None)
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier = nn.Sequential(
            nn.Linear(512, 512), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(512, 10)
        )
        return model
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
