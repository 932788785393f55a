"""The gate bank: one logit per unit, and how logits become values between 0 and 1."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from swan_surgery.errors import GateError, InputError


Mode = Literal["ste", "soft"]

# sigmoid(3) = 0.953: open, and near enough to 1 that soft gates start close to the base model.
INITIAL_LOGIT = 3.0


class GateBank(nn.Module):
    """All gates of a model: p = sigmoid(z) (Eq. 3), hard g = [p >= threshold] (Eq. 4).

    Attributes:
        logits: z, shape (num_units,).
        min_width: open units that every layer keeps at least; the highest p stay.
    """

    _threshold: Tensor
    _index: Tensor
    _rows: Tensor

    def __init__(
        self, num_units: int, widths: Sequence[Sequence[int]], sites: Sequence[Tensor]
    ) -> None:
        """Make a bank.

        Args:
            num_units: number of gates.
            widths: per layer the units that make up its width.
            sites: per site the unit at each position, any shape; -1 where there is no gate.
        """
        super().__init__()
        self.logits = nn.Parameter(torch.full((num_units,), INITIAL_LOGIT))
        self.min_width = 1
        self.register_buffer("_threshold", torch.tensor(0.5))
        self._mode: Mode = "ste"
        self._soft_evaluation = False
        self._held: Tensor | None = None
        self._shapes = [tuple(units.shape) for units in sites]
        self._sizes = [units.numel() for units in sites]
        flat = [torch.where(units < 0, num_units, units).reshape(-1) for units in sites]
        index = torch.cat(flat) if flat else torch.zeros(0, dtype=torch.int64)
        self.register_buffer("_index", index, persistent=False)
        longest = max((len(units) for units in widths), default=0)
        rows = torch.full((len(widths), longest), num_units)
        for row, units in enumerate(widths):
            rows[row, : len(units)] = torch.tensor(sorted(units))
        self.register_buffer("_rows", rows, persistent=False)

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
    def mode(self) -> Mode:
        """Gates in training: `"ste"` (forward hard, backward as p, Eq. 6) or `"soft"` (p)."""
        return self._mode

    @mode.setter
    def mode(self, value: Mode) -> None:
        if value not in get_args(Mode):
            raise InputError(f"mode must be one of {get_args(Mode)}, got {value!r}")
        self._mode = value

    def probabilities(self) -> Tensor:
        """P = sigmoid(z), shape (num_units,), differentiable."""
        return torch.sigmoid(self.logits)

    def open_mask(self) -> Tensor:
        """Which units are open, bool of shape (num_units,).

        p >= threshold, and never fewer than `min_width` in any layer: the highest p stay (the
        lowest index among equals). Evaluation, cost and pruning all read this mask.
        """
        if self._held is not None:
            return self._held
        return self.mask_at(self._threshold)

    def mask_at(self, threshold: Tensor) -> Tensor:
        """The open mask that another threshold would give."""
        p = self.probabilities().detach()
        padded = torch.cat([p, p.new_full((1,), -1.0)])
        is_open = padded >= threshold
        if self._rows.numel():
            table = padded[self._rows]
            for _ in range(min(self.min_width, table.shape[1])):
                best = table.argmax(dim=1, keepdim=True)
                is_open = is_open.index_fill(0, self._rows.gather(1, best).reshape(-1), value=True)
                table = table.scatter(1, best, -2.0)
        return is_open[:-1]

    def check(self) -> None:
        """Refuse logits that mean nothing.

        Raises:
            GateError: a logit is NaN or infinite; says how many and which.
        """
        bad = (~torch.isfinite(self.logits.detach())).nonzero().reshape(-1)
        if bad.numel():
            raise GateError(
                f"{bad.numel()} of {self.num_units} gate logits are NaN or infinite (first: unit "
                f"{int(bad[0])}); training diverged: lower gate_lr or restore a checkpoint"
            )

    def values(self) -> Tensor:
        """The gate values in force, shape (num_units,)."""
        if not self.training:
            if self._soft_evaluation:
                return self.probabilities()
            return self.open_mask().to(self.logits.dtype)
        p = self.probabilities()
        if self._mode == "soft":
            return p
        # Forward exactly the hard gate, backward as p (paper section 2.4).
        return self.open_mask().to(p.dtype) + (p - p.detach())

    def forward(self) -> tuple[Tensor, ...]:
        """The values at every site, each broadcastable to the site's activation."""
        values = self.values()
        padded = torch.cat([values, values.new_ones(1)])
        parts = padded.index_select(0, self._index).split(self._sizes)
        return tuple(part.view(shape) for part, shape in zip(parts, self._shapes, strict=True))

    @contextmanager
    def soft_evaluation(self) -> Iterator[None]:
        """Evaluate with soft gates inside the block."""
        before = self._soft_evaluation
        self._soft_evaluation = True
        try:
            yield
        finally:
            self._soft_evaluation = before

    @contextmanager
    def holding(self, mask: Tensor) -> Iterator[None]:
        """Make `open_mask()` answer `mask`, bool of shape (num_units,), inside the block."""
        before = self._held
        self._held = mask
        try:
            yield
        finally:
            self._held = before

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        num_open = int(self.open_mask().sum())
        return f"{self.num_units} units, {num_open} open, threshold={self.threshold:.3g}"
