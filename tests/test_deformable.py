"""Deformable convolution: channels go as in a plain one, offsets and masks stay."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

import swan_surgery as swan
from swan_surgery.channels import PINNED
from tests.closing import assert_closed_equals_cut, image, prepared
from tests.closing_costs import assert_cost_is_exact


class Deformed(nn.Module):
    def __init__(self, width: int, out: int, groups: int, offset_groups: int, *, masked: bool):
        super().__init__()
        self.into = nn.Conv2d(3, width, 3, padding=1)
        self.offset = nn.Conv2d(width, 18 * offset_groups, 3, padding=1)
        self.mask = nn.Conv2d(width, 9 * offset_groups, 1) if masked else None
        self.deform = DeformConv2d(width, out, 3, padding=1, groups=groups, bias=masked)
        self.last = nn.Conv2d(out, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.into(x))
        mask = None if self.mask is None else torch.sigmoid(self.mask(x))
        return self.last(F.relu(self.deform(x, self.offset(x), mask)))


@pytest.mark.parametrize(
    ("width", "out", "groups", "offset_groups", "masked", "units"),
    [
        (6, 5, 1, 1, False, 6 + 5),
        (6, 5, 1, 2, True, 3 + 5),
        (8, 6, 2, 1, True, 4 + 3),
        (6, 6, 6, 3, False, 2),
    ],
)
def test_channels_of_a_deformable_convolution(
    width, out, groups, offset_groups, masked, units
) -> None:
    model = prepared(Deformed(width, out, groups, offset_groups, masked=masked))
    gated = assert_closed_equals_cut(model, image(2, 3, 6, 6))
    assert gated is not None
    assert gated.channels.num_units == units
    assert set(gated.channels.layer("offset").out_units) == {PINNED}
    assert_cost_is_exact(gated, torch_counts=False)  # torch's counter does not know it
    small = swan.prune(gated).deform
    assert small.weight.shape[0] == small.out_channels
    assert small.weight.shape[1] * small.groups == small.in_channels
    assert small.groups == (small.in_channels if groups == width else groups)


def test_it_costs_what_a_plain_convolution_does() -> None:
    model, x = Deformed(4, 5, 1, 1, masked=False), torch.zeros(2, 3, 6, 6)
    plain = 3 * 4 * 9 + 4 * 18 * 9 + 4 * 5 * 9 + 5 * 2
    assert swan.count_macs(model, x) == 2 * 36 * plain
