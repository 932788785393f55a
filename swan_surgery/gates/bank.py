"""The gate bank: one logit per unit, and how logits become values between 0 and 1."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from math import ceil
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from swan_surgery.errors import GateError, InputError


Mode = Literal["ste", "soft"]
MinWidth = int | float | Mapping[str, int | float]

# sigmoid(3) = 0.953: open, and near enough to 1 that soft gates start close to the base model.
INITIAL_LOGIT = 3.0
# Up to this many open units per layer are found one by one instead of by sorting.
_FEW = 4


class GateBank(nn.Module):
    """All gates of a model: p = sigmoid(z) (Eq. 3), hard g = [p >= threshold] (Eq. 4).

    Attributes:
        logits: z, shape (num_units,).
        measured: whether gradients on the logits are dL/dg itself, without the factor p(1-p); set by
            what learns from them instead of the optimizer (`gate_learning`).
        min_width: what every layer keeps open at least, the highest p: a number of units, a share of
            the layer's units (a float below 1), or a mapping from layer names or glob patterns to
            either, the first that matches, 1 where none does.
    """

    _threshold: Tensor
    _index: Tensor
    _rows: Tensor
    _wanted: Tensor

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
        self._names = [tuple(own) for own in names] or [()] * len(widths)
        self._sizes_of_rows = [len(units) for units in widths]
        self.min_width = 1
        self.register_buffer("_threshold", torch.tensor(0.5))
        self._mode: Mode = "ste"
        self._soft_evaluation = False
        self._held: Tensor | None = None
        self._leaf: Tensor | None = None
        self.measured = False
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
    def min_width(self) -> MinWidth:
        """What every layer keeps open at least."""
        return self._min_width

    @min_width.setter
    def min_width(self, value: MinWidth) -> None:
        rules = value if isinstance(value, Mapping) else {"*": value}
        for width in rules.values():
            whole = isinstance(width, int) and width >= 0
            if isinstance(width, bool) or not (whole or 0 < width < 1):
                raise InputError(
                    f"min_width is a number of units (0, 1, 2, ...) or a share of a layer's units "
                    f"between 0 and 1; got {width!r}"
                )
        known = [name for own in self._names for name in own]
        for pattern in rules:
            if pattern != "*" and not any(fnmatch(name, pattern) for name in known):
                raise InputError(
                    f"min_width names {pattern!r}, but no layer with gates is called so; there are "
                    f"{', '.join(known[:4])}{', ...' if len(known) > 4 else ''}"
                )
        self._least = []
        for own, size in zip(self._names, self._sizes_of_rows, strict=True):
            names = own or ("",)
            width = next((w for at, w in rules.items() for n in names if fnmatch(n, at)), 1)
            self._least.append(min(size, width if isinstance(width, int) else ceil(width * size)))
        # On the device beforehand: a captured CUDA graph may copy nothing from the CPU.
        wanted = torch.tensor(self._least, dtype=torch.int64, device=self.logits.device)[:, None]
        self.register_buffer("_wanted", wanted, persistent=False)
        self._min_width = dict(value) if isinstance(value, Mapping) else value

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
        return self.least_mask(p) | (p >= threshold)

    def least_mask(self, scores: Tensor) -> Tensor:
        """The `min_width` highest-scoring units of every layer, the first among equals.

        Args:
            scores: at least 0, shape (num_units,).
        """
        padded = torch.cat([scores, scores.new_full((1,), -1.0)])
        is_open = torch.zeros_like(padded, dtype=torch.bool)
        most = max(self._least, default=0)
        if most == 0:
            return is_open[:-1]
        table = padded[self._rows]
        if most <= _FEW:
            for count in range(1, most + 1):
                best = table.argmax(dim=1, keepdim=True)
                chosen = self._rows.gather(1, best)
                if min(self._least) < count:
                    # What a layer does not want goes to the place behind the last unit.
                    chosen = chosen.where(self._wanted >= count, self.num_units)
                is_open = is_open.index_fill(0, chosen.reshape(-1), value=True)
                table = table.scatter(1, best, -2.0)
        else:
            order = table.argsort(dim=1, descending=True, stable=True)[:, :most]
            kept = torch.arange(most, device=order.device) < self._wanted
            chosen = self._rows.gather(1, order).where(kept, self.num_units)
            is_open = is_open.index_fill(0, chosen.reshape(-1), value=True)
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

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies are measured by nobody."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's own
        self.measured = False

    def values(self) -> Tensor:
        """The gate values in force, shape (num_units,)."""
        if self._leaf is not None:
            return self._leaf
        if not self.training:
            if self._soft_evaluation:
                return self.probabilities()
            return self.open_mask().to(self.logits.dtype)
        p = self.probabilities()
        if self.measured:
            # Whatever the logits become before the backward pass, their gradient is dL/dg.
            value = p if self._mode == "soft" else self.open_mask().to(p.dtype)
            return value.detach() + (self.logits - self.logits.detach())
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

    @contextmanager
    def as_leaf(self) -> Iterator[Tensor]:
        """Hold the values in force inside the block, as a leaf tensor whose `grad` becomes dL/dg."""
        self._leaf = self.values().detach().clone().requires_grad_()
        try:
            yield self._leaf
        finally:
            self._leaf = None

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        num_open = int(self.open_mask().sum())
        return f"{self.num_units} units, {num_open} open, threshold={self.threshold:.3g}"
