"""The parts of a routed model as one module, which runs them all: for training, for gates and for counting.

Names as in the paper (arXiv:2407.05442): trunk F1..i, mask M, switch S, lightweight branch D, full branch Fi+1...
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import InputError
from swan_surgery.models import Inputs, doubled
from swan_surgery.models.modes import evaluating
from swan_surgery.models.outputs import iter_tensors


class Switch(nn.Module):
    """Predicts from what crosses how far the light branch will be from the full one, per sample.

    Mean and largest value of every channel, a hidden layer, one number: a discrepancy (>= 0), or the logit of
    "positive" in gated compression.
    """

    scale: Tensor
    seen: Tensor

    def __init__(
        self, channels: int, *, axis: int, hidden: int = 64, is_logit: bool = False
    ) -> None:
        """`axis` holds the channels of what crosses, counted from the front; the batch lies on axis 0."""
        super().__init__()
        self.axis, self.is_logit = axis, is_logit
        self.norm = nn.BatchNorm1d(2 * channels)
        self.hidden = nn.Linear(2 * channels, hidden)
        self.out = nn.Linear(hidden, 1)
        # The mean discrepancy seen in training: what is predicted is in its units.
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, crossing: Tensor) -> Tensor:
        """[B, ..., C, ...] -> [B]."""
        rows = (
            crossing.movedim(self.axis, 1).flatten(2) if crossing.ndim > 2 else crossing[..., None]
        )
        pooled = torch.cat([rows.mean(2), rows.amax(2)], dim=1)
        found = self.out(nn.functional.silu(self.hidden(self._normed(pooled)))).squeeze(1)
        return found if self.is_logit else nn.functional.softplus(found) * self.scale

    def _normed(self, pooled: Tensor) -> Tensor:
        norm = self.norm
        if norm.training and len(pooled) < 2:  # a batch of one has no variance
            return nn.functional.batch_norm(
                pooled, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
            )
        found: Tensor = norm(pooled)
        return found

    @property
    def channels(self) -> int:
        """How many cross."""
        return self.norm.num_features // 2


class Ending(nn.Module):
    """Gated compression's light branch: the input ends here, with an output that is always the same."""

    default: Tensor

    def __init__(self, default: Tensor) -> None:
        """`default`: the output of one sample, without the batch."""
        super().__init__()
        self.register_buffer("default", default.detach().clone())

    def forward(self, crossing: Tensor) -> Tensor:
        """[B, ...] -> the default output, B times, in memory of its own."""
        return self.default.expand(crossing.shape[0], *self.default.shape).clone()


class Parts(nn.Module):
    """Trunk, switch, light branch and full branch; the full branch may be such a module itself.

    Attributes:
        trunk: the given model up to and including the module named.
        switch: see `Switch`.
        light: what easy inputs take.
        full: the rest of the given model.
    """

    switch: Switch

    def __init__(self, trunk: nn.Module, switch: Switch, light: nn.Module, full: nn.Module) -> None:
        super().__init__()
        self.trunk, self.light, self.full = trunk, light, full
        self.switch = switch

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Any, ...], tuple[Tensor, ...]]:
        """All of them, on the whole batch.

        Returns:
            The given model's output; the light branches' outputs and the switches' predictions, the
            first switch first.
        """
        crossing = self.trunk(*args, **kwargs)
        found = self.full(crossing)
        full, lights, predicted = found if isinstance(self.full, Parts) else (found, (), ())
        return (
            full,
            (self.light(crossing), *lights),
            (self.switch(crossing), *predicted),
        )

    @property
    def chain(self) -> "tuple[Parts, ...]":
        """This switch and those behind it."""
        own = self.full
        return (self, *own.chain) if isinstance(own, Parts) else (self,)

    def crossings(self, inputs: Inputs) -> list[Tensor]:
        """What crosses at each switch, in eval mode."""
        with evaluating(self), torch.no_grad():
            found = [inputs.run(self.trunk)]
            for inner in self.chain[1:]:
                found.append(inner.trunk(found[-1]))
        return found

    @property
    def last(self) -> nn.Module:
        """The full branch of the last switch."""
        own = self.full
        return own.last if isinstance(own, Parts) else own


class OnCopy(nn.Module):
    """A branch that works in place on what it is given, on a copy of it: the other branch reads it, too."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, crossing: Tensor) -> Any:
        """What the branch returns."""
        return self.branch(crossing.clone())


def check_branches(light: Any, full: Any, batch: int) -> None:
    """Refuse a light branch whose output cannot stand in the full branch's place.

    Raises:
        InputError: another structure or shape, or an output without the batch in front.
    """
    (one, structure), (two, wanted) = tree_flatten(light), tree_flatten(full)
    kinds = [(tuple(t.shape), t.dtype) if isinstance(t, Tensor) else type(t) for t in (*one, *two)]
    if kinds[: len(one)] != kinds[len(one) :] or structure != wanted:
        raise InputError(
            f"the light branch returns {_told(one)}, the full one {_told(two)}: both must return the same shapes and "
            f"types, in the same structure, dict keys in the same order"
        )
    holding = [t for t in two if not isinstance(t, Tensor) and any(True for _ in iter_tensors(t))]
    if holding:
        raise InputError(
            f"the model returns a {type(holding[0]).__name__} that holds tensors, whose samples cannot be put together "
            f"again; return tensors, tuples, lists or dicts of them"
        )
    bad = [t for t in two if isinstance(t, Tensor) and (not t.ndim or t.shape[0] != batch)]
    if bad or not any(isinstance(t, Tensor) for t in two):
        raise InputError(
            f"the model returns {_told(two)} for {batch} samples; a switch needs outputs with the batch on the "
            f"first axis"
        )


def check_follows(model: nn.Module, inputs: Inputs, output: Any) -> None:
    """Refuse a model whose outputs do not have one row per sample, whatever the number of samples.

    Raises:
        InputError: says which shapes it returns.
    """
    try:
        with torch.no_grad(), streams_kept():
            twice = inputs.map(doubled).run(model)
    except Exception:  # noqa: BLE001 - where the batch is fixed the split says so
        return
    pairs = list(zip(tree_leaves(output), tree_leaves(twice), strict=False))
    tensors = [(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)]
    if any(b.shape != (2 * a.shape[0], *a.shape[1:]) for a, b in tensors):
        raise InputError(
            f"the model returns {_told(tree_leaves(output))}, and {_told(tree_leaves(twice))} for twice as many samples; "
            f"a switch needs outputs with the batch on the first axis, and on no other"
        )


def _told(leaves: Sequence[Any]) -> str:
    return ", ".join(
        str(list(leaf.shape)) if isinstance(leaf, Tensor) else type(leaf).__name__
        for leaf in leaves
    )


__all__ = ["Ending", "OnCopy", "Parts", "Switch", "check_branches", "check_follows"]
