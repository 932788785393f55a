"""The delayed cosine ramp of Eq. 14."""

from itertools import pairwise
from math import cos, pi

import pytest

import swan_surgery as swan
from swan_surgery.learning.ramps import ramps_of


class TestCosineRamp:
    @pytest.mark.parametrize(
        ("delay", "length", "epoch", "wanted"),
        [
            (2, 4, 0, 0.0),
            (2, 4, 2, 0.0),
            (2, 4, 3, 0.5 * (1 - cos(pi / 4))),
            (2, 4, 3.5, 0.5 * (1 - cos(pi * 1.5 / 4))),
            (2, 4, 4, 0.5),
            (2, 4, 6, 1.0),
            (2, 4, 1000, 1.0),
            (0, 0, 0, 0.0),  # t <= d: still zero (Eq. 14)
            (0, 0, 1e-9, 1.0),
            (3, 0, 3, 0.0),
            (3, 0, 3.0001, 1.0),
            (0, 10, 0, 0.0),
        ],
    )
    def test_eq_14(self, delay, length, epoch, wanted) -> None:
        assert swan.CosineRamp(delay, length)(epoch) == pytest.approx(wanted, abs=1e-15)

    def test_it_is_continuous_and_never_falls(self) -> None:
        ramp = swan.CosineRamp(1.5, 3)
        values = [ramp(step / 1000) for step in range(6000)]
        steps = [later - earlier for earlier, later in pairwise(values)]
        assert min(steps) >= 0
        assert max(steps) <= pi / 2 / 3 / 1000 * 1.001  # the steepest slope of the cosine


class TestRampsOf:
    def test_without_a_ramp_in_full_from_the_first_step(self) -> None:
        assert ramps_of(("a", "b"), None)["b"](0) == 1.0
        assert ramps_of(("a", "b"), {"a": swan.CosineRamp(1, 2)})["b"](0) == 1.0

    def test_one_for_all_or_one_each(self) -> None:
        ramp = swan.CosineRamp(1, 2)
        assert ramps_of(("a", "b"), ramp) == {"a": ramp, "b": ramp}
        assert ramps_of(("a", "b"), {"a": ramp})["a"](2) == pytest.approx(0.5)

    def test_an_unknown_term(self) -> None:
        with pytest.raises(swan.InputError, match="ramp has no term 'c'; terms are a, b"):
            ramps_of(("a", "b"), {"c": swan.CosineRamp()})
