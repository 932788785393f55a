"""Widths that only other methods read: a block can be re-parameterised after the cut as before it."""

import pytest
import torch
from torch import Tensor, nn

import swan_surgery as swan
from tests.closing import outputs


class Block(nn.Module):
    """Branches that become one convolution; the identity's kernel is made of attributes."""

    def __init__(self, in_chs: int, out_chs: int, *, depthwise: bool = False) -> None:
        super().__init__()
        self.in_chs, self.out_chs = in_chs, out_chs
        self.groups = in_chs if depthwise else 1
        self.num_branches = 4
        self.convs = nn.ModuleList(
            nn.Conv2d(in_chs, out_chs, 3, padding=1, groups=self.groups, bias=False)
            for _ in range(self.num_branches)
        )
        self.norm = nn.BatchNorm2d(out_chs)
        self.identity = Identity(in_chs) if in_chs == out_chs else None
        self.merged: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.merged is not None:
            return torch.relu(self.merged(x))
        out = self.norm(sum(conv(x) for conv in self.convs))
        return torch.relu(out if self.identity is None else out + self.identity(x))

    def merge_(self) -> None:
        self.merged = nn.Conv2d(self.in_chs, self.out_chs, 3, padding=1, groups=self.groups)
        scale = self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()
        kernel = torch.stack([self.convs[i].weight for i in range(self.num_branches)]).sum(0)
        kernel = kernel * scale[:, None, None, None]
        if self.identity is not None:
            kernel = kernel + self.identity.kernel(self.groups)
        self.merged.weight.data = kernel.detach()
        self.merged.bias.data = (self.norm.bias - self.norm.running_mean * scale).detach()


class Identity(nn.Module):
    """No layer but a norm."""

    def __init__(self, in_chs: int) -> None:
        super().__init__()
        self.in_chs = in_chs
        self.norm = nn.BatchNorm2d(in_chs, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def kernel(self, groups: int) -> Tensor:
        made = self.norm.weight.new_zeros(self.in_chs, self.in_chs // groups, 3, 3)
        for index in range(self.in_chs):
            made[index, index % (self.in_chs // groups), 1, 1] = 1
        return made * (1 + self.norm.eps) ** -0.5  # statistics as at the start


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            Block(3, 8),
            Block(8, 8),
            Block(8, 8, depthwise=True),
            Block(8, 16, depthwise=True),  # two of each channel
            Block(16, 12),
        )
        self.narrow = nn.Conv2d(12, 4, 1)  # as many channels as there are branches
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.narrow(self.blocks(x))))


@pytest.fixture(scope="module")
def gated() -> swan.GatedModel:
    torch.manual_seed(0)
    model = Net().eval()
    for block in model.blocks:
        block.norm.running_var.uniform_(0.5, 1.5)
        block.norm.running_mean.normal_()
    gated = swan.swanify(model.double(), torch.randn(2, 3, 8, 8, dtype=torch.float64))
    with torch.no_grad():
        gated.gates.logits[::3] = -3.0
    return gated


def test_a_pruned_block_is_merged_as_the_base_model_is(gated) -> None:
    small, x = swan.prune(gated), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for block in small.blocks:
        assert block.in_chs == block.convs[0].in_channels
        assert block.out_chs == block.convs[0].out_channels
        assert block.num_branches == 4
    for block in small.blocks[2:4]:
        assert block.groups == block.convs[0].groups < 8
    (wanted,) = outputs(small, x)
    for block in small.blocks:
        block.double().merge_()
    (found,) = outputs(small.double(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_they_come_back_from_a_file(gated, tmp_path) -> None:
    small = swan.prune(gated)
    swan.save(small, tmp_path / "x.swan")
    loaded = swan.load(tmp_path / "x.swan", Net().double())
    for one, two in zip(small.blocks, loaded.blocks, strict=True):
        assert (one.in_chs, one.out_chs, one.groups) == (two.in_chs, two.out_chs, two.groups)


def test_what_forward_reads_or_layers_differ_in_stays() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dim = self.width = 8
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.b(torch.relu(self.a(x))))
            return self.c(y) * (2 if self.dim > 6 else 1)

    gated = swan.swanify(Scaled(), torch.randn(2, 6))
    with torch.no_grad():
        gated.gates.logits[:3] = -3.0
    small = swan.prune(gated)
    assert (small.dim, small.width) == (8, 8)
