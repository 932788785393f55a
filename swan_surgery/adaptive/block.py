"""A block whose samples take widths of their own: groups of equal width run densely."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from swan_surgery.adaptive.effort import Effort, features_of
from swan_surgery.adaptive.levels import (
    LevelStatistics,
    Narrowing,
    closed_bias,
)
from swan_surgery.adaptive.masked import Observer, masking
from swan_surgery.adaptive.rows import Rows, put_together
from swan_surgery.adaptive.run import Levels, Run, running
from swan_surgery.errors import InputError, ModelError
from swan_surgery.models.tensors import plain_tensors


_NO_BACKWARD = -1  # no graph task runs


class NestedBlock(nn.Module):
    """A module of the given model with its inner channels in order of importance, in nested widths.

    Attributes:
        full: the module itself, at full width; it owns all weights.
        statistics: batch-norm statistics and means of every level but the widest.
        effort: looks at the input; None where another block looks for this one.
        narrowings: what each level but the widest keeps.
        extra: int64 (levels,): MACs of each level above the narrowest, per sample.
        observer: told what readers and batch-norms get, in runs that observe.
        bound: shells whose parameters are views of the weights, once `compact` has made them.
        last: levels of the last run that may have a backward pass.
    """

    extra: Tensor

    def __init__(
        self,
        name: str,
        full: nn.Module,
        shells: Sequence[nn.Module],
        narrowings: Sequence[Narrowing],
        *,
        effort: Effort | None,
        rows: Rows,
        channels_last: bool,
        extra: Tensor,
    ) -> None:
        super().__init__()
        self.name = name
        self.full = full
        self.statistics = nn.ModuleList(LevelStatistics(full, own) for own in narrowings)
        self.effort = effort
        self.narrowings = tuple(narrowings)
        self.rows = rows
        self.channels_last = channels_last
        self.register_buffer("extra", extra, persistent=False)
        self.shells = tuple(shells)
        self.observer: Observer | None = None
        self.bound: tuple[nn.Module, ...] | None = None
        self.last: Levels | None = None
        self.training = full.training

    @property
    def num_levels(self) -> int:
        """Widths, the full one included."""
        return len(self.narrowings) + 1

    def __getattr__(self, name: str) -> Any:
        """What the model reads from its block, it finds."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("full", "_modules"):
                raise
            return getattr(self.full, name)

    def features(self, call: Any) -> Tensor:
        """What the effort reads of a call's samples: [B, features]."""
        return features_of(self.rows.first(call), channels_last=self.channels_last)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own forward, every sample at its level."""
        run = running()
        call = (args, kwargs)
        levels = self._levels(run, call)
        if torch.is_grad_enabled() or self.training:
            self.last = levels
        if run is not None and run.execution != "group" and not self.training:
            return self._masked(run, levels, call)
        if isinstance(levels, Tensor):
            return self._grouped(levels, call)
        return self._at(levels, args, kwargs)

    def _levels(self, run: Run | None, call: Any) -> Levels:
        if run is None:
            if self.last is None or torch._C._current_graph_task_id() == _NO_BACKWARD:  # noqa: SLF001 - as torch.utils.checkpoint asks
                raise ModelError(
                    f"block {self.name!r} runs outside of its adaptive model, or again for a backward pass after two "
                    f"others (activation checkpointing in swan.sandwich_loss): who takes which width is not known; "
                    f"call the adaptive model"
                )
            return self.last  # recomputed in backward
        levels = run.held.get(self.name, run.held.get(""))
        if levels is None:
            levels = run.shared if self.effort is None else self._look(run, self.effort, call)
            assert levels is not None  # noqa: S101 - who looks for all runs first
        elif isinstance(levels, Tensor) and len(levels) != len(self.rows.first(call)):
            raise ModelError(
                f"{len(levels)} levels for the {len(self.rows.first(call))} rows of block {self.name!r}"
            )
        run.taken[self.name] = levels
        return levels

    def _look(self, run: Run, effort: Effort, call: Any) -> Levels:
        efforts = effort(self.features(call))
        run.efforts[self.name] = efforts
        run.shared = run.capped(effort.levels(efforts), self.extra)
        return run.shared

    def _grouped(self, levels: Tensor, call: Any) -> Any:
        groups: dict[int, list[int]] = {}
        for sample, level in enumerate(levels.tolist()):
            groups.setdefault(level, []).append(sample)
        if len(groups) <= 1:
            return self._at(next(iter(groups), len(self.narrowings)), *call)
        indices = list(groups.values())
        try:
            parts = [self._at(level, *self.rows.take(call, own)) for level, own in groups.items()]
        except ValueError as err:
            alone = any(len(own) == 1 for own in groups.values())
            if not (self.training and alone and "more than 1 value per channel" in str(err)):
                raise
            raise InputError(
                f"one sample of the batch takes a width of its own in block {self.name!r}, whose batch-norms are in "
                f"train mode, which need two; train by swan.sandwich_loss, whose widths are for whole batches, and "
                f"let inputs choose in eval mode"
            ) from err
        return put_together(parts, indices)

    def _at(self, level: int, args: Any, kwargs: Any) -> Any:
        if level == len(self.narrowings):
            return self.full(*args, **kwargs)
        if self.bound is not None and not self.training:
            return self.bound[level](*args, **kwargs)
        shell = self.shell(level)
        return functional_call(shell, self.tensors(level), args, kwargs, tie_weights=False)

    def shell(self, level: int) -> nn.Module:
        """The module at a level, without weights: modes and constants as the full one has them."""
        shell = self.shells[level]
        for own, full in zip(shell.modules(), self.full.modules(), strict=True):
            own.training = full.training
            for name, tensor in plain_tensors(full).items():
                setattr(own, name, tensor)
        return shell

    def tensors(self, level: int) -> dict[str, Tensor]:
        """Parameters and buffers of a level by name: views of the weights, and statistics of its own."""
        own = self.narrowings[level]
        statistics = self.statistics[level]
        assert isinstance(statistics, LevelStatistics)  # noqa: S101 - made so
        named = (self.full.named_parameters, self.full.named_buffers)
        found = {
            name: own.view(name, tensor)
            for all_of in named
            for name, tensor in all_of(remove_duplicate=False)
        }
        for name in statistics.norms:
            for statistic, tensor in statistics.norm(name).items():
                found[f"{name}.{statistic}" if name else statistic] = tensor
        for name, num_open in own.open_inputs.items():
            weight = self.full.get_parameter(f"{name}.weight")
            outputs = found[f"{name}.weight"].shape[0]
            mean = statistics.mean(name)
            bias = closed_bias(weight.narrow(0, 0, outputs), mean, num_open)
            given = found.get(f"{name}.bias")
            found[f"{name}.bias"] = bias if given is None else given + bias
        return found

    def own_state(self) -> dict[str, Tensor]:
        """All that is not the module's own: statistics and means of its widths, and who looks."""
        found = {f"statistics.{name}": t for name, t in self.statistics.named_buffers()}
        if self.effort is not None:
            own = (*self.effort.named_parameters(), *self.effort.named_buffers())
            found |= {f"effort.{name}": tensor for name, tensor in own}
        return found

    def parts(self, level: int) -> dict[str, Tensor]:
        """The same for any level, the widest included."""
        if level < len(self.narrowings):
            return self.tensors(level)
        named = [*self.full.named_parameters(remove_duplicate=False)]
        return dict([*named, *self.full.named_buffers(remove_duplicate=False)])

    def _masked(self, run: Run, levels: Levels, call: Any) -> Any:
        observer = self.observer if run.execution == "observe" else None
        statistics: Any = self.statistics
        with masking(self.full, self.narrowings, statistics, levels, observer=observer):
            return self.full(*call[0], **call[1])

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"{self.num_levels} widths"


__all__ = ["NestedBlock"]
