"""A small convolutional network for 8x8 images, written as anybody would write it."""

import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """Two convolutions and a shortcut: the shortcut couples the block's output with its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, H, W]."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(y)))


class DigitsNet(nn.Module):
    """Stem, residual block, downsampling, residual block, linear head."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(width)
        self.block1 = Residual(width)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.down_norm = nn.BatchNorm2d(2 * width)
        self.block2 = Residual(2 * width)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 1, 8, 8] to logits [B, 10]."""
        x = self.block1(F.relu(self.stem_norm(self.stem(x))))
        x = self.block2(F.relu(self.down_norm(self.down(x))))
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits
