"""When to cut, and to how much, where one cut would take too much at once."""

from dataclasses import dataclass
from math import log2
from typing import Any

from swan_surgery.environment.kinds_of_numbers import is_number, is_whole
from swan_surgery.errors import InputError


# At a tenth of the MACs three cuts keep more than one (benchmarks/TABLES.md, "One cut, several, and gates"); where
# exactly that ends was not measured: a prototype found no gain at a quarter.
ONE_CUT = 0.2


@dataclass(frozen=True, slots=True)
class Stage:
    """One of several cuts: when, and to how much.

    Attributes:
        step: of the training; the cut is made before it.
        share: of the original model's cost to keep, in (0, 1].
    """

    step: int
    share: float


def stages(
    share: float, *, steps: int, number: int | None = None, span: float = 0.2
) -> tuple[Stage, ...]:
    """A schedule of cuts: each takes the same factor, evenly spread over the start of the training.

    Scores that were right for the whole network are wrong for a tenth of it. So cut by about a factor of
    two, train a little, score and compensate anew, cut again. Shares are of the original model's cost:
    pass them on with `of="original"`.

    Args:
        share: of the original model's cost to keep in the end, in (0, 1].
        steps: of the whole training, from the first cut on.
        number: of cuts; by default one down to a fifth of the cost, below about one per halving.
        span: share of the steps from the first cut to the last.

    Returns:
        Stages in order; the first at step 0, the last with `share`. Several cuts of which steps leave no
        training in between become one.

    Raises:
        InputError: a share outside (0, 1], a negative number of steps, no cut at all.

    Example:
        >>> for stage in swan.stages(0.1, steps=1000):
        ...     print(stage.step, round(stage.share, 3))
        0 0.464
        100 0.215
        200 0.1
    """
    given: tuple[tuple[str, Any], ...] = (("share", share), ("span", span))
    for name, value in given:
        if not is_number(value) or not 0 < value <= 1:
            raise InputError(f"{name} is in (0, 1]; got {value!r}")
    cuts: Any = 1 if number is None else number
    whole = is_whole(steps) and is_whole(cuts)
    if not whole or steps < 0 or cuts < 1:
        raise InputError(
            f"there must be at least one cut and no negative steps, in whole numbers; got {number=}, {steps=}"
        )
    if number is None:
        number = 1 if share >= ONE_CUT else round(-log2(share))
    gaps = max(number - 1, 1)
    own = {
        round(index / gaps * span * steps): share ** ((index + 1) / number)
        for index in range(number)
    }
    return tuple(Stage(step, left) for step, left in own.items())


__all__ = ["ONE_CUT", "Stage", "stages"]
