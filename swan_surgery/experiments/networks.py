"""Networks for small images: what the configurations in `recipes/configs` and the benchmarks start from."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from swan_surgery.environment.extras import needed_from


with needed_from("cli"):
    import torchvision


def mlp(*widths: int) -> nn.Module:
    """Hidden layers of these widths on MNIST's images."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise((28 * 28, *widths)):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10))


def wide_mlp() -> nn.Module:
    """One hidden layer, generously wide."""
    return mlp(8192)


class LeNet(nn.Module):
    """Two 5x5 convolutions with pooling, one hidden linear layer, on MNIST's images."""

    def __init__(self, first: int, second: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, first, 5)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.fc1 = nn.Linear(second * 4 * 4, hidden)
        self.fc2 = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1, 28, 28] to [B, 10]."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        logits: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return logits


def wide_lenet() -> nn.Module:
    """Generously wide: 32 and 64 channels, 4,096 hidden units."""
    return LeNet(32, 64, 4096)


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
        """[B, C, H, W] to [B, C', H', W']."""
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, *self.pad))
        return F.relu(h + x)


class CifarResNet(nn.Module):
    """He's 6n + 2 layers for 32x32 images; state-dict keys as in the published weights."""

    def __init__(self, depth: int, widths: tuple[int, int, int] = (16, 32, 64)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        first, second, third = widths
        blocks = (depth - 2) // 6
        self.layer1 = _stage(first, first, blocks, 1)
        self.layer2 = _stage(first, second, blocks, 2)
        self.layer3 = _stage(second, third, blocks, 2)
        self.linear = nn.Linear(third, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, 10]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def _stage(before: int, after: int, blocks: int, stride: int) -> nn.Sequential:
    rest = (Block(after, after, 1) for _ in range(blocks - 1))
    return nn.Sequential(Block(before, after, stride), *rest)


def resnet20() -> nn.Module:
    """He's ResNet-20."""
    return CifarResNet(20)


def resnet56() -> nn.Module:
    """He's ResNet-56."""
    return CifarResNet(56)


def small_resnet50(width_per_group: int = 64) -> nn.Module:
    """Torchvision's ResNet-50 with a 3x3 stem and without max-pooling, for 32x32 images."""
    model: nn.Module = torchvision.models.resnet50(num_classes=10, width_per_group=width_per_group)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    return model


def small_vgg16() -> nn.Module:
    """Torchvision's VGG16-BN; 32x32 images leave maps of one pixel, so one hidden layer is the head."""
    model: nn.Module = torchvision.models.vgg16_bn()
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Sequential(
        nn.Linear(512, 512), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(512, 10)
    )
    return model


__all__ = [
    "CifarResNet",
    "LeNet",
    "mlp",
    "resnet20",
    "resnet56",
    "small_resnet50",
    "small_vgg16",
    "wide_lenet",
    "wide_mlp",
]
