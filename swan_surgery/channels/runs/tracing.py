"""Runs a model once under a dispatch mode that lets the labels ride along."""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves

from swan_surgery.calls.arguments import numbers_of
from swan_surgery.calls.functions import FUNCTIONS, LEAVING
from swan_surgery.calls.mode import Called, NumberingMode
from swan_surgery.channels.labels.fields import Fields
from swan_surgery.channels.labels.labels import Labels
from swan_surgery.channels.labels.recording import Call, Frame, OpRecord, Reason, Recording
from swan_surgery.channels.rules import contraction, mixing, movement  # noqa: F401
from swan_surgery.channels.rules.pointwise import pointwise
from swan_surgery.channels.rules.registry import facts_of, pin_inputs
from swan_surgery.channels.runs.control_flow import control_flow_joined
from swan_surgery.channels.runs.planning import depends_on_values, run_op
from swan_surgery.channels.runs.source_lines import calling_line
from swan_surgery.models.outputs import iter_tensors


class FrameMode(NumberingMode):
    """Tells the labels which torch function is running, if it can be weighted or resized."""

    def __init__(self, labels: Labels) -> None:
        super().__init__(frozenset(FUNCTIONS) | LEAVING)
        self.labels = labels
        self.recover: Callable[[Frame], Any] | None = None
        self.left: Iterator[Any] | None = None

    def _leaving(self, func: Any, args: Any, kwargs: dict[str, Any], module: str) -> Any:
        """Values that go on as plain numbers: nobody sees where, so their channels stay.

        A rehearsal gives the values of the recording: those of a narrower model are others.
        """
        labels = self.labels
        why = Reason("their values leave torch", func.__name__, module)
        with _disable_current_modes():  # no operation of ours belongs to the run
            for tensor in _tensors((args, kwargs)):
                for field in labels.fields(tensor):
                    labels.pin_because(field, why)
        values = func(*args, **kwargs)
        known = next(self.left, None) if self.left is not None else None
        if known is not None and np.shape(known) == np.shape(values):
            return copy.deepcopy(known)
        labels.recording.left.append(copy.deepcopy(values))
        return values

    def around(self, func: Any, args: Any, kwargs: dict[str, Any], called: Called) -> Any:
        """Run the call inside its frame."""
        if called.function in LEAVING:
            return self._leaving(func, args, kwargs, called.module)
        leaves = numbers_of(args, kwargs)
        frame = Frame(called.module, called.function, called.number, leaves, called.site)
        self.labels.frame = frame
        try:
            return func(*args, **kwargs)
        except (RuntimeError, ValueError, IndexError):
            if self.recover is None:
                raise
            return self.recover(frame)
        finally:
            self.labels.frame = None


class LabelMode(TorchDispatchMode):
    """Applies the rule of every ATen operation to the labels of its tensors."""

    def __init__(self, labels: Labels) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.labels = labels
        self.frames = FrameMode(labels)
        self.is_paused = False

    @property
    def module(self) -> str:
        """The dotted name of the module that is running."""
        return self.frames.numbering.runs[-1][0]

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
        facts = facts_of(op)
        if not facts.is_step:
            return self.labels.twin(args[0], op(*args, **(kwargs or {})), op.is_view)
        inputs = _tensors((args, kwargs or {}))
        self.labels.used.update(map(id, inputs))
        record = OpRecord(
            str(op), self.module, tuple(self.labels.fields(tensor) for tensor in inputs)
        )
        record.frame = self.labels.frame
        record.is_pointwise = facts.rule is pointwise
        if facts.fixes_numbers:
            record.numbers = tuple(
                leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, (int, float))
            )
        record.values = self._values(record, inputs)
        self.labels.recording.ops.append(record)
        return self.dispatch(record, inputs, op, args, kwargs or {})

    def _values(self, record: OpRecord, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Small tensors that hold values on a shell and meet channels: they must not follow a width."""
        on_shell = any(tensor.is_meta for tensor in inputs)
        if not (on_shell and record.is_pointwise and any(record.inputs)):
            return ()
        return tuple(
            tensor.clone()
            for tensor, fields in zip(inputs, record.inputs, strict=True)
            if not tensor.is_meta and not fields and tensor.numel() <= _SMALL
        )

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
        leaves, spec = tree_flatten(out)
        outputs = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        index = len(self.labels.recording.ops) - 1
        if inputs and all(self.labels.is_derived(tensor) for tensor in inputs):
            for tensor in outputs:
                self.labels.mark_derived(tensor)
        self.apply_rule(Call(index, op, args, kwargs, inputs, outputs, self.module))
        record.outputs = tuple(self.labels.fields(tensor) for tensor in outputs)
        record.shapes = tuple(tuple(tensor.shape) for tensor in outputs)
        record.dtypes = tuple(tensor.dtype for tensor in outputs)
        record.spec = spec if len(leaves) == len(outputs) else None
        return out

    def apply_rule(self, call: Call) -> None:
        """Look the operation up and apply its rule; unknown operations pin what they touch."""
        rule = facts_of(call.op).rule
        if rule is not None:
            rule(call, self.labels)
        if torch.Tag.nondeterministic_seeded in call.op.tags:
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


# Of more elements, what meets channels is a mask or a table, and no width.
_SMALL = 64


def _tensors(tree: Any) -> tuple[Tensor, ...]:
    return tuple(leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def label_tensors(labels: Labels, model: nn.Module, fields: Mapping[str, Fields]) -> None:
    """Give every parameter and buffer of a model its starting fields, by name."""
    for name, tensor in named_tensors(model):
        if name in fields:
            labels.assign(tensor, fields[name])
        if isinstance(tensor, nn.Parameter):
            labels.mark_bare(tensor)
        labels.mark_derived(tensor)


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters then buffers with their names; a tied tensor once, under its first name."""
    return [*model.named_parameters(), *model.named_buffers()]


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
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            warnings.catch_warnings(),
            torch.random.fork_rng(),
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            control_flow_joined(),
            mode,
            mode.frames,
        ):
            warnings.simplefilter("ignore")  # the model's own warnings are for its own runs
            return function(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for handle in handles:
            handle.remove()


def _entering(mode: LabelMode, name: str) -> Callable[[nn.Module, Any], None]:
    def hook(_module: nn.Module, _args: Any) -> None:
        mode.frames.numbering.enter(name)

    return hook


def _leaving(mode: LabelMode) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, _args: Any, _out: Any) -> None:
        mode.frames.numbering.leave()

    return hook


def pin_outputs(labels: Labels, output: Any) -> None:
    """What a model returns keeps its width."""
    for tensor in iter_tensors(output):
        for field in labels.fields(tensor):
            labels.pin_because(field, Reason("part of the model's output", "output", ""))


__all__ = [
    "LabelMode",
    "Recording",
    "label_tensors",
    "named_tensors",
    "pin_outputs",
    "run_labelled",
]
