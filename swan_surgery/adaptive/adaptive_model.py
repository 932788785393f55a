"""The adaptive model: an ordinary `nn.Module` whose blocks look at their input."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from swan_surgery.adaptive.block import AdaptiveBlock
from swan_surgery.adaptive.costs import BlockCosts, UnitCosts
from swan_surgery.adaptive.run import Execution, Levels, Run, begin, beginning_anew
from swan_surgery.adaptive.statics import fixed
from swan_surgery.adaptive.structure import Structure
from swan_surgery.adaptive.token_choices import choices_of
from swan_surgery.errors import InputError
from swan_surgery.models import copy_of


@dataclass(frozen=True, slots=True)
class Taken:
    """What a batch took.

    Attributes:
        output: of the model.
        levels: int64 (B, blocks); level 0 is the narrowest. Of free units their masks, bool (B, units); of blocks
            of neurons the share of the sample's tokens that run each, float64 (B, blocks of all layers).
        macs: int64 (B,): MACs of every sample, exact.
        efforts: (B,) by block that looked; of free units their logits, (B, units), of tokens (tokens, blocks).
        choices: what each block took: levels, or masks (with gradients where there are any).
    """

    output: Any
    levels: Tensor
    macs: Tensor
    efforts: Mapping[str, Tensor]
    choices: Mapping[str, Levels]


class AdaptiveModel(nn.Module):
    """A copy of the given model in which blocks give every sample a width, or units, of its own.

    Attributes:
        model: of the given class, with `AdaptiveBlock`s in the place of its blocks.
        structure: what adapts, what stays static and why; `explain()` says it.
        costs: MACs per sample.
        execution: "group": samples of equal width run densely together; "masked": everything runs,
            and masks are multiplied (the reference; efforts of nested widths learn under it);
            "gather", of free units: samples with the same mask run on sliced weights (in training mode masked).
            Of blocks of neurons "group": each runs the tokens that have it open (in training mode masked).
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
        self.choices = choices_of(structure)
        self._least = costs.least  # a number while a graph is traced, too
        self._execution: Execution = "group" if structure.kind == "nested" else "masked"
        self.max_macs: int | None = None
        self._held: Mapping[str, Levels] = {}
        self.training = model.training

    @property
    def calibrated_by(self) -> str | None:
        """What `swan.calibrate` says of it, which knows one set of statistics for all widths."""
        if self.structure.kind != "nested":
            return None
        return "swan.calibrate_widths(adapted, batches) measures those of every width (full=True: of the widest too)"

    @property
    def execution(self) -> Execution:
        """How blocks run their samples."""
        return self._execution

    @execution.setter
    def execution(self, execution: Execution) -> None:
        if execution not in get_args(Execution):
            known = ", ".join(map(repr, get_args(Execution)))
            raise InputError(f"execution must be one of {known}; got {execution!r}")
        self._execution = execution

    def exports_not(self, suffix: str) -> str | None:
        """Why `swan.export` cannot take it as it is to a file of this kind, if so."""
        if self.max_macs is not None and isinstance(self.costs, UnitCosts):
            return "what max_macs closes is searched for on data: set adapted.max_macs = None to export it"
        if self.execution == "masked":
            return None
        if self.execution == "group" and suffix == ".onnx":
            return None
        return (
            f"which samples run together ({self.execution!r}) is decided on data, which {suffix} cannot hold: export "
            f'swan.compact(adapted, execution="masked"), or a static model, adapted.at(...)'
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the given model's forward."""
        with begin(self.new_run(args, kwargs)):
            return self.model(*args, **kwargs)

    @contextmanager
    def acting(self) -> Iterator[nn.Module]:
        """Inside, the blocks of `model` look at their inputs in other methods than `forward` too.

        Every call of the model that such a method makes decides anew, as calls of this one do.

        Example:
            >>> with adapted.acting() as model:  # doctest: +SKIP
            ...     model.generate(input_ids)
        """
        with beginning_anew(self.model, self.new_run):
            yield self.model

    def new_run(self, args: Any = (), kwargs: Any = None) -> Run:
        """What the blocks will ask while the model runs on these arguments."""
        ceiling = None if self.max_macs is None else self.max_macs - self._least
        if ceiling is not None and not ceiling >= 0:
            raise InputError(
                f"max_macs={self.max_macs:,} cannot be kept: the narrowest widths cost {self._least:,} MACs"
            )
        above = self.costs.above_least if isinstance(self.costs, UnitCosts) else None
        samples = _samples(args, kwargs or {})
        return Run(self.execution, self._held, ceiling=ceiling, extra=above, samples=samples)

    @property
    def widths(self) -> tuple[float, ...]:
        """Shares of the channels that a block may take, ascending; the last one is 1. Free units have none."""
        return self.structure.widths

    def blocks(self) -> dict[str, AdaptiveBlock]:
        """The blocks that adapt, by name in the given model, in the order in which they run."""
        found = {m.name: m for m in self.model.modules() if isinstance(m, AdaptiveBlock)}
        return {name: found[name] for name in self.costs.blocks}

    @property
    def is_holding(self) -> bool:
        """Whether it is inside of `holding`: some blocks do not look."""
        return bool(self._held)

    @contextmanager
    def holding(self, levels: Levels | Mapping[str, Levels]) -> Iterator["AdaptiveModel"]:
        """Inside, blocks take these levels and look at nothing.

        Args:
            levels: one for all samples and blocks (0 is the narrowest, -1 the full width), int64 of
                shape (B,) or (B, blocks), or a mapping from block names to any of the former two.
                Of free units masks, bool of shape (units,) or (B, units) of all blocks one after the other
                or by block name, or -1 with all open; at least one unit of each group is open. Of blocks of
                neurons the same of the blocks of each layer, by layer name also with a row per token.

        Raises:
            InputError: no such level, mask or block.

        Example:
            >>> with adapted.holding(0):  # doctest: +SKIP
            ...     narrowest = adapted(images)
        """
        before = self._held
        self._held = self.choices.by_block(levels)
        try:
            yield self
        finally:
            self._held = before

    def taken(self, *args: Any, **kwargs: Any) -> Taken:
        """Run, and say which level every sample took in every block, and what it cost."""
        run = self.new_run(args, kwargs)
        with begin(run):
            output = self.model(*args, **kwargs)
        count = self._count(run, args, kwargs)
        taken = {name: run.taken[name] for name in self.costs.blocks}
        levels = self.choices.joined(taken, count)
        return Taken(output, levels, self.costs.at(taken).expand(count), run.efforts, taken)

    def _count(self, run: Run, args: Any, kwargs: Any) -> int:
        blocks = self.blocks()
        for name, own in run.taken.items():
            if isinstance(own, Tensor) and blocks[name].is_by_sample(own):
                return len(own)
        count = _samples(args, kwargs)
        assert count is not None  # noqa: S101 - it ran on samples
        return count

    def dense_model(self) -> nn.Module:
        """A copy of the given class at full width, with the weights as trained, channels in order."""
        return dense_of(copy_of(self.model))

    def at(self, width: float | Mapping[str, float] | Tensor | Mapping[str, Tensor]) -> nn.Module:
        """The static model at a width: a plain module of the given class that no longer looks.

        Computes what `holding` the level computes; `swan.save` and `swan.export` take it as any cut model.
        Readers of closed channels get a bias where they had none.

        Args:
            width: one of `widths`, for all blocks or by block name. Of free units (blocks of neurons) a mask,
                bool (units,) of all blocks one after the other, or by block name.

        Raises:
            InputError: no such width, mask or block.

        Example:
            >>> small = adapted.at(0.5)  # doctest: +SKIP
        """
        chosen, mask = self.choices.static(width)
        keys = {name: own.keys(chosen[name]) for name, own in self.blocks().items()}
        parts = {name: own.parts(keys[name]) for name, own in self.blocks().items()}
        readers = [r for name, own in self.blocks().items() for r in own.own_readers(keys[name])]
        macs = (self.costs.dense, int(self.costs.at(chosen)) - self.costs.looking)
        return fixed(
            self.dense_model(), self.structure, mask, parts, macs=macs, own_readers=readers
        )

    def explain(self) -> str:
        """Which blocks look at their input, over which channels, and why the rest stays static."""
        kinds = ", ".join(f"{width:g}" for width in self.widths)
        chosen = "blocks of neurons by token" if self.structure.sizes else "units at choice"
        widths = f"widths {kinds}" if self.widths else chosen
        head = (
            f"{self.structure.kind}, per {self.structure.per}, {widths}; {self.costs.least:,} to "
            f"{self.costs.most:,} MACs per sample (given: {self.costs.dense:,})"
        )
        lines = [head]
        for name, own in self.costs.blocks.items():
            counts = [len(g.units) for g in self.structure.groups if g.block == name]
            shares = (", " if self.widths else " to ").join(f"{int(macs):,}" for macs in own)
            lines.append(
                f"{name or '(the model)'}: {' + '.join(map(str, counts))} units, MACs {shares}"
            )
        lines += map(str, self.structure.static)
        blocks = self.blocks().values()
        count = sum(own.numel() for block in blocks for own in block.statistics.parameters())
        if count:
            lines.append(f"readers of widths by themselves: {count:,} parameters more than given")
        return "\n".join(lines)

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        chosen = "of neurons by token" if self.structure.sizes else "of free units"
        kinds = f"in widths {self.widths}" if self.widths else chosen
        return f"{len(self.costs.blocks)} blocks {kinds}, per {self.structure.per}"


def _samples(args: Any, kwargs: Mapping[str, Any]) -> int | None:
    """The length of the first tensor's first axis; not its `len`, which would fix it in an export."""
    tensors = (v for v in tree_leaves((args, dict(kwargs))) if isinstance(v, Tensor) and v.ndim)
    return next((own.shape[0] for own in tensors), None)


def dense_of(model: nn.Module) -> nn.Module:
    """A private model with its blocks as they were, at full width."""
    if isinstance(model, AdaptiveBlock):
        return model.full
    for name, module in list(model.named_modules()):
        if isinstance(module, AdaptiveBlock):
            model.set_submodule(name, module.full)
    return model


__all__ = ["AdaptiveModel", "Taken", "dense_of"]
