"""A block that looks at its input: what all structures share. Samples that choose alike run together."""

import copy
import threading
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from swan_surgery.adaptive.effort import features_of
from swan_surgery.adaptive.levels import LevelStatistics
from swan_surgery.adaptive.masked import Observer
from swan_surgery.adaptive.rows import Rows, in_groups, in_runs, put_together
from swan_surgery.adaptive.run import Levels, Run, running
from swan_surgery.errors import InputError, ModelError
from swan_surgery.models.tensors import plain_tensors


_NO_BACKWARD = -1  # no graph task runs
_THREADS = threading.local()
_OF_MODULES = frozenset(vars(nn.Module())) - {"training"}


class AdaptiveBlock(nn.Module, ABC):
    """A module of the given model whose samples choose which of its inner channels run.

    Attributes:
        full: the module itself, at full width; it owns all weights.
        statistics: what stands for closed channels, and batch-norm statistics where levels have their own.
        effort: looks at the input; None where another block looks for this one.
        rows: how it is called.
        observer: told what readers and batch-norms get, in runs that observe.
        last: what the samples of the last run that may have a backward pass chose.
        last_execution: how that ran them.
    """

    is_settled: bool = False  # from then on what a model writes on its block is the module's

    def __init__(
        self,
        name: str,
        full: nn.Module,
        statistics: Sequence[LevelStatistics],
        *,
        effort: nn.Module | None,
        rows: Rows,
        channels_last: bool,
    ) -> None:
        super().__init__()
        self.name = name
        self.full = full
        self.statistics = nn.ModuleList(statistics)
        self.effort: Any = effort
        self.rows = rows
        self.channels_last = channels_last
        self.observer: Observer | None = None
        self.last: Levels | None = None
        self.last_execution: str | None = None
        self.given_settings = [settings_of(module) for module in full.modules()]
        self.training = full.training

    def __getattr__(self, name: str) -> Any:
        """What the model reads from its block, it finds."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("full", "_modules"):
                raise
            return getattr(self.full, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """What the model writes on its block, the block's module has; all of it but what is the block's own."""
        if self.is_settled and name not in vars(self) and not hasattr(type(self), name):
            full: Any = self._modules["full"]
            parts = (full._parameters, full._buffers, full._modules)  # noqa: SLF001 - its stores
            if name in vars(full) or any(name in part for part in parts):
                setattr(full, name, value)
                return
        super().__setattr__(name, value)

    def features(self, call: Any) -> Tensor:
        """What the effort reads of a call's samples: [B, features]."""
        first = self.rows.looked_at(call, self.name, channels_last=self.channels_last)
        return features_of(first, channels_last=self.channels_last)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own forward, every sample as it chooses."""
        run = running()
        call = (args, kwargs)
        choice = self.chosen(run, call)
        return self.run_at(choice, run, call)

    def run_at(self, choice: Levels, run: Run | None, call: Any) -> Any:
        """Run a call whose samples take what they chose."""
        args, kwargs = call
        execution = self.last_execution if run is None else run.execution
        if self.is_masked(execution):
            with self.masked(choice, self.observer if execution == "observe" else None):
                return self.full(*args, **kwargs)
        keys = self.keys(choice)
        if isinstance(keys, list):
            return self._grouped(keys, call)
        return self.at(keys, args, kwargs)

    @property
    def entry(self) -> nn.Module:
        """The module whose inputs are looked at."""
        return self

    def chosen(self, run: Run | None, call: Any) -> Levels:
        """What the samples of a call take, remembered where there may be a backward pass."""
        choice = self._choice(run, call)
        if torch.is_grad_enabled() or self.training:
            self.last = self.remembered(choice, run)
            if run is not None:
                self.last_execution = run.execution
        return choice

    @abstractmethod
    def is_masked(self, execution: str | None) -> bool:
        """Whether all of the block runs, under masks."""

    @abstractmethod
    def masked(self, choice: Levels, observer: Observer | None) -> Any:
        """A context in which the full module runs under masks."""

    @abstractmethod
    def keys(self, choice: Levels) -> list[Any] | Hashable:
        """What tells samples that choose alike: one for all of them, or a list with one for each."""

    @abstractmethod
    def at(self, key: Any, args: Any, kwargs: Any) -> Any:
        """Run a call whose samples all choose alike."""

    @abstractmethod
    def look(self, run: Run, call: Any) -> Levels:
        """What the samples of a call choose by themselves."""

    @abstractmethod
    def parts(self, key: Any) -> dict[str, Tensor]:
        """Parameters and buffers by name as `at` runs them."""

    def own_readers(self, key: Any) -> list[str]:  # noqa: ARG002 - nested widths may have some
        """Readers with weights of their own where samples choose so, by name in the model."""
        return []

    def remembered(self, choice: Levels, run: Run | None) -> Levels:  # noqa: ARG002 - for those that look again
        """What is kept of a choice, should the block be run again in backward."""
        return choice

    def recalled(self, last: Levels, call: Any) -> Levels:  # noqa: ARG002
        """The choice of what was kept."""
        return last

    def _choice(self, run: Run | None, call: Any) -> Levels:
        if run is None:
            if self.last is None or torch._C._current_graph_task_id() == _NO_BACKWARD:  # noqa: SLF001 - as torch.utils.checkpoint asks
                raise ModelError(
                    f"block {self.name!r} runs outside of its adaptive model, or again for a backward pass after two "
                    f"others (activation checkpointing in swan.sandwich_loss, or in eval mode with use_reentrant=True): "
                    f"who takes which width is not known; call the adaptive model"
                )
            return self.recalled(self.last, call)  # recomputed in backward
        choice = run.held.get(self.name, run.held.get(""))
        if choice is None:
            choice = self.look(run, call)
        elif self.is_by_sample(choice):
            assert isinstance(choice, Tensor)  # noqa: S101 - what differs by sample is one
            rows = self.rows.first(call).shape[0]
            if choice.shape[0] != rows:
                raise ModelError(f"{len(choice)} levels for the {rows} rows of block {self.name!r}")
        run.taken[self.name] = choice
        return choice

    @staticmethod
    @abstractmethod
    def is_by_sample(choice: Levels) -> bool:
        """Whether a choice has one row per sample."""

    def _grouped(self, keys: Sequence[Any], call: Any) -> Any:
        if len(set(keys)) <= 1:
            return self.at(next(iter(keys), None), *call)
        groups = in_runs(keys) if self._lie_heavy(call) else in_groups(keys)
        indices = [own for _, own in groups]
        try:
            parts = [self._at_rows(key, call, own) for key, own in groups]
        except ValueError as err:
            alone = any(len(own) == 1 for own in indices)
            if not (self.training and alone and "more than 1 value per channel" in str(err)):
                raise
            raise InputError(
                f"one sample of the batch takes a width of its own in block {self.name!r}, whose batch-norms are in "
                f"train mode, which need two; train by swan.sandwich_loss, whose widths are for whole batches, and "
                f"let inputs choose in eval mode"
            ) from err
        return put_together(parts, indices)

    def _lie_heavy(self, call: Any) -> bool:
        """Whether to copy a sample takes longer than to read the weights once more, as in the first stages of a CNN.

        Then samples are taken as they lie, in runs that choose alike. Accelerators wait for launches instead, and
        batch-norms in train mode need more than one sample.
        """
        first = self.rows.first(call)
        if self.training or first.device.type != "cpu":
            return False
        weights = sum(own.numel() * own.element_size() for own in self.full.parameters())
        return first.numel() * first.element_size() > weights * len(first)

    def _at_rows(self, key: Any, call: Any, rows: Sequence[int]) -> Any:
        """Run some samples of a call.

        One alone runs twice where there may be a backward pass: torch's batch-norm (2.14, on the CPU) gives wrong
        gradients for a single sample whose gradient comes with its channels last, as attention's does.
        """
        if len(rows) > 1 or self.training or not torch.is_grad_enabled():
            return self.at(key, *self.rows.take(call, rows))
        twice = self.at(key, *self.rows.take(call, [*rows, *rows]))
        return tree_map(lambda leaf: leaf[:1] if isinstance(leaf, Tensor) else leaf, twice)

    def run_shell(
        self, shell: nn.Module, tensors: Mapping[str, Tensor], args: Any, kwargs: Any
    ) -> Any:
        """Run a shell with tensors: modes and constants are those of the full module."""
        dressed = self.dressed(_of_this_thread(shell))
        return functional_call(dressed, dict(tensors), args, kwargs, tie_weights=False)

    def dressed(self, shell: nn.Module) -> nn.Module:
        """A module without weights, with modes and constants as the full one has them."""
        pairs = zip(shell.modules(), self.full.modules(), self.given_settings, strict=True)
        for own, full, given in pairs:
            own.training = full.training
            for name, value in settings_of(full).items():
                # As set since; what has not changed, widths among it, is the shell's own.
                if name not in given or given[name] != value:
                    setattr(own, name, value)
            for name, tensor in plain_tensors(full).items():
                setattr(own, name, tensor)
        return shell

    def all_parts(self) -> dict[str, Tensor]:
        """Parameters and buffers of the full module."""
        named = [*self.full.named_parameters(remove_duplicate=False)]
        return dict([*named, *self.full.named_buffers(remove_duplicate=False)])

    def own_state(self) -> dict[str, Tensor]:
        """All that is not the module's own: statistics, means and readers of its widths, and who looks."""
        named = (*self.statistics.named_buffers(), *self.statistics.named_parameters())
        found = {f"statistics.{name}": tensor for name, tensor in named}
        if self.effort is not None:
            own = (*self.effort.named_parameters(), *self.effort.named_buffers())
            found |= {f"effort.{name}": tensor for name, tensor in own}
        return found


