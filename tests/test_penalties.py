"""The regularisers by hand: Eq. 9, 10 and 12; through the objective in test_objective."""

import pytest
import torch

import swan_surgery as swan
from swan_surgery.learning.penalties import Penalties, paper_penalties


P = torch.tensor([0.9, 0.2, 0.7, 0.6], dtype=torch.float64)
MARGINAL = torch.tensor([1.0, 3.0, 2.0, 4.0], dtype=torch.float64)


def test_terms_by_hand() -> None:
    scale = {"l0": 0.5, "flops": 0.25, "target_active": 1.0}
    terms, raw = Penalties(2.0, 4.0, 0.5, 10.0).terms(P, MARGINAL, scale)
    flops = 0.9 + 0.6 + 1.4 + 2.4
    assert float(raw["l0"]) == pytest.approx(2.4)
    assert float(raw["flops"]) == pytest.approx(flops)
    assert float(raw["target"]) == pytest.approx(0.01)  # (0.6 - 0.5)^2
    assert float(terms["l0"]) == pytest.approx(2.0 * 0.5 * 0.6)
    assert float(terms["flops"]) == pytest.approx(4.0 * 0.25 * flops / 10)
    assert float(terms["target"]) == pytest.approx(0.1)


def test_the_target_is_one_sided() -> None:
    terms, _ = Penalties(target_active=0.7).terms(
        P, MARGINAL, dict.fromkeys(("l0", "flops", "target_active"), 1.0)
    )
    assert float(terms["target"]) == 0


def test_act() -> None:
    assert not Penalties().act
    assert not Penalties(target_weight=5.0).act
    assert Penalties(l0=0.1).act
    assert Penalties(flops=0.1).act
    assert paper_penalties(0.5).act


@pytest.mark.parametrize("options", [{"l0": -1.0}, {"flops": float("nan")}, {"target_active": 0.0}])
def test_bad_input(options) -> None:
    with pytest.raises(swan.InputError):
        Penalties(**options)
