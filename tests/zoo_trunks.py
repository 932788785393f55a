"""The zoo's registry and its trunks: plain chain, residual, pre-activation and dense networks.

Models are float32, in eval mode, seeded, with non-trivial batch-norm statistics. Unlike the random networks they are
written out by hand, the way users write them, so a unit test can name their layers.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.random_layers import randomise_


ModelAndInputs = tuple[nn.Module, tuple[Tensor, ...]]
ZOO: dict[str, Callable[[], ModelAndInputs]] = {}


def pattern(name: str, *shapes: tuple[int, ...]):
    """Put a model class into ZOO; `shapes` are those of its inputs, batch included."""

    def add(model_class: type[nn.Module]) -> type[nn.Module]:
        def make() -> ModelAndInputs:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = model_class()
                generator = torch.Generator().manual_seed(0)
                randomise_(model, generator)
                inputs = tuple(torch.randn(shape, generator=generator) for shape in shapes)
            return model.eval(), inputs

        ZOO[name] = make
        return model_class

    return add


def conv_bn(in_channels: int, out_channels: int, kernel: int = 3, **options) -> nn.Sequential:
    options.setdefault("padding", kernel // 2)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, bias=False, **options),
        nn.BatchNorm2d(out_channels),
    )


@pattern("vgg", (2, 3, 8, 8))
class VGG(nn.Module):
    """Plain chain with and without batch-norm, flattened into two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
        )
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(
            nn.Linear(8 * 4, 10), nn.ReLU(True), nn.Dropout(), nn.Linear(10, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))


class _BlockA(nn.Module):
    """Basic block of the CIFAR ResNets; a narrower shortcut is padded with zeros (option A)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.missing = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1 or self.missing:
            front = self.missing // 2
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, front, self.missing - front))
        return F.relu(out + x)


@pattern("resnet_option_a", (2, 3, 8, 8))
class ResNetA(nn.Module):
    """ResNet-20 in small: two identity blocks, then a downsampling one with a padded shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 4)
        self.blocks = nn.Sequential(_BlockA(4, 4, 1), _BlockA(4, 4, 1), _BlockA(4, 8, 2))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(x)))
        return self.fc(F.avg_pool2d(x, x.size()[3]).flatten(1))


@pattern("resnet_projection", (2, 3, 8, 8))
class ResNetProjection(nn.Module):
    """Bottleneck with a projection shortcut, followed by an identity block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 4)
        self.reduce, self.middle = conv_bn(4, 3, 1), conv_bn(3, 3, stride=2)
        self.expand, self.downsample = conv_bn(3, 8, 1), conv_bn(4, 8, 1, stride=2)
        self.second = nn.Sequential(conv_bn(8, 5), nn.ReLU(), conv_bn(5, 8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        out = self.expand(F.relu(self.middle(F.relu(self.reduce(x)))))
        out += self.downsample(x)
        out = F.relu(out)
        out = F.relu(self.second(out) + out)
        return self.fc(out.mean((2, 3)))


@pattern("resnet_preactivation", (2, 3, 8, 8))
class ResNetPreActivation(nn.Module):
    """BN-ReLU-conv: the same trunk channels are read through two batch-norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 5, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(5), nn.Conv2d(5, 6, 3, padding=1, bias=False)
        self.bn3, self.fc = nn.BatchNorm2d(6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = self.conv1(F.relu(self.bn1(x)))
        x = x + self.conv2(F.relu(self.bn2(out)))
        return self.fc(F.relu(self.bn3(x)).mean((2, 3)))


@pattern("densenet", (2, 3, 8, 8))
class DenseNet(nn.Module):
    """Two dense layers and a transition: shared features, one batch-norm per consumer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(10), nn.Conv2d(10, 4, 3, padding=1, bias=False)
        self.norm3, self.transition = nn.BatchNorm2d(14), nn.Conv2d(14, 7, 1, bias=False)
        self.norm4, self.fc = nn.BatchNorm2d(7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        features.append(self.conv1(F.relu(self.norm1(torch.cat(features, 1)))))
        features.append(self.conv2(F.relu(self.norm2(torch.cat(features, 1)))))
        x = F.avg_pool2d(self.transition(F.relu(self.norm3(torch.cat(features, 1)))), 2)
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.norm4(x)), 1).flatten(1))
