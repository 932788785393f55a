"""Our smallest model of each coupling pattern, as functions returning (model, inputs), in the dict `ZOO`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo_trunks import ZOO, conv_bn, pattern


__all__ = ["ZOO"]


@pattern("inverted_residual", (2, 3, 8, 8))
class InvertedResidual(nn.Module):
    """MobileNetV2's block: expand, depthwise, project, add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 4), nn.ReLU6())
        self.block = nn.Sequential(
            nn.Sequential(conv_bn(4, 8, 1), nn.ReLU6()),
            nn.Sequential(conv_bn(8, 8, groups=8), nn.ReLU6()),
            conv_bn(8, 4, 1),
        )
        self.last = nn.Sequential(conv_bn(4, 6, 1), nn.ReLU6())
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.block(x)
        return self.fc(F.adaptive_avg_pool2d(self.last(x), (1, 1)).reshape(x.shape[0], -1))


@pattern("inception", (2, 3, 8, 8))
class Inception(nn.Module):
    """Three branches of different widths, concatenated and read by one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 4)
        self.one = conv_bn(4, 2, 1)
        self.three = nn.Sequential(conv_bn(4, 3, 1), nn.ReLU(), conv_bn(3, 5))
        self.pooled = conv_bn(4, 3, 1)
        self.last = conv_bn(10, 6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        pooled = self.pooled(F.max_pool2d(x, 3, 1, 1))
        x = F.relu(torch.cat((self.one(x), self.three(x), pooled), 1))
        return self.fc(F.relu(self.last(x)).mean((2, 3)))


@pattern("unet", (2, 3, 8, 8))
class UNet(nn.Module):
    """One level down and up; the skip is concatenated; the output is a map."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.inner = conv_bn(3, 4), conv_bn(4, 6)
        self.up = nn.ConvTranspose2d(6, 5, 2, 2)
        self.decode = conv_bn(9, 4)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.encode(x))
        low = F.relu(self.inner(F.max_pool2d(skip, 2)))
        return self.head(F.relu(self.decode(torch.cat((skip, self.up(low)), 1))))


@pattern("squeeze_excite", (2, 3, 8, 8))
class SqueezeExcite(nn.Module):
    """A branch of pooled channels scales the channels it was pooled from."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 6)
        self.fc1, self.fc2 = nn.Conv2d(6, 3, 1), nn.Conv2d(3, 6, 1)
        self.last = conv_bn(6, 4, 1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        scale = torch.sigmoid(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))))
        return self.fc(F.relu(self.last(scale * x)).mean((2, 3)))


@pattern("grouped", (2, 3, 8, 8))
class Grouped(nn.Module):
    """ResNeXt's middle: a grouped convolution between two dense ones."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.grouped = conv_bn(3, 8), conv_bn(8, 6, groups=2)
        self.after = conv_bn(6, 4, 1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grouped(F.relu(self.before(x))))
        return self.fc(F.relu(self.after(x)).mean((2, 3)))


@pattern("shuffle", (2, 3, 8, 8))
class Shuffle(nn.Module):
    """ShuffleNetV2's unit: half of the channels pass by, then both halves interleave."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.branch = nn.Sequential(
            conv_bn(4, 4, 1), nn.ReLU(), conv_bn(4, 4, groups=4), conv_bn(4, 4, 1), nn.ReLU()
        )
        self.last = conv_bn(8, 6, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = F.relu(self.stem(x)).chunk(2, dim=1)
        x = torch.cat((x1, self.branch(x2)), dim=1)
        batch, channels, height, width = x.size()
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        x = x.view(batch, channels, height, width)
        return self.fc(F.relu(self.last(x)).mean([2, 3]))


@pattern("shared", (2, 3, 8, 8))
class Shared(nn.Module):
    """One convolution called twice in a row: its input and output channels are the same units."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 6)
        self.common = nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.common(F.relu(self.stem(x))))
        return self.fc(F.relu(self.common(x)).mean((2, 3)))


@pattern("functional", (2, 3, 8, 8))
class Functional(nn.Module):
    """Convolution and linear called as functions on bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(6, 3, 3, 3))
        self.bias = nn.Parameter(torch.empty(6))
        self.conv = nn.Conv2d(6, 5, 3, padding=1)
        self.matrix = nn.Parameter(torch.empty(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.kernel, self.bias, padding=1))
        return F.linear(F.relu(self.conv(x)).mean((2, 3)), self.matrix)


@pattern("multi_input", (2, 3, 8, 8), (2, 1, 8, 8))
class MultiInput(nn.Module):
    """Two stems whose outputs are added."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.depth = conv_bn(3, 6), conv_bn(1, 6)
        self.last = conv_bn(6, 4)
        self.fc = nn.Linear(4, 5)

    def forward(self, image: Tensor, depth: Tensor) -> Tensor:
        x = F.relu(self.image(image) + self.depth(depth))
        return self.fc(F.relu(self.last(x)).mean((2, 3)))


@pattern("multi_output", (2, 3, 8, 8))
class MultiOutput(nn.Module):
    """A dict with classes and a map; in training an auxiliary output joins them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = conv_bn(3, 6), conv_bn(6, 4)
        self.map, self.fc, self.aux = nn.Conv2d(6, 2, 1), nn.Linear(4, 5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.stem(x))
        out = {"classes": self.fc(F.relu(self.last(x)).mean((2, 3))), "map": self.map(x)}
        if self.training:
            out["aux"] = self.aux(x.mean((2, 3)))
        return out
