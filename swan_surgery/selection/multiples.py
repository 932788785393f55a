"""Widths in multiples of a number of channels: which number, and what it leaves unused."""

import warnings
from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor

from swan_surgery.costs.latency_table import LatencyTable
from swan_surgery.errors import BudgetError, InputError, SwanWarning
from swan_surgery.selection.limits import Limit


# A budget used to less than this share is not what was asked for.
_USED = 0.9


# Tried in turn where nobody has measured: kernels run most widths as if they were the next multiple of these.
USUAL = (8, 4, 2, 1)


def multiples_of(round_to: object, table: object) -> tuple[int, ...]:
    """The multiples that `round_to` stands for, to be tried in this order (`coarsest`).

    Warns where the table was too noisy to choose by.

    Raises:
        InputError: no multiple, or no table.
    """
    if round_to == "auto":
        if not isinstance(table, (LatencyTable, type(None))):
            raise InputError(
                f"latency_table is what swan.measure_latency_table(gated) returned; got {type(table).__name__}"
            )
        if table is None:
            return USUAL
        if table.is_noisy:
            warnings.warn(
                f"the machine is too noisy to choose a multiple by: quartiles lie up to {table.noise:.0%} of "
                f"the median apart, so round_to={table.best_multiple} is a guess; measure again with nothing "
                f"else running, or with more repeats",
                SwanWarning,
                stacklevel=3,
            )
        return (table.best_multiple,)
    if not isinstance(round_to, int) or round_to < 1:
        raise InputError(
            f'round_to must be a whole number of channels >= 1, or "auto"; got {round_to!r}'
        )
    return (round_to,)


def coarsest(
    multiples: Sequence[int], mask_of: Callable[[int], Tensor], limits: Sequence[Limit]
) -> tuple[Tensor, int]:
    """The first multiple at which a budget is used, and its mask; else the one that uses most of it.

    Raises:
        BudgetError: the budget cannot be reached with any.
    """
    found: list[tuple[float, Tensor, int]] = []
    for multiple in multiples:
        try:
            mask = mask_of(multiple)
        except BudgetError:
            if multiple == multiples[-1] and not found:
                raise
            continue
        used = _use(mask, limits)
        if used >= _USED:
            return mask, multiple
        found.append((used, mask, multiple))
    _, mask, multiple = max(found, key=lambda entry: entry[0])
    return mask, multiple


def _use(mask: Tensor, limits: Sequence[Limit]) -> float:
    """How much of the budget that is nearest to full is used; all of it where there is none."""
    return 1.0 if mask.all() else max((own.used(mask) / own.most for own in limits), default=1.0)


def for_budget(
    table: LatencyTable | None, latency_ms: float | None, round_to: int | Literal["auto"]
) -> LatencyTable | None:
    """The table where it is a budget's; with `round_to="auto"` it may be there for that alone."""
    return None if round_to == "auto" and latency_ms is None else table


def name_undershoot(mask: Tensor, limits: Sequence[Limit], widths: str) -> None:
    """Warn where coarse widths leave much less than the budgets allow."""
    if _use(mask, limits) >= _USED:
        return
    limit = max(limits, key=lambda limit: limit.used(mask) / limit.most)
    own = limit.used(mask)
    total = limit.table.total
    warnings.warn(
        f"{widths} leave {own / total:.1%} of the {limit.table.unit}, where {limit.share:.1%} were asked "
        f"for: the next step of any layer is too much; take a smaller round_to, or ask for less",
        SwanWarning,
        stacklevel=4,
    )


__all__ = ["USUAL", "coarsest", "for_budget", "multiples_of", "name_undershoot"]
