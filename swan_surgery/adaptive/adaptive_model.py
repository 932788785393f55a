"""The adaptive model: an ordinary `nn.Module` whose blocks look at their input."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from swan_surgery.adaptive.block import NestedBlock
from swan_surgery.adaptive.costs import BlockCosts
from swan_surgery.adaptive.run import Execution, Levels, Run, begin
from swan_surgery.adaptive.statics import fixed
from swan_surgery.adaptive.structure import Structure
from swan_surgery.errors import InputError
from swan_surgery.models import copy_of


@dataclass(frozen=True, slots=True)
class Taken:
    """What a batch took.

    Attributes:
        output: of the model.
        levels: int64 (B, blocks); level 0 is the narrowest.
        macs: int64 (B,): MACs of every sample, exact.
        efforts: (B,) by block that looked.
    """

    output: Any
    levels: Tensor
    macs: Tensor
    efforts: Mapping[str, Tensor]


class AdaptiveModel(nn.Module):
    """A copy of the given model in which blocks give every sample a width of its own.

    Attributes:
        model: of the given class, with `NestedBlock`s in the place of its blocks.
        structure: what adapts, what stays static and why; `explain()` says it.
        costs: MACs per sample.
        execution: "group": samples of equal width run densely together; "masked": everything runs,
            and masks are multiplied (the reference; in training mode blocks always run in groups).
        max_macs: MACs that no sample may exceed; None without a ceiling.
        is_compact: whether `compact` made it.
    """

    is_compact: bool = False
    comes_last: ClassVar[str] = (
        "is adaptive already: gate, cut and swap the model first, then adapt it; adapted.at(width) and "
        "adapted.dense_model() give plain models"
    )

    def __init__(self, model: nn.Module, structure: Structure, costs: BlockCosts) -> None:
        super().__init__()
        self.model = model
        self.structure = structure
        self.costs = costs
        self.execution: Execution = "group"
        self.max_macs: int | None = None
        self._held: Mapping[str, Levels] = {}
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the given model's forward."""
        with begin(self.new_run()):
            return self.model(*args, **kwargs)

    def new_run(self) -> Run:
        """What the blocks of the next run will ask."""
        ceiling = None if self.max_macs is None else self.max_macs - self.costs.least
        if ceiling is not None and ceiling < 0:
            raise InputError(
                f"max_macs={self.max_macs:,} cannot be kept: the narrowest widths cost {self.costs.least:,} MACs"
            )
        return Run(self.execution, self._held, ceiling=ceiling)

    @property
    def widths(self) -> tuple[float, ...]:
        """Shares of the channels that a block may take, ascending; the last one is 1."""
        return self.structure.widths

    def blocks(self) -> dict[str, NestedBlock]:
        """The blocks that adapt, by name in the given model, in the order in which they run."""
        found = {m.name: m for m in self.model.modules() if isinstance(m, NestedBlock)}
        return {name: found[name] for name in self.costs.blocks}

    @contextmanager
    def holding(self, levels: Levels | Mapping[str, Levels]) -> Iterator["AdaptiveModel"]:
        """Inside, blocks take these levels and look at nothing.

        Args:
            levels: one for all samples and blocks (0 is the narrowest, -1 the full width), int64 of
                shape (B,) or (B, blocks), or a mapping from block names to any of the former two.

        Raises:
            InputError: no such level or block.

        Example:
            >>> with adapted.holding(0):  # doctest: +SKIP
            ...     narrowest = adapted(images)
        """
        before = self._held
        self._held = self._by_block(levels)
        try:
            yield self
        finally:
            self._held = before

    def _by_block(self, levels: Levels | Mapping[str, Levels]) -> Mapping[str, Levels]:
        names = list(self.costs.blocks)
        if isinstance(levels, Mapping):
            unknown = set(levels) - set(names)
            if unknown:
                raise InputError(f"{min(unknown)!r} is no adaptive block; there are {names}")
            return {name: self._checked(own) for name, own in levels.items()}
        if isinstance(levels, Tensor) and levels.ndim == 2:
            if levels.shape[1] != len(names):
                raise InputError(
                    f"levels {tuple(levels.shape)} are not one for each of {len(names)} blocks"
                )
            return {name: self._checked(levels[:, i]) for i, name in enumerate(names)}
        own = self._checked(levels)
        return dict.fromkeys(names, own)

    def _checked(self, levels: Levels) -> Levels:
        count = len(self.widths)
        if isinstance(levels, Tensor) and levels.ndim:
            inside = (
                not levels.is_floating_point()
                and levels.dtype is not torch.bool
                and bool(((levels >= 0) & (levels < count)).all())
            )
            if not inside or levels.ndim != 1:
                raise InputError(
                    f"levels must be whole numbers from 0 to {count - 1}, one per sample"
                )
            return levels.long()
        level = levels.item() if isinstance(levels, Tensor) else levels
        if type(level) is not int or not -count <= level < count:
            raise InputError(
                f"level {level!r} is none of the {count} widths {self.widths}: whole numbers from 0 to {count - 1} "
                f"(or -1), one for all or an int64 tensor with one per sample"
            )
        return level % count

    def taken(self, *args: Any, **kwargs: Any) -> Taken:
        """Run, and say which level every sample took in every block, and what it cost."""
        run = self.new_run()
        with begin(run):
            output = self.model(*args, **kwargs)
        count = self._count(run, args, kwargs)
        taken = {name: run.taken[name] for name in self.costs.blocks}
        rows = [torch.as_tensor(own).cpu().expand(count) for own in taken.values()]
        return Taken(output, torch.stack(rows, 1), self.costs.at(taken).expand(count), run.efforts)

    def _count(self, run: Run, args: Any, kwargs: Any) -> int:
        for own in run.taken.values():
            if isinstance(own, Tensor) and own.ndim:
                return len(own)
        first = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim)
        return len(first)

    def dense_model(self) -> nn.Module:
        """A copy of the given class at full width, with the weights as trained, channels in order."""
        return dense_of(copy_of(self.model))

    def at(self, width: float | Mapping[str, float]) -> nn.Module:
        """The static model at a width: a plain module of the given class that no longer looks.

        Computes what `holding` the level computes; `swan.save` and `swan.export` take it as any cut model.
        Readers of closed channels get a bias where they had none.

        Args:
            width: one of `widths`, for all blocks or by block name.

        Raises:
            InputError: no such width or block.

        Example:
            >>> small = adapted.at(0.5)  # doctest: +SKIP
        """
        names = list(self.costs.blocks)
        wanted = dict(width) if isinstance(width, Mapping) else dict.fromkeys(names, width)
        if set(wanted) != set(names):
            raise InputError(f"say the width of every block: {names}")
        levels = {}
        for name in names:
            if wanted[name] not in self.widths:
                raise InputError(f"width {wanted[name]} is none of {self.widths}")
            levels[name] = self.widths.index(wanted[name])
        parts = {name: block.parts(levels[name]) for name, block in self.blocks().items()}
        macs = int(self.costs.at(levels)) - self.costs.looking
        return fixed(
            self.dense_model(), self.structure, levels, parts, macs=(self.costs.dense, macs)
        )

    def explain(self) -> str:
        """Which blocks look at their input, over which channels, and why the rest stays static."""
        head = (
            f"{self.structure.kind}, per {self.structure.per}, widths "
            f"{', '.join(f'{width:g}' for width in self.widths)}; {self.costs.least:,} to "
            f"{self.costs.most:,} MACs per sample (given: {self.costs.dense:,})"
        )
        lines = [head]
        for name, own in self.costs.blocks.items():
            counts = [len(g.units) for g in self.structure.groups if g.block == name]
            shares = ", ".join(f"{int(macs):,}" for macs in own)
            lines.append(
                f"{name or '(the model)'}: {' + '.join(map(str, counts))} units, MACs {shares}"
            )
        lines += map(str, self.structure.static)
        return "\n".join(lines)

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"{len(self.costs.blocks)} blocks in widths {self.widths}, per {self.structure.per}"


def dense_of(model: nn.Module) -> nn.Module:
    """A private model with its blocks as they were, at full width."""
    if isinstance(model, NestedBlock):
        return model.full
    for name, module in list(model.named_modules()):
        if isinstance(module, NestedBlock):
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, module.full)
    return model


__all__ = ["AdaptiveModel", "Taken", "dense_of"]
