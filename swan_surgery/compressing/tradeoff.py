"""What a model is worth at several sizes: one scoring, a cut for each budget, and its quality."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from swan_surgery.compressing.cutter import Loss
from swan_surgery.compressing.own_outputs import Sensitivity, unlikeness
from swan_surgery.compressing.telling import told
from swan_surgery.costs.macs import count_macs
from swan_surgery.costs.params import count_params
from swan_surgery.cutting.pruning import prune_by_score
from swan_surgery.environment.notebooks import html_table
from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import BudgetError, InputError
from swan_surgery.gates import GatedModel
from swan_surgery.gates.checks import check_gated
from swan_surgery.models.batches import batches_in
from swan_surgery.models.modes import evaluating
from swan_surgery.reporting import charts, rendering
from swan_surgery.selection.importance import importance


_BUDGETS = (0.9, 0.75, 0.5, 0.25, 0.1)
_HEADER = ("budget", "MACs", "left", "parameters", "left")
# Of the batches, where nobody else says what a model is worth: the part that it is looked at with alone.
_JUDGED = 4
_LIKENESS = "outputs explained"


@dataclass(frozen=True, slots=True)
class TradeoffPoint:
    """One size of the model.

    Attributes:
        budget: what was asked for, in (0, 1] or a number; 1 of the given model.
        macs: multiply-adds at the example inputs.
        params: parameters.
        quality: what `evaluate` gave, or how much of the given model's outputs is explained.
    """

    budget: float
    macs: int
    params: int
    quality: float


@dataclass(frozen=True, slots=True)
class TradeoffCurve:
    """Quality over budget, as `tradeoff_curve` measured it.

    Attributes:
        cost: what the budgets are of, "MACs" or "parameters".
        quality: what the qualities are, in words.
        dense: the given model.
        points: one per budget that can be reached, the largest first.
        refused: the others, with the reason.
    """

    cost: Literal["MACs", "parameters"]
    quality: str
    dense: TradeoffPoint
    points: tuple[TradeoffPoint, ...]
    refused: tuple[tuple[float, str], ...] = ()

    def __str__(self) -> str:
        """A table, the given model first."""
        table = rendering.text_table(self._title(), (*_HEADER, self.quality), self._rows())
        return "\n".join([table, *self._notes()])

    def _repr_html_(self) -> str:
        table = html_table(
            self._title(), (*_HEADER, self.quality), self._rows(), notes=self._notes()
        )
        return f"{table}{self.to_svg()}"

    def to_svg(self) -> str:
        """A picture: quality over the share of the MACs or parameters that is left."""
        whole = self._size(self.dense)
        runs = [(_percent(own.budget), self._size(own) / whole, own.quality) for own in self.points]
        drawn = charts.scatter(
            [("given model", 1.0, self.dense.quality), *runs],
            quality=self.quality,
            cost=f"share of the {self.cost}",
        )
        # As a file of its own it says what it is; a page knows.
        return drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(asdict(self))

    def _title(self) -> str:
        return f"{self.quality} over {self.cost}, units scored once"

    def _size(self, point: TradeoffPoint) -> int:
        return point.macs if self.cost == "MACs" else point.params

    def _rows(self) -> rendering.Rows:
        return [
            (
                "given model" if own is self.dense else _percent(own.budget),
                rendering.scaled(own.macs).strip(),
                rendering.share(self.dense.macs, own.macs),
                rendering.scaled(own.params).strip(),
                rendering.share(self.dense.params, own.params),
                f"{own.quality:.4g}",
            )
            for own in (self.dense, *self.points)
        ]

    def _notes(self) -> list[str]:
        return [f"{_percent(budget)}: {reason}" for budget, reason in self.refused]


def tradeoff_curve(
    gated: GatedModel,
    batches: Iterable[Any],
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
    macs: Sequence[float] | None = None,
    params: Sequence[float] | None = None,
    loss: Loss | Literal["self"] = "self",
    scores: Tensor | None = None,
    compensate: bool = True,
    round_to: int | Literal["auto"] = "auto",
    uniform: bool = False,
    num_batches: int = 16,
    quality: str = "quality",
    progress: bool = False,
) -> TradeoffCurve:
    """Quality over budget before anything is trained: which budget to ask for.

    Units are scored once; for each budget the model is cut by these scores, its weights are solved for
    (`swan.compensate`), and its quality is taken. What training brings back comes on top.

    Args:
        gated: the gated model; it stays as it is, and the state of its gates plays no part in the cuts.
        batches: that units are scored and weights are solved for with, as in `swan.compress`.
        evaluate: gives a model's quality, the higher the better; it gets each model in eval mode. By default how
            much of the given model's outputs a smaller one explains, on the last quarter of the batches, which then
            serves nothing else: 1 is all, 0 as much as their mean.
        macs: budgets, shares in (0, 1] or numbers of MACs; by default 90, 75, 50, 25 and 10 %.
        params: the same in parameters, in place of `macs`.
        loss: "self", or `loss(model, batch)`, by which units are scored.
        scores: one per unit, in place of that.
        compensate: whether weights are solved for after each cut.
        round_to: widths become multiples of this; "auto" of 8, 4, 2 or 1, as in `swan.compress` where no runtime is named.
        uniform: the same width in all layers of one role, as in `swan.prune`.
        num_batches: how many batches to use at most.
        quality: what `evaluate` gives, with its unit, as in "accuracy in %".
        progress: show on stderr what is going on and how long it will take.

    Raises:
        ModelError: `gated` is not a gated model, or lies on the meta device.
        InputError: no batches, no budgets or both kinds, a share out of range, scores of another shape.
        BudgetError: none of the budgets can be reached.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> gated = swan.swanify(net, torch.zeros(1, 8))
        >>> curve = swan.tradeoff_curve(gated, list(torch.randn(4, 64, 8)), macs=(0.75, 0.5))
        >>> [point.macs for point in (curve.dense, *curve.points)]
        [384, 288, 192]
        >>> curve.dense.quality
        1.0
    """
    check_gated(gated)
    budgets = _budgets(macs, params)
    used = list(batches_in(batches, num_batches))
    if not used:
        raise InputError("batches yielded no batch, so there is nothing to score units by")
    dense = gated.base_model().eval()
    if evaluate is None:
        used, evaluate = _likeness(dense, used)
        quality = _LIKENESS
    cost = "macs" if params is None else "params"
    how = {"round_to": round_to, "uniform": uniform, "compensate": used if compensate else None}
    points, refused = [], {}
    with told(progress) as tell:
        tell("scoring units", 0.0)
        if scores is None:
            by = Sensitivity() if loss == "self" else loss
            scores = importance(gated, batches=used, loss=by)
        for index, budget in enumerate(budgets):
            tell("cutting", index / len(budgets))
            try:
                small = prune_by_score(gated, scores, **{cost: budget}, **how)  # type: ignore[arg-type]  # names as data
            except BudgetError as err:
                refused[budget] = err
            else:
                points.append(_point(gated, small.eval(), budget, evaluate))
    if not points:
        raise refused[budgets[0]]
    return TradeoffCurve(
        "MACs" if params is None else "parameters",
        quality,
        _point(gated, dense, 1.0, evaluate),
        tuple(points),
        tuple((budget, str(err)) for budget, err in refused.items()),
    )


def _budgets(macs: Sequence[float] | None, params: Sequence[float] | None) -> Sequence[float]:
    if macs is not None and params is not None:
        raise InputError("the budgets of a curve are MACs or parameters: give macs or params")
    given: Any = macs if params is None else params
    if given is None:
        return _BUDGETS
    if not isinstance(given, Sequence) or not given:
        raise InputError(
            f"a curve needs several budgets, as in macs=(0.75, 0.5, 0.25); got {given!r}"
        )
    return sorted(given, reverse=True)


def _point(
    gated: GatedModel, model: nn.Module, budget: float, evaluate: Callable[[nn.Module], float]
) -> TradeoffPoint:
    inputs = gated.own_inputs()
    with streams_kept():
        quality = float(evaluate(model))
    return TradeoffPoint(budget, count_macs(model, inputs), count_params(model), quality)


def _likeness(
    dense: nn.Module, batches: list[Any]
) -> tuple[list[Any], Callable[[nn.Module], float]]:
    """The batches to work with, and what measures on the others how much of the outputs is explained."""
    count = max(len(batches) // _JUDGED, 1)
    judged = batches[-count:]

    def evaluate(model: nn.Module) -> float:
        with evaluating(model), torch.no_grad():
            parts = [float(unlikeness(model, dense, batch)) for batch in judged]
        return 1 - sum(parts) / len(parts)

    return batches[:-count] or batches, evaluate


def _percent(budget: float) -> str:
    return f"{budget:.3g}" if budget > 1 else f"{100 * budget:.3g} %"


__all__ = ["TradeoffCurve", "TradeoffPoint", "tradeoff_curve"]
