"""What a model may cost: limits in MACs, parameters and milliseconds."""

from dataclasses import dataclass

from torch import Tensor

from swan_surgery.costs.latency_table import LatencyTable, latency_cost
from swan_surgery.costs.macs import cost_table
from swan_surgery.costs.params import param_table
from swan_surgery.costs.table import CostTable
from swan_surgery.errors import BudgetError, InputError
from swan_surgery.gates import GatedModel


@dataclass(frozen=True, slots=True, eq=False)
class Limit:
    """At most `share` of what `table` counts in all; `name` is the argument it came by."""

    name: str
    table: CostTable
    share: float

    @property
    def most(self) -> float:
        """The ceiling, in the table's unit."""
        return self.share * self.table.total

    def used(self, mask: Tensor) -> float:
        """What an open mask costs, in the table's unit."""
        return float(self.table.at(mask.double()))

    def allows(self, mask: Tensor) -> bool:
        """Whether an open mask costs at most `most`, up to the rounding of a share of a total."""
        return self.used(mask) <= self.most * (1 + 1e-12)


def limits_of(
    gated: GatedModel,
    *,
    macs: float | None = None,
    params: float | None = None,
    latency_ms: float | None = None,
    latency_table: LatencyTable | None = None,
) -> tuple[Limit, ...]:
    """The limits that shares of the base model's MACs and parameters, and milliseconds, stand for.

    Raises:
        InputError: a share outside (0, 1]; `latency_ms` not positive, or without its table.
    """
    for name, unit, share in (("macs", "MACs", macs), ("params", "parameters", params)):
        if share is not None and not 0 < share <= 1:
            raise InputError(
                f"{name} is a share of the base model's {unit}, in (0, 1]; got {share}"
            )
    limits = []
    if macs is not None:
        limits.append(Limit("macs", cost_table(gated), macs))
    if params is not None:
        limits.append(Limit("params", param_table(gated), params))
    if latency_ms is not None or latency_table is not None:
        limits.append(_latency_limit(gated, latency_ms, latency_table))
    return tuple(limits)


def _latency_limit(
    gated: GatedModel, latency_ms: float | None, latency_table: LatencyTable | None
) -> Limit:
    if latency_ms is None or not 0 < latency_ms < float("inf"):
        raise InputError(f"latency_ms is a number of milliseconds above 0; got {latency_ms}")
    if latency_table is None:
        raise InputError(
            f"latency_ms={latency_ms:g} needs measured layers: pass "
            f"latency_table=swan.measure_latencies(gated)"
        )
    table = latency_cost(gated, latency_table)
    return Limit("latency_ms", table, min(1.0, latency_ms / table.total))


def refuse_unreachable(limit: Limit, least: Tensor) -> None:
    """Raise if even `least`, an open mask, costs more than the limit.

    Raises:
        BudgetError: says what was asked for and what can be reached.
    """
    if limit.allows(least):
        return
    used, total, unit = limit.used(least), limit.table.total, limit.table.unit
    if unit == "ms":
        raise BudgetError(
            f"{limit.name}={limit.most:.4g} cannot be reached: with every layer at its minimum "
            f"width the model still takes {used:.4g} ms of {total:.4g} by the latency table; "
            f"reachable: {used:.4g} to {total:.4g}",
            unit=unit,
            least=used,
            most=total,
        )
    raise BudgetError(
        f"{limit.name}={limit.share:g} cannot be reached: it asks for at most {limit.most:,.0f} "
        f"{unit}, but with every layer at its minimum width the model still costs "
        f"{used:,.0f} ({used / total:.4f} of {total:,}); reachable: {used / total:.4f} to 1",
        unit=unit,
        least=int(used),
        most=int(total),
    )


__all__ = ["Limit", "limits_of", "refuse_unreachable"]
