"""Gates of single units that look at the input: the laws over random networks, and what each part does."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.adaptive.unit_gates import UnitGates
from tests.adaptive_laws import check_free_laws, gate_, randomise_statistics_
from tests.closing import image, prepared
from tests.conftest import PROFILE
from tests.random_layers import BLOCKS
from tests.strategies import Case, PartSpec, build, option_specs, simple_network
from tests.test_adaptive import SmallNet, loader, small_net


def free_net() -> swan.AdaptiveModel:
    adapted = swan.adapt(small_net(), image(2, 3, 8, 8), structure="free")
    randomise_statistics_(adapted, torch.Generator().manual_seed(0))
    return adapted.eval()


@pytest.mark.law
@pytest.mark.slow
@settings(max_examples=300 if PROFILE == "thorough" else 8)
@given(
    st.sampled_from(sorted(BLOCKS)).flatmap(
        lambda name: st.sampled_from(option_specs(BLOCKS, name))
    ),
    st.integers(0, 2**16),
)
def test_laws_over_random_networks(part: PartSpec, seed: int) -> None:
    case: Case = build(simple_network(part, seed=seed))
    check_free_laws(case.model, case.inputs, seed)


def test_laws_of_a_small_network() -> None:
    adapted = check_free_laws(small_net(), image(2, 3, 8, 8), 3)
    assert adapted is not None
    assert [len(group.units) for group in adapted.structure.groups] == [8, 8, 6]


def test_laws_of_a_model_that_is_one_block() -> None:
    model = nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 4))
    assert check_free_laws(prepared(model), image(2, 5), 0) is not None


def test_laws_with_flatten_stride_and_squeeze_excite() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grow, self.deep = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 3, 2, 2, 2, groups=6)
            self.squeeze, self.excite = nn.Conv2d(6, 3, 1), nn.Conv2d(3, 6, 1)
            self.last = nn.Linear(6 * 9, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.deep(F.relu(self.grow(x)))
            h = h * self.excite(F.relu(self.squeeze(h.mean((2, 3), keepdim=True)))).sigmoid()
            return self.last(h.flatten(1))

    assert check_free_laws(prepared(nn.Sequential(Odd(), nn.ReLU())), image(2, 4, 6, 6), 1)
