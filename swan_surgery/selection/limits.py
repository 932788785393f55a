"""What a model may cost: limits in MACs, parameters and milliseconds."""

from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

from torch import Tensor

from swan_surgery.costs.latency_table import LatencyTable, latency_cost
from swan_surgery.costs.macs import cost_table
from swan_surgery.costs.params import param_table
from swan_surgery.costs.table import CostTable
from swan_surgery.errors import BudgetError, InputError
from swan_surgery.gates import GatedModel
from swan_surgery.models.provenance import provenance_of


Of = Literal["given", "original"]
# Below this no number of MACs or parameters is meant: 50 is somebody's 50 %.
FEWEST = 1000


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

    @property
    def ceiling(self) -> float:
        """The most, up to the rounding of a share of a total."""
        return self.most * (1 + 1e-12)

    def used(self, mask: Tensor) -> float:
        """What an open mask costs, in the table's unit."""
        return float(self.table.at(mask.double()))

    def allows(self, mask: Tensor) -> bool:
        """Whether an open mask costs no more than the ceiling."""
        return self.used(mask) <= self.ceiling


def limits_of(
    gated: GatedModel,
    *,
    macs: float | None = None,
    params: float | None = None,
    latency_ms: float | None = None,
    latency_table: LatencyTable | None = None,
    of: Of = "given",
) -> tuple[Limit, ...]:
    """The limits that MACs, parameters and milliseconds stand for.

    Args:
        gated: the gated model.
        macs: share of the MACs, in (0, 1], or a number of MACs at the example inputs.
        params: share of the parameters, or a number of them.
        latency_ms: milliseconds, by the table.
        latency_table: of this model.
        of: whose MACs and parameters the shares are of: of the model that was gated, or of the one that
            it was cut from in the first place.

    Raises:
        InputError: a share outside (0, 1]; `latency_ms` not positive, or without its table; MACs of
            the original model that no step of its provenance tells.
    """
    if of not in get_args(Of):
        raise InputError(f"of must be one of {', '.join(get_args(Of))}; got {of!r}")
    for name, unit, given in (("macs", "MACs", macs), ("params", "parameters", params)):
        if given is None:
            continue
        if not _is_budget(given):
            raise InputError(
                f"{name} is a share of the base model's {unit}, in (0, 1], or a number of them from "
                f"{FEWEST:,} on; got {given!r}"
            )
    limits = []
    if macs is not None:
        table = cost_table(gated)
        original = table.total if of == "given" else _original_macs(gated, table.total)
        limits.append(Limit("macs", table, _share(macs, original, table.total)))
    if params is not None:
        table = param_table(gated)
        original = table.total if of == "given" else _original_params(gated)
        limits.append(Limit("params", table, _share(params, original, table.total)))
    if latency_ms is not None or latency_table is not None:
        limits.append(_latency_limit(gated, latency_ms, latency_table))
    return tuple(limits)


def _is_budget(given: object) -> bool:
    if not isinstance(given, (int, float)) or isinstance(given, bool):
        return False
    return 0 < given <= 1 or FEWEST <= given < float("inf")


def _share(given: float, original: float, total: float) -> float:
    """A share of the original, or a number, as a share of what the model costs now."""
    most = given if given > 1 else given * original
    return min(1.0, most / total) if total else 1.0


def _original_macs(gated: GatedModel, total: float) -> float:
    """By what each cut since left of it, so that other example inputs may be in use by now.

    Steps of other kinds (other activations) that nobody counted belong to the model that was cut.
    """
    provenance = provenance_of(gated.model)
    factor = 1.0
    for step in () if provenance is None else provenance.steps:
        if step.macs is None and step.kind != "cut":
            continue
        if step.macs is None or not step.macs.after:
            raise InputError(
                f'of="original" needs the MACs of the model before it was cut, which the step {step.kind!r} '
                f"could not count; give macs as a share of the model as it is"
            )
        factor *= step.macs.before / step.macs.after
    return factor * total


def _original_params(gated: GatedModel) -> int:
    """Parameters keep their names as they shrink; a tied one counts once."""
    provenance = provenance_of(gated.model)
    shapes = {} if provenance is None else provenance.base.shapes
    return sum(
        prod(shapes.get(name, parameter.shape))
        for name, parameter in gated.model.named_parameters()
    )


def _latency_limit(
    gated: GatedModel, latency_ms: float | None, latency_table: LatencyTable | None
) -> Limit:
    if latency_ms is None or not 0 < latency_ms < float("inf"):
        raise InputError(f"latency_ms is a number of milliseconds above 0; got {latency_ms}")
    if latency_table is None:
        raise InputError(
            f"latency_ms={latency_ms:g} needs measured layers: pass "
            f"latency_table=swan.measure_latency_table(gated)"
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
