"""A block whose samples open units of their own: those with the same mask run on sliced weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from swan_surgery.adaptive.block import AdaptiveBlock
from swan_surgery.adaptive.levels import LevelStatistics, mean_outputs
from swan_surgery.adaptive.masked import Observer, masking
from swan_surgery.adaptive.matrices import is_turned, matrix_of
from swan_surgery.adaptive.rows import Rows
from swan_surgery.adaptive.run import Levels, Run
from swan_surgery.adaptive.unit_gates import UnitGates
from swan_surgery.adaptive.units import GroupUnits, Shells, places_of


class FreeBlock(AdaptiveBlock):
    """A module of the given model with a gate per inner unit and sample.

    Attributes:
        statistics: one entry: the means of all units, for whoever closes them.
        effort: the gates.
        groups: which units there are.
        shells: the module with any number of them.
        bound: what each input of a reader adds to its outputs on average, once `compact` has computed it.
        capped: masks of the last run that may have a backward pass, where it had a ceiling.
    """

    def __init__(
        self,
        name: str,
        full: nn.Module,
        shells: Shells,
        groups: Sequence[GroupUnits],
        *,
        effort: UnitGates,
        rows: Rows,
        channels_last: bool,
    ) -> None:
        readers = [reader for group in groups for reader in group.readers]
        super().__init__(
            name,
            full,
            [LevelStatistics(full, readers)],
            effort=effort,
            rows=rows,
            channels_last=channels_last,
        )
        self.groups = tuple(groups)
        self.shells = shells
        self.bound: dict[str, Tensor] | None = None
        self.capped: Tensor | None = None

    def bind(self) -> None:
        """Compute once what the mean of each unit gives, for weights and means that stay."""
        readers = [reader for group in self.groups for reader in group.readers]
        self.bound = {reader: self._mean_outputs(reader) for reader in readers}

    def is_masked(self, execution: str | None) -> bool:
        """Always, but for gathers in eval mode: while training, gates need all units."""
        return execution != "gather" or self.training

    def masked(self, choice: Levels, observer: Observer | None) -> Any:
        """Every sample has a mask of its own, and all share the means."""
        assert isinstance(choice, Tensor)  # noqa: S101 - masks are
        choice = choice.to(self.effort.weight.device)
        rows = choice if choice.ndim == 2 else choice[None]
        kinds: Levels = torch.arange(rows.shape[0], device=rows.device) if choice.ndim == 2 else 0
        masks = {
            reader: rows[:, group.start : group.stop].repeat_interleave(run, dim=1)
            for group in self.groups
            for reader, run in zip(group.readers, group.runs, strict=True)
        }
        statistics: Any = self.statistics
        return masking(self.full, masks, statistics, kinds, levels=0, observer=observer)

    @staticmethod
    def is_by_sample(choice: Levels) -> bool:
        """Masks have one row per sample, or are one for all."""
        return isinstance(choice, Tensor) and choice.ndim == 2

    def keys(self, choice: Levels) -> Any:
        """The mask as bytes."""
        assert isinstance(choice, Tensor)  # noqa: S101 - masks are
        rows = choice.detach().to(torch.uint8).tolist()
        return [bytes(row) for row in rows] if choice.ndim == 2 else bytes(rows)

    def look(self, run: Run, call: Any) -> Levels:
        """By the gates, at the input; under the run's ceiling."""
        logits = self._logits(call)
        run.efforts[self.name] = logits.flatten(0, -2)
        hard = self.effort.hard(logits)
        if run.ceiling is not None:
            hard = run.capped_masks(self.name, hard, logits, self.effort.least(logits))
        masks: Tensor = self.effort.with_gradients(hard, logits)
        return masks

    def _logits(self, call: Any) -> Tensor:
        """Of the gates: [B, ..., units]."""
        logits: Tensor = self.effort(self.features(call))
        return logits

    def remembered(self, choice: Levels, run: Run | None) -> Levels:
        """Masks that somebody held, or that others' left to take; else that it looked, which it can again."""
        held = None if run is None else run.held.get(self.name)
        self.capped = None
        if isinstance(held, Tensor):
            return held if held.is_leaf else held.detach()
        if run is not None and run.ceiling is not None and isinstance(choice, Tensor):
            self.capped = choice.detach().bool()  # without the graph that it may hold
        return _LOOKED

    def recalled(self, last: Levels, call: Any) -> Levels:
        """Looked at again, with gradients of its own."""
        if isinstance(last, Tensor):
            return last
        if self.capped is None:
            return self.look(Run("masked"), call)
        masks: Tensor = self.effort.with_gradients(self.capped, self._logits(call))
        return masks

    def at(self, key: bytes | None, args: Any, kwargs: Any) -> Any:
        """Under one mask; None: no sample."""
        if key is None or all(key):
            return self.full(*args, **kwargs)
        counts = tuple(sum(key[group.start : group.stop]) for group in self.groups)
        return self.run_shell(self.shells.of(counts), self.parts(key), args, kwargs)

    def parts(self, key: bytes) -> dict[str, Tensor]:
        """Slices of the weights, and the mean of what is closed in the biases of its readers."""
        whole = self.all_parts()
        device = next(iter(whole.values())).device
        mask = torch.tensor(list(key), dtype=torch.bool, device=device)
        found, rows = dict(whole), {}
        readers = [reader for group in self.groups for reader in group.readers]
        turned = {f"{name}.weight" for name in readers if is_turned(self.full.get_submodule(name))}
        for group in self.groups:
            is_open = mask[group.start : group.stop]
            if bool(is_open.all()):
                continue
            for own in group.axes:
                places = places_of(is_open, own.run)
                found[own.tensor] = found[own.tensor].index_select(own.axis, places)
                if own.axis == 0 and own.tensor not in turned:
                    rows[own.tensor] = places
        for group in self.groups:
            for reader, run in zip(group.readers, group.runs, strict=True):
                closed = places_of(~mask[group.start : group.stop], run)
                weight, bias = (f"{reader}.{own}" if reader else own for own in _OF_LAYER)
                added = (self.bound or {}).get(reader)
                added = self._mean_outputs(reader) if added is None else added
                added = added.index_select(1, closed).sum(1)
                if weight in rows:
                    added = added.index_select(0, rows[weight])
                found[bias] = found[bias] + added if bias in found else added
        return found

    def _mean_outputs(self, reader: str) -> Tensor:
        (statistics,) = self.statistics
        assert isinstance(statistics, LevelStatistics)  # noqa: S101 - made so
        return mean_outputs(matrix_of(self.full.get_submodule(reader)), statistics.mean(reader))

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"{' + '.join(str(len(group.units)) for group in self.groups)} units"


_LOOKED = -1
_OF_LAYER = ("weight", "bias")


__all__ = ["FreeBlock"]
