"""A block whose samples take widths of their own: groups of equal width run densely."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from swan_surgery.adaptive.block import AdaptiveBlock
from swan_surgery.adaptive.effort import Effort
from swan_surgery.adaptive.graphs import in_groups_of, is_exporting
from swan_surgery.adaptive.levels import LevelStatistics, Narrowing, closed_bias, norms_of
from swan_surgery.adaptive.masked import Norms, Observer, masking
from swan_surgery.adaptive.rows import Rows
from swan_surgery.adaptive.run import Levels, Run, Slope
from swan_surgery.adaptive.slopes import leaning, statistics_at_rest
from swan_surgery.errors import ModelError


Looked = Literal["not", "without gradients", "with gradients"]


class NestedBlock(AdaptiveBlock):
    """A module of the given model with its inner channels in order of importance, in nested widths.

    Attributes:
        statistics: batch-norm statistics, means and readers of every level but the widest.
        narrowings: what each level but the widest keeps.
        extra: int64 (levels,): MACs of each level above the narrowest, per sample.
        bound: shells whose parameters are views of the weights, once `compact` has made them.
        slope: how the choice of the last run that may have a backward pass would change with the effort, if that learns.
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
        statistics = [LevelStatistics(full, own.open_inputs, own) for own in narrowings]
        super().__init__(
            name, full, statistics, effort=effort, rows=rows, channels_last=channels_last
        )
        self.narrowings = tuple(narrowings)
        self.register_buffer("extra", extra, persistent=False)
        self.shells = tuple(shells)
        self.bound: tuple[nn.Module, ...] | None = None
        self.slope: Slope | None = None
        self.looked: Looked = "not"  # in its last run
        self.norms_then: Norms = {}  # as it began, in train mode

    @property
    def num_levels(self) -> int:
        """Widths, the full one included."""
        return len(self.narrowings) + 1

    def is_masked(self, execution: str | None) -> bool:
        """Where it is asked for."""
        return execution not in (None, "group")

    def masked(self, choice: Levels, observer: Observer | None) -> Any:
        """The masks of all levels, and whose level is which."""
        masks = {name: self._open_inputs(name) for name in self.narrowings[0].open_inputs}
        statistics: Any = self.statistics
        norms = self.norms_then if self.training else {}
        return masking(
            self.full, masks, statistics, choice, levels=choice, observer=observer, norms=norms
        )

    def _open_inputs(self, reader: str) -> Tensor:
        """Which inputs of a reader each level has open, [levels, inputs]."""
        weight = self.full.get_parameter(f"{reader}.weight")
        counts = [level.open_inputs[reader] for level in self.narrowings]
        places = torch.arange(weight.shape[1], device=weight.device)
        ends = torch.tensor([*counts, weight.shape[1]], device=weight.device)
        return places < ends[:, None]

    @staticmethod
    def is_by_sample(choice: Levels) -> bool:
        """Levels stand in a tensor where samples differ."""
        return isinstance(choice, Tensor)

    def keys(self, choice: Levels) -> Any:
        """The level itself."""
        return choice.tolist() if isinstance(choice, Tensor) else choice

    def look(self, run: Run, call: Any) -> Levels:
        """By the effort of the input, or as the block before that looked."""
        if self.effort is not None:
            efforts = self.effort(self.features(call))
            run.efforts[self.name] = efforts
            run.shared = run.capped(self.effort.levels(efforts), self.extra)
            run.slope = self._slope(efforts, run.shared) if self._learns(efforts, run) else None
        assert run.shared is not None  # noqa: S101 - who looks for all runs first
        return run.shared

    def _learns(self, efforts: Tensor, run: Run) -> bool:
        """Whether there may be a backward pass to the effort; not in groups whose batch-norms are in train mode."""
        is_wanted = torch.is_grad_enabled() and efforts.requires_grad and self.bound is None
        return is_wanted and (not self.training or self.is_masked(run.execution))

    def _slope(self, efforts: Tensor, taken: Levels) -> Slope:
        """Of efforts; where a ceiling decided, nothing would change."""
        assert isinstance(self.effort, Effort)  # noqa: S101 - it looked
        beyond, wider = self.effort.neighbours(efforts)
        is_own = self.effort.levels(efforts) == taken
        return Slope(torch.where(is_own, beyond, taken), wider)

    @staticmethod
    def _slope_in(run: Run, choice: Levels) -> Slope | None:
        """Of a choice that came of looking."""
        return run.slope if choice is run.shared else None

    def remembered(self, choice: Levels, run: Run | None) -> Levels:
        """Levels, and the slope without the graph that it hangs on."""
        if run is not None:
            is_shifted = self.training and self.is_masked(run.execution)
            self.norms_then = self._norms() if is_shifted else {}
            slope = self._slope_in(run, choice)
            self.slope = None if slope is None else slope.alone()
            efforts = run.efforts.get(self.name)
            has_gradients = efforts is not None and efforts.requires_grad
            looked: Looked = "with gradients" if has_gradients else "without gradients"
            self.looked = "not" if efforts is None else looked
        return choice

    def _norms(self) -> Norms:
        own: dict[str, Any] = norms_of(self.full)
        return {
            name: (norm.running_mean.clone(), norm.running_var.clone())
            for name, norm in own.items()
        }

    def recalled(self, last: Levels, call: Any) -> Levels:
        """Levels as they were, and efforts with gradients of their own."""
        if self.effort is None or self.looked == "not":
            return last
        if self.looked == "with gradients":
            efforts = self.effort(self.features(call))  # saved by autograd, whoever needs it
            if self.slope is not None:
                self.slope = Slope(self.slope.levels, self.effort.neighbours(efforts)[1])
        elif self.is_masked(self.last_execution) and self.effort.weight.requires_grad:
            raise ModelError(
                "efforts cannot learn where activation checkpointing runs a block without gradients at first "
                "(use_reentrant=True): pass use_reentrant=False, or requires_grad_(False) on the efforts"
            )
        return last

    def run_at(self, choice: Levels, run: Run | None, call: Any) -> Any:
        """As they chose; with the gradient of the effort where that learns."""
        execution = self.last_execution if run is None else run.execution
        if is_exporting() and isinstance(choice, Tensor) and not self.is_masked(execution):
            return in_groups_of(choice, self.num_levels, self._at_call, self.rows, call)
        slope = self.slope if run is None else self._slope_in(run, choice)
        if run is None and slope is not None:
            self.slope = slope.alone()
        found = super().run_at(choice, run, call)
        if slope is None or not isinstance(choice, Tensor):
            return found
        with torch.no_grad(), statistics_at_rest(self.full):
            other = super().run_at(slope.levels, run, call)
        return leaning(found, other, choice, slope)

    def _at_call(self, level: int, call: Any) -> Any:
        return self.at(level, *call)

    def at(self, key: int | None, args: Any, kwargs: Any) -> Any:
        """At one level; None: the full one."""
        if key is None or key == len(self.narrowings):
            return self.full(*args, **kwargs)
        if self.bound is not None and not self.training:
            return self.bound[key](*args, **kwargs)
        return self.run_shell(self.shells[key], self.tensors(key), args, kwargs)

    def shell(self, level: int) -> nn.Module:
        """The module at a level, without weights: modes and constants as the full one has them."""
        return self.dressed(self.shells[level])

    def tensors(self, level: int) -> dict[str, Tensor]:
        """Parameters and buffers of a level by name: views of the weights, statistics and readers of its own."""
        own = self.narrowings[level]
        statistics = self.statistics[level]
        assert isinstance(statistics, LevelStatistics)  # noqa: S101 - made so
        found = {name: own.view(name, tensor) for name, tensor in self.all_parts().items()}
        for name in statistics.norms:
            for statistic, tensor in statistics.norm(name).items():
                found[f"{name}.{statistic}" if name else statistic] = tensor
        for name in own.open_inputs:
            own_reader = statistics.own(name)
            if own_reader is not None:
                found[f"{name}.weight"], found[f"{name}.bias"] = own_reader
                continue
            outputs = found[f"{name}.weight"].shape[0]
            weight = self.full.get_parameter(f"{name}.weight").narrow(0, 0, outputs)
            is_open = self._open_inputs(name)[level][None]
            (bias,) = closed_bias(weight, statistics.mean(name)[None], is_open)
            given = found.get(f"{name}.bias")
            found[f"{name}.bias"] = bias if given is None else given + bias
        return found

    def own_readers_(self, level: int, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Give the readers of a level weights of their own: these, or what they compute with now."""
        statistics = self.statistics[level]
        assert isinstance(statistics, LevelStatistics)  # noqa: S101 - made so
        statistics.own_readers_(self.tensors(level) if tensors is None else tensors)

    def own_readers(self, key: int) -> list[str]:
        """Those of a level that has its own."""
        if key >= len(self.statistics) or not self.statistics[key].has_own:
            return []
        return [
            f"{self.name}.{own}" if self.name else own for own in self.narrowings[key].open_inputs
        ]

    def parts(self, key: int) -> dict[str, Tensor]:
        """The same for any level, the widest included."""
        return self.tensors(key) if key < len(self.narrowings) else self.all_parts()

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"{self.num_levels} widths"


__all__ = ["NestedBlock"]
