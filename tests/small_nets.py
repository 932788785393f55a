"""Networks written as one function: layers by keyword, forward given where the test is."""

from torch import Tensor, nn


class Net(nn.Module):
    """Layers by keyword; `run(module, x)` is the forward."""

    def __init__(self, run, **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor):
        return self.run(self, x)


class PairNet(Net):
    """The same with two inputs."""

    def forward(self, x: Tensor, y: Tensor):
        return self.run(self, x, y)


def conv(into: int, out: int, kernel: int = 1, **options) -> nn.Conv2d:
    return nn.Conv2d(into, out, kernel, padding=kernel // 2, **options)
