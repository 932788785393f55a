"""One cut of `compress`: score, cut to a part of the way, solve for what stays."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import gcd
from typing import Any, Literal

from torch import Tensor, nn

from swan_surgery.compressing.own_outputs import Sensitivity
from swan_surgery.compressing.telling import Tell
from swan_surgery.costs.latency_table import LatencyTable
from swan_surgery.costs.macs import count_macs
from swan_surgery.costs.params import count_params
from swan_surgery.cutting.compensation import Compensation, compensate
from swan_surgery.cutting.kept import kept
from swan_surgery.cutting.pruning import prune_by_score
from swan_surgery.errors import InputError
from swan_surgery.gates import GatedModel
from swan_surgery.gates.conversion import swanify
from swan_surgery.gates.min_width import MinWidth, floors_for, floors_of
from swan_surgery.selection.importance import Score, importance
from swan_surgery.selection.limits import limits_of, refuse_unreachable
from swan_surgery.selection.multiples import USUAL
from swan_surgery.timing.clock import LayerRuntime
from swan_surgery.timing.layers import measure_latency_table


Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True, slots=True)
class Budget:
    """What the smaller model may cost: shares of the given model's (or numbers of them), and milliseconds."""

    macs: float | None
    params: float | None
    latency_ms: float | None

    @property
    def least(self) -> float:
        """The smallest share; one where there is none."""
        return min((own for own in (self.macs, self.params) if own is not None), default=1.0)


@dataclass(frozen=True, slots=True)
class Choice:
    """How units are chosen."""

    loss: Loss | Literal["self"]
    score: Score
    ignore: Iterable[str]
    round_to: int | Literal["auto"]
    min_width: MinWidth = 1
    uniform: bool = False
    runtime: LayerRuntime | None = None


@dataclass(slots=True)
class Cutter:
    """Cuts a model, and what it made of it, again and again.

    Attributes:
        compensated_with: how many of the batches weights are solved for with; all by default.
        done: what was done so far, in words.
        compensations: of every cut.

    Raises:
        InputError: no budget.
        BudgetError: the budget cannot be reached.
    """

    model: nn.Module
    example: Any
    batches: Sequence[Any]
    budget: Budget
    choice: Choice
    tell: Tell
    compensated_with: int | None = None
    done: list[str] = field(default_factory=list)
    compensations: list[Compensation] = field(default_factory=list)
    _gated: GatedModel = field(init=False)
    _floors: dict[str, int] = field(init=False)
    _table: LatencyTable | None = field(init=False, default=None)
    _whole: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        """Map the model, and refuse a budget that cannot be reached before anything is done."""
        self.tell("mapping the model", 0.0)
        self._gated = self.gate(self.model)
        self._whole = self._size(self.model)
        limits = limits_of(self._gated, **self._limits(self._gated, 1.0))
        if not limits:
            raise InputError(
                "say how small the model shall get: macs=0.5, params=0.5 or latency_ms"
            )
        least = self._gated.gates.least_mask(importance(self._gated, "magnitude"))
        for limit in limits:
            refuse_unreachable(limit, least)
        shares = {limit.name: limit.share for limit in limits}
        self.budget = replace(self.budget, macs=shares.get("macs"), params=shares.get("params"))

    def cut(self, model: nn.Module, part: float) -> nn.Module:
        """Cut a model to its part of the way, in (0, 1], from the whole model to the budget.

        `model` is the given one or what became of it; it is not changed.
        """
        gated = self._gated if model is self.model else self.gate(model)
        self.tell("scoring units", 0.0)
        scores = importance(
            gated,
            self.choice.score,
            batches=self.batches,
            loss=Sensitivity() if self.choice.loss == "self" else self.choice.loss,
        )
        limits = self._limits(gated, part)
        if self.choice.round_to == "auto" and self.choice.runtime and self._table is None:
            limits["latency_table"] = self._measured(gated)
        self.tell("cutting", 0.0)
        widths: dict[str, Any] = {
            "round_to": self.choice.round_to,
            "uniform": self.choice.uniform,
        }
        small = prune_by_score(gated, scores, **widths, **limits)
        macs, params = self._size(small)
        self.done.append(
            f"cut to {macs / max(self._whole[0], 1):.3f} of the MACs and "
            f"{params / max(self._whole[1], 1):.3f} of the parameters by {self.choice.score} scores"
            f"{self._multiple(small, limits.get('latency_table'))}"
        )
        self.tell("compensating", 0.0)
        mended = compensate(small, model, self.batches, num_batches=self.compensated_with)
        self.compensations.append(mended)
        self.done.append(str(mended).partition("\n")[0])
        return small

    def gate(self, model: nn.Module) -> GatedModel:
        """Gates in the given model or in what became of it; floors are of the given one's widths."""
        gated = swanify(model, self.example, ignore=self.choice.ignore)
        gates = gated.gates
        if model is self.model:
            gates.min_width = self.choice.min_width
            self._floors = floors_of(gates.names, gates.least)
        else:
            gates.min_width = floors_for(gates.names, self._floors)
        return gated

    def _size(self, model: nn.Module) -> tuple[int, int]:
        return count_macs(model, self.example), count_params(model)

    def _multiple(self, small: nn.Module, table: LatencyTable | None) -> str:
        """What all widths that were cut are multiples of, as far as that was asked for."""
        asked = self.choice.round_to
        if asked == "auto":
            asked = USUAL[0] if table is None else table.best_multiple
        step = gcd(asked, *(len(own) for axes in kept(small).values() for own in axes.values()))
        return f", in multiples of {step} channels" if step > 1 else ""

    def _measured(self, gated: GatedModel) -> LatencyTable:
        return measure_latency_table(gated, runtime=self.choice.runtime or "eager")

    def _limits(self, gated: GatedModel, part: float) -> dict[str, Any]:
        """A part of the way to the budget, as arguments for `limits_of`; shares of the gated model."""
        macs, params = self._size(gated.model)
        shares = {
            "macs": share_of_now(self.budget.macs, part, self._whole[0], macs),
            "params": share_of_now(self.budget.params, part, self._whole[1], params),
        }
        if self.budget.latency_ms is None:
            return shares
        if self._table is None:
            self.tell("measuring layers", 0.0)
            self._table = self._measured(gated)
        return {**shares, "latency_ms": self.budget.latency_ms, "latency_table": self._table}


def share_of_now(wanted: float | None, part: float, whole: int, now: int) -> float | None:
    """The share of what a model costs now that brings it to `wanted` ** `part` of the whole."""
    if not isinstance(wanted, (int, float)) or not 0 < wanted <= 1 or not now:
        return wanted  # whatever is no share, limits_of takes or refuses
    return float(min(1.0, wanted**part * whole / now))


__all__ = ["Budget", "Choice", "Cutter", "Loss", "share_of_now"]