def _of_this_thread(shell: nn.Module) -> nn.Module:
    """A shell to run: while one does it holds tensors, which another thread must not see.

    No lock, because a model's own code may wait for another thread.
    """
    known = vars(_THREADS).setdefault("shells", WeakKeyDictionary())
    if shell not in known:
        known[shell] = copy.deepcopy(shell)
    found: nn.Module = known[shell]
    return found


def settings_of(module: nn.Module) -> dict[str, Any]:
    """Numbers, flags and texts that a module keeps as plain attributes."""
    return {
        name: value
        for name, value in vars(module).items()
        if name not in _OF_MODULES and name != "training" and isinstance(value, (int, float, str))
    }


def with_tensors(shell: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a module without weights, in eval mode, that holds these tensors themselves, views included."""
    made = copy.deepcopy(shell).eval()
    for name, tensor in tensors.items():
        owner = made.get_submodule(name.rpartition(".")[0])
        key = name.rpartition(".")[2]
        if key in owner._parameters:  # noqa: SLF001 - its store
            owner._parameters[key] = nn.Parameter(tensor.detach(), requires_grad=False)  # noqa: SLF001
        else:
            owner._buffers[key] = tensor  # noqa: SLF001
    return made


__all__ = ["AdaptiveBlock", "with_tensors"]
