"""One run of an adaptive model: which level every block takes, for every sample."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from swan_surgery.adaptive.own_hooks import own_hooks


# MACs are told as whole numbers; what shares of tokens cost is one up to this.
_ROUNDED = 0.49

# "observe": masked, with statistics of the batch, while somebody records them.
Execution = Literal["group", "masked", "gather", "observe"]
# One level for all samples, or int64 of shape (B,): 0 is the narrowest. Of free units a mask, (units,) or (B, units).
Levels = int | Tensor


@dataclass(frozen=True, slots=True)
class Slope:
    """What samples would take if their effort crossed its nearest threshold.

    Attributes:
        levels: int64 (B,): on the other side of it; a sample's own level where nothing would change.
        wider: (B,): the probability of the wider of the two, with gradients.
    """

    levels: Tensor
    wider: Tensor

    def alone(self) -> "Slope":
        """Without the graph that it hangs on."""
        return Slope(self.levels, self.wider.detach().requires_grad_())


@dataclass
class Run:
    """What blocks ask while the model runs, and what they leave behind.

    Attributes:
        execution: how blocks run their samples.
        held: levels by block that somebody has decided; the other blocks look at their input.
        taken: levels by block, in the order in which they ran.
        efforts: what looked at the input saw, by block: [B].
        shared: what the last block that looked decided.
        slope: how that would change with its effort, where efforts learn.
        ceiling: MACs per sample above the narrowest levels of all blocks, at most.
        left: MACs per sample that are left of these.
        extra: MACs of a block under masks above its narrowest, (name, masks) -> (B,); where units are chosen.
        samples: that the model got, where it is known.
    """

    execution: Execution
    held: Mapping[str, Levels] = field(default_factory=dict)
    taken: dict[str, Levels] = field(default_factory=dict)
    efforts: dict[str, Tensor] = field(default_factory=dict)
    shared: Levels | None = None
    slope: Slope | None = None
    left: Tensor | None = None
    ceiling: int | None = None
    extra: Callable[[str, Tensor], Tensor] | None = None
    samples: int | None = None

    def capped(self, levels: Levels, extra: Tensor) -> Levels:
        """Levels under the ceiling; `extra` int64 (levels,): MACs of each above the narrowest."""
        if self.ceiling is None:
            return levels
        extra = extra.to(levels.device) if isinstance(levels, Tensor) else extra
        if self.left is None:
            self.left = extra.new_full((), self.ceiling)
        own = torch.as_tensor(levels, device=extra.device)
        affordable = (extra <= self.left[..., None]).sum(-1) - 1
        own = torch.minimum(own, affordable)
        self.left = self.left - extra[own]
        return own if own.ndim else int(own)

    def capped_masks(self, name: str, masks: Tensor, logits: Tensor, least: Tensor) -> Tensor:
        """Masks under the ceiling: of each sample what is least likely to be open closes first.

        Args:
            name: of the block that they are for.
            masks: bool (B, ..., units).
            logits: of the gates, likewise.
            least: what stays open whatever it costs, likewise.
        """
        if self.ceiling is None or self.extra is None:
            return masks
        extra, shape = self.extra, masks.shape
        is_open, stays = masks.flatten(1), least.flatten(1)
        order = logits.detach().flatten(1).argsort(dim=1, stable=True)
        rank = order.argsort(dim=1)

        def without(count: Tensor) -> Tensor:
            """The lowest so many closed."""
            kept: Tensor = is_open & (stays | (rank >= count[:, None]))
            return kept.reshape(shape)

        if self.left is None:
            self.left = torch.full((len(masks),), float(self.ceiling), dtype=torch.float64)
        low = rank.new_zeros(len(masks))
        high = low + rank.shape[1]
        while bool((low < high).any()):
            middle = (low + high) // 2
            fits = (extra(name, without(middle)) <= self.left + _ROUNDED).to(low.device)
            low, high = torch.where(fits, low, middle + 1), torch.where(fits, middle, high)
        capped = without(low)
        self.left = self.left - extra(name, capped)
        return capped


_NOW: ContextVar[Run | None] = ContextVar("swan_adaptive_run", default=None)


def running() -> Run | None:
    """The run that is under way, if there is one."""
    return _NOW.get()


@contextmanager
def begin(run: Run) -> Iterator[Run]:
    """Blocks inside the block ask this run."""
    token = _NOW.set(run)
    try:
        yield run
    finally:
        _NOW.reset(token)


@contextmanager
def beginning_anew(model: nn.Module, new_run: Callable[[Any, Any], Run]) -> Iterator[None]:
    """Inside, every call of a model is a run of its own, whoever makes it.

    Args:
        model: with blocks in it.
        new_run: makes what the blocks of a call ask, of its args and kwargs.
    """

    def renew(_model: nn.Module, args: Any, kwargs: Any) -> None:
        _NOW.set(new_run(args, kwargs))

    with begin(new_run((), {})), own_hooks() as own:
        handle = model.register_forward_pre_hook(own(renew), with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


__all__ = ["Execution", "Levels", "Run", "Slope", "begin", "beginning_anew", "running"]
