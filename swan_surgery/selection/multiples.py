"""Widths in multiples of a number of channels: which number, and what it leaves unused."""

import warnings
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from swan_surgery.costs.latency_table import LatencyTable
from swan_surgery.errors import InputError, SwanWarning
from swan_surgery.selection.limits import Limit


# A budget used to less than this share is not what was asked for.
_USED = 0.9


def multiple_of(round_to: object, table: LatencyTable | None) -> int:
    """The multiple that `round_to` stands for; warns where the table was too noisy to choose by.

    Raises:
        InputError: no multiple, or "auto" without a table.
    """
    if round_to == "auto":
        if not isinstance(table, LatencyTable):
            raise InputError(
                'round_to="auto" takes the multiple that was measured to be the fastest: pass '
                "latency_table=swan.measure_latency_table(gated)"
            )
        if table.is_noisy:
            warnings.warn(
                f"the machine is too noisy to choose a multiple by: quartiles lie up to {table.noise:.0%} of "
                f"the median apart, so round_to={table.best_multiple} is a guess; measure again with nothing "
                f"else running, or with more repeats",
                SwanWarning,
                stacklevel=3,
            )
        return table.best_multiple
    if not isinstance(round_to, int) or round_to < 1:
        raise InputError(
            f'round_to must be a whole number of channels >= 1, or "auto"; got {round_to!r}'
        )
    return round_to


def for_budget(
    table: LatencyTable | None, latency_ms: float | None, round_to: int | Literal["auto"]
) -> LatencyTable | None:
    """The table where it is a budget's; with `round_to="auto"` it may be there for that alone."""
    return None if round_to == "auto" and latency_ms is None else table


def name_undershoot(mask: Tensor, limits: Sequence[Limit], widths: str) -> None:
    """Warn where coarse widths leave much less than the budgets allow."""
    used = [(limit, limit.used(mask)) for limit in limits]
    if not used or bool(mask.all()) or any(own >= _USED * limit.most for limit, own in used):
        return
    limit, own = max(used, key=lambda entry: entry[1] / entry[0].most)
    total = limit.table.total
    warnings.warn(
        f"{widths} leave {own / total:.1%} of the {limit.table.unit}, where {limit.share:.1%} were asked "
        f"for: the next step of any layer is too much; take a smaller round_to, or ask for less",
        SwanWarning,
        stacklevel=4,
    )


__all__ = ["for_budget", "multiple_of", "name_undershoot"]
