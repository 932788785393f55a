"""The gate bank: one logit per unit, which units are open, and the reading that gives gates their values."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from swan_surgery.errors import GateError, InputError
from swan_surgery.gates.index_tables import IndexTables
from swan_surgery.gates.min_width import MinWidth, least_widths
from swan_surgery.gates.readings import (
    HARD,
    SOFT,
    STRAIGHT_THROUGH,
    Held,
    Leaf,
    Measured,
    Reading,
)


Mode = Literal["ste", "soft"]

# sigmoid(3) = 0.953: open, and near enough to 1 that soft gates start close to the base model.
INITIAL_LOGIT = 3.0
# Up to this many open units per layer are found one by one instead of by sorting.
_FEW = 4


_OF_MODE: Mapping[Mode, Reading] = {"ste": STRAIGHT_THROUGH, "soft": SOFT}


class Rule(Protocol):
    """What learns from the gradients on gates, instead of the optimizer."""

    def observe(self, grad: Tensor) -> Tensor | None:
        """Take in dL/dg, shape (num_units,); what is returned is the gradient on the logits."""
        ...


class GateBank(nn.Module):
    """All gates of a model: p = sigmoid(z) (Eq. 3), hard g = [p >= threshold] (Eq. 4).

    Attributes:
        logits: z, shape (num_units,).
        min_width: what every layer keeps open at least, the highest p: a number of units, a share (a
            float below 1), or a mapping from names or glob patterns to either, the first that
            matches, 1 where none does. `least`: what that is, in units of each layer.
        names: of each layer.
    """

    _threshold: Tensor

    def __init__(
        self,
        num_units: int,
        widths: Sequence[Sequence[int]],
        sites: Sequence[Tensor],
        names: Sequence[Sequence[str]] = (),
    ) -> None:
        """Make a bank.

        Args:
            num_units: number of gates.
            widths: per layer the units that make up its width.
            sites: per site the unit at each position, any shape; -1 where there is no gate.
            names: per layer the module names it goes by, for `min_width`.
        """
        super().__init__()
        self.logits = nn.Parameter(torch.full((num_units,), INITIAL_LOGIT))
        self.names = [tuple(own) for own in names] or [()] * len(widths)
        self._sizes_of_rows = [len(units) for units in widths]
        self.min_width = 1
        self.register_buffer("_threshold", torch.tensor(0.5))
        # What gates are read as, by whether the bank trains.
        self._readings: dict[bool, Reading] = {True: STRAIGHT_THROUGH, False: HARD}
        self._attached: tuple[Rule, RemovableHandle] | None = None
        self._shapes = [tuple(units.shape) for units in sites]
        self._sizes = [units.numel() for units in sites]
        flat = [torch.where(units < 0, num_units, units).reshape(-1) for units in sites]
        index = torch.cat(flat) if flat else torch.zeros(0, dtype=torch.int64)
        longest = max((len(units) for units in widths), default=0)
        rows = torch.full((len(widths), longest), num_units)
        for row, units in enumerate(widths):
            rows[row, : len(units)] = torch.tensor(sorted(units))
        self._tables = IndexTables(index, rows)

    @property
    def num_units(self) -> int:
        """Number of gates."""
        return self.logits.numel()

    @property
    def threshold(self) -> float:
        """Tau of Eq. 4, in [0, 1]; infinite after `close_to_minimum`."""
        return float(self._threshold)

    @threshold.setter
    def threshold(self, value: float) -> None:
        if not 0 <= float(value) <= 1:
            raise InputError(f"threshold must be between 0 and 1, got {value}")
        self._threshold.fill_(value)

    def close_to_minimum(self) -> None:
        """Raise the threshold above every p: only the minimum widths stay open."""
        self._threshold.fill_(float("inf"))

    @property
    def min_width(self) -> MinWidth:
        """What every layer keeps open at least."""
        return self._min_width

    @min_width.setter
    def min_width(self, value: MinWidth) -> None:
        self.least = least_widths(value, self.names, self._sizes_of_rows)
        # Tables, so that they lie on the device beforehand: a captured CUDA graph may copy nothing.
        self._wanted = IndexTables(torch.tensor(self.least, dtype=torch.int64)[:, None])
        self._min_width = dict(value) if isinstance(value, Mapping) else value

    @property
    def mode(self) -> Mode:
        """Gates in training: `"ste"` (forward hard, backward as p, Eq. 6) or `"soft"` (p)."""
        return "soft" if _innermost(self._readings[True]) is SOFT else "ste"

    @mode.setter
    def mode(self, value: Mode) -> None:
        if value not in get_args(Mode):
            raise InputError(f"mode must be one of {get_args(Mode)}, got {value!r}")
        reading = _OF_MODE[value]
        self._readings[True] = Measured(reading) if self._attached else reading

    @property
    def reading(self) -> Reading:
        """What gates are read as now: in training by `mode`, in evaluation hard."""
        return self._readings[self.training]

    @contextmanager
    def reading_as(self, reading: Reading, *, training: bool | None = None) -> Iterator[None]:
        """Read gates as something else inside the block.

        Args:
            reading: what to read them as.
            training: in training alone (True), in evaluation alone (False), or in both (None).
        """
        before = dict(self._readings)
        for mode in (True, False) if training is None else (training,):
            self._readings[mode] = reading
        try:
            yield
        finally:
            self._readings = before

    @property
    def rule(self) -> Rule | None:
        """What is attached to the gates and learns from their gradients, if anything is."""
        return None if self._attached is None else self._attached[0]

    def attach(self, rule: Rule) -> None:
        """Hand the gradients on the gates to a rule: dL/dg itself, without the factor p(1-p).

        The bank keeps the rule until another one is attached, or `detach`. Copies of the bank are
        measured by nobody.
        """
        self.detach()
        self._attached = (rule, self.logits.register_hook(rule.observe))
        self._readings[True] = Measured(self._readings[True])

    def detach(self) -> None:
        """Let go of the rule: the gradients on the logits are the optimizer's again."""
        if self._attached is not None:
            self._attached[1].remove()
        self._attached = None
        self._readings[True] = _innermost(self._readings[True])

    def probabilities(self) -> Tensor:
        """P = sigmoid(z), shape (num_units,), differentiable."""
        return torch.sigmoid(self.logits)

    def open_mask(self) -> Tensor:
        """Which units are open, bool of shape (num_units,).

        p >= threshold, and never fewer than `min_width` in any layer: the highest p stay (the
        lowest index among equals). Evaluation, cost and pruning all read this mask.
        """
        reading = self.reading
        if isinstance(reading, Held):
            return reading.mask
        return self.mask_at(self._threshold)

    def mask_at(self, threshold: Tensor) -> Tensor:
        """The open mask that another threshold would give."""
        p = self.probabilities().detach()
        return self.least_mask(p) | (p >= threshold)

    def least_mask(self, scores: Tensor) -> Tensor:
        """The `min_width` highest-scoring units of every layer, the first among equals.

        Args:
            scores: at least 0, shape (num_units,).
        """
        padded = torch.cat([scores, scores.new_full((1,), -1.0)])
        is_open = torch.zeros_like(padded, dtype=torch.bool)
        most = max(self.least, default=0)
        if most == 0:
            return is_open[:-1]
        _, rows = self._tables.on(scores.device)
        (wanted,) = self._wanted.on(scores.device)
        table = padded[rows]
        if most <= _FEW:
            for count in range(1, most + 1):
                best = table.argmax(dim=1, keepdim=True)
                chosen = rows.gather(1, best)
                if min(self.least) < count:
                    # What a layer does not want goes to the place behind the last unit.
                    chosen = chosen.where(wanted >= count, self.num_units)
                is_open = is_open.index_fill(0, chosen.reshape(-1), value=True)
                table = table.scatter(1, best, -2.0)
        else:
            order = table.argsort(dim=1, descending=True, stable=True)[:, :most]
            kept = torch.arange(most, device=order.device) < wanted
            chosen = rows.gather(1, order).where(kept, self.num_units)
            is_open = is_open.index_fill(0, chosen.reshape(-1), value=True)
        return is_open[:-1]

    def check(self) -> None:
        """Refuse logits that mean nothing.

        Raises:
            GateError: a logit is NaN or infinite; says how many and which.
        """
        is_finite = self.logits.detach().isfinite()
        if not bool(is_finite.all()):
            bad = (~is_finite).nonzero().reshape(-1)
            raise GateError(
                f"{bad.numel()} of {self.num_units} gate logits are NaN or infinite (first: unit "
                f"{int(bad[0])}); training diverged: lower gate_lr or restore a checkpoint"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Copies are measured by nobody."""
        readings = {mode: _innermost(reading) for mode, reading in self._readings.items()}
        return vars(self) | {"_attached": None, "_readings": readings}

    def values(self, units: Tensor | None = None, is_open: Tensor | None = None) -> Tensor:
        """The gate values in force.

        Args:
            units: of these units alone, int64 of any one dimension; of all by default.
            is_open: `open_mask()`, where it is known already; as 0 and 1 of the logits' type, it need not be made so again.
        """
        reading = self.reading
        logits = reading.values if isinstance(reading, Leaf) else self.logits
        if is_open is None:
            is_open = self.open_mask()
        if units is not None:
            logits, is_open = logits.index_select(0, units), is_open.index_select(0, units)
        return reading(logits, is_open)

    def forward(self) -> tuple[Tensor, ...]:
        """The values at every site, each broadcastable to the site's activation."""
        values = self.values()
        index, _ = self._tables.on(values.device)
        padded = torch.cat([values, values.new_ones(1)])
        parts = padded.index_select(0, index).split(self._sizes)
        return tuple(part.view(shape) for part, shape in zip(parts, self._shapes, strict=True))

    def soft_evaluation(self) -> AbstractContextManager[None]:
        """Evaluate with soft gates inside the block."""
        return self.reading_as(SOFT, training=False)

    @contextmanager
    def holding(self, mask: Tensor) -> Iterator[None]:
        """Make `open_mask()` answer `mask`, bool of shape (num_units,), inside the block."""
        before = self._readings
        self._readings = {mode: Held(mask, reading) for mode, reading in before.items()}
        try:
            yield
        finally:
            self._readings = before

    @contextmanager
    def as_leaf(self) -> Iterator[Tensor]:
        """Hold the values in force inside the block, as a leaf tensor whose `grad` becomes dL/dg."""
        leaf = self.values().detach().clone().requires_grad_()
        with self.reading_as(Leaf(leaf)):
            yield leaf

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        num_open = int(self.open_mask().sum())
        return f"{self.num_units} units, {num_open} open, threshold={self.threshold:.3g}"


def _innermost(reading: Reading) -> Reading:
    while isinstance(reading, (Measured, Held)):
        reading = reading.forward
    return reading
