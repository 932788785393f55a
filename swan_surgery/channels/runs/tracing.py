"""Runs a model once under a dispatch mode that lets the labels ride along."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from swan_surgery.calls.arguments import leaves_of
from swan_surgery.channels.labels.fields import Fields
from swan_surgery.channels.labels.labels import Labels
from swan_surgery.channels.labels.makers import Makers
from swan_surgery.channels.labels.recording import (
    Call,
    ModuleRun,
    OpRecord,
    Reason,
    Recording,
)
from swan_surgery.channels.rules import (  # noqa: F401
    contraction,
    deformable,
    mixing,
    movement,
    recurrence,
    scattering,
)
from swan_surgery.channels.rules.pointwise import pointwise
from swan_surgery.channels.rules.registry import facts_of, pin_inputs
from swan_surgery.channels.runs.control_flow import control_flow_joined
from swan_surgery.channels.runs.frames import FrameMode
from swan_surgery.channels.runs.planning import depends_on_values, run_op, selects_by_values
from swan_surgery.channels.runs.source_lines import calling_line
from swan_surgery.environment.process_wide import (
    attention_in_products,
    without_fast_path,
    without_warnings,
)
from swan_surgery.environment.random_streams import pythons_kept, streams_kept
from swan_surgery.models.outputs import iter_named_tensors
from swan_surgery.models.tensors import named_tensors


class LabelMode(TorchDispatchMode):
    """Applies the rule of every ATen operation to the labels of its tensors."""

    def __init__(self, labels: Labels) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.labels = labels
        self.makers = Makers()
        self.frames = FrameMode(labels, self.makers)
        self.is_paused = False
        self._running: list[ModuleRun] = []

    @property
    def module(self) -> str:
        """The dotted name of the module that is running."""
        return self.frames.numbering.runs[-1][0]

    def enter(self, module: str) -> None:
        """A module starts to run."""
        self.frames.numbering.enter(module)
        run = ModuleRun(module, len(self.labels.recording.ops))
        self.labels.recording.runs.append(run)
        self._running.append(run)

    def leave(self, out: Any) -> None:
        """The innermost module has run."""
        self.frames.numbering.leave()
        run = self._running.pop()
        run.end = len(self.labels.recording.ops)
        run.returned = self.makers.returned(out)

    def __torch_dispatch__(
        self,
        op: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation, then its rule."""
        if self.is_paused:
            return op(*args, **(kwargs or {}))
        return self.step(op, args, kwargs or {})

    def step_whole(self, op: Any, args: Any, kwargs: Any) -> Any:
        """One step that torch would take apart: none of its parts is a step of the run."""
        self.is_paused = True
        try:
            return self.step(op, args, kwargs)
        finally:
            self.is_paused = False

    def step(self, op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation of the model, then its rule."""
        facts = facts_of(op)
        if not facts.is_step:
            twin = self.labels.twin(args[0], op(*args, **kwargs), op.is_view)
            self.makers.note_twin(args[0], twin)
            return twin
        leaves = tuple(leaves_of((args, kwargs)))
        inputs = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        self.labels.used.update(map(id, inputs))
        record = OpRecord(
            str(op), self.module, tuple(self.labels.fields(tensor) for tensor in inputs)
        )
        record.frame = self.labels.frame
        record.is_pointwise = facts.rule is pointwise
        if facts.fixes_numbers:
            record.numbers = tuple(leaf for leaf in leaves if isinstance(leaf, (int, float)))
        record.values = _values(record, inputs)
        self.labels.recording.ops.append(record)
        return self.dispatch(record, inputs, op, args, kwargs)

    def run(self, op: Any, inputs: tuple[Tensor, ...], args: Any, kwargs: Any) -> Any:
        """Run one operation."""
        return run_op(op, inputs, args, kwargs)

    def dispatch(
        self,
        record: OpRecord,
        inputs: tuple[Tensor, ...],
        op: Any,
        args: Any,
        kwargs: Any,
    ) -> Any:
        """Run the operation, then its rule, and complete the record."""
        out = self.run(op, inputs, args, kwargs)
        if depends_on_values(op, inputs):
            record.by_value = (out,)
        self.labels.recording.selects |= selects_by_values(op, inputs)
        leaves, spec = tree_flatten(out)
        outputs = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        index = len(self.labels.recording.ops) - 1
        if inputs and all(self.labels.is_derived(tensor) for tensor in inputs):
            for tensor in outputs:
                self.labels.mark_derived(tensor)
        self.apply_rule(Call(index, op, args, kwargs, inputs, outputs, self.module))
        record.outputs = tuple(self.labels.fields(tensor) for tensor in outputs)
        record.shapes = tuple(tuple(tensor.shape) for tensor in outputs)
        for place, tensor in enumerate(outputs):
            if not record.outputs[place] and self.labels.is_harmless(tensor):
                self.labels.note_made(tensor, record, place)
        record.dtypes = tuple(tensor.dtype for tensor in outputs)
        record.spec = spec if len(leaves) == len(outputs) else None
        self.makers.note(outputs, index)
        return out

    def apply_rule(self, call: Call) -> None:
        """Look the operation up and apply its rule; unknown operations pin what they touch."""
        rule = facts_of(call.op).rule
        if rule is not None:
            rule(call, self.labels)
        if _draws(call):
            self.labels.draw(call)
        self._note_writing(call, is_known=rule is not None)
        if rule is None and any(self.labels.fields(tensor) for tensor in call.inputs):
            pin_inputs(call, self.labels, "an operation without a channel rule")
            line = calling_line(run_labelled.__code__)
            self.labels.recording.unknown.append(
                Reason("an operation without a channel rule", call.name, call.module, line)
            )

    def _note_writing(self, call: Call, *, is_known: bool) -> None:
        """What is written into is constant no more, unless a rule says so of all its memory."""
        labels = self.labels
        for tensor in call.outputs:
            if not any(tensor is given for given in call.inputs):
                continue
            is_whole = labels.root(tensor).numel() == tensor.numel()
            if not is_known or not (is_whole and labels.is_harmless(tensor)):
                labels.spoil(tensor)


def _draws(call: Call) -> bool:
    """Whether an operation draws random values: one that trains or drops out only if it is told to."""
    if torch.Tag.nondeterministic_seeded not in call.op.tags:
        return False
    return all(bool(call.arg(name, default=True)) for name in ("train", "training", "dropout_p"))


# Of more elements, what meets channels is a mask or a table, and no width.
_SMALL = 64


def _values(record: OpRecord, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Small tensors that hold values on a shell and meet channels: they must not follow a width."""
    on_shell = any(tensor.is_meta for tensor in inputs)
    if not (on_shell and record.is_pointwise and any(record.inputs)):
        return ()
    return tuple(
        tensor.clone()
        for tensor, fields in zip(inputs, record.inputs, strict=True)
        if not tensor.is_meta and not fields and tensor.numel() <= _SMALL
    )


def label_tensors(labels: Labels, model: nn.Module, fields: Mapping[str, Fields]) -> None:
    """Give every tensor of a model its starting fields, by name."""
    for name, tensor in named_tensors(model):
        if name in fields:
            labels.assign(tensor, fields[name])
        if isinstance(tensor, nn.Parameter):
            labels.mark_bare(tensor)
        labels.mark_derived(tensor)


def run_labelled(
    mode: LabelMode,
    model: nn.Module,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Run `function` under the mode, with the running module's name kept up to date.

    `function` is the model itself or something that runs it (an fx interpreter). The model must be
    a private copy: hooks are put on it, and removed again. The fused attention paths, which hide
    all their operations, are off meanwhile.
    """
    handles = [
        handle
        for name, module in model.named_modules()
        for handle in (
            module.register_forward_pre_hook(_entering(mode, name)),
            module.register_forward_hook(_leaving(mode), always_call=True),
        )
    ]
    mode.frames.step = mode.step_whole
    try:
        with (
            without_warnings(),  # the model's own are for its own runs
            without_fast_path(),
            streams_kept(),
            pythons_kept(),
            torch.no_grad(),
            attention_in_products(),
            control_flow_joined(),
            mode,
            mode.frames,
        ):
            return function(*args, **kwargs)
    finally:
        mode.frames.step = None  # a cycle, while garbage collection is paused
        for handle in handles:
            handle.remove()


def _entering(mode: LabelMode, name: str) -> Callable[[nn.Module, Any], None]:
    def hook(_module: nn.Module, _args: Any) -> None:
        mode.enter(name)

    return hook


def _leaving(mode: LabelMode) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, _args: Any, out: Any) -> None:
        mode.leave(out)

    return hook


def pin_outputs(labels: Labels, output: Any, free: Sequence[str] = ()) -> None:
    """What a model returns keeps its width, but for the outputs that the user gave up."""
    for name, tensor in iter_named_tensors(output):
        is_free = any(fnmatch.fnmatchcase(name, pattern) for pattern in free)
        fields = labels.fields(tensor)
        labels.recording.returned.append((name, fields if is_free else None))
        for field in () if is_free else fields:
            labels.pin_because(field, Reason("part of the model's output", "output", ""))


__all__ = [
    "LabelMode",
    "Recording",
    "label_tensors",
    "pin_outputs",
    "run_labelled",
]
