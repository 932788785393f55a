"""Counts multiply-adds as a model runs: MACs per module, and the operations without a formula.

Every ATen operation of one real run is priced by the shapes that enter and leave it. So what runs has a
count, whatever Python, autograd functions or checkpoints are around it, and what nobody reads counts
too: it runs. The channel map prices operations on its own; this is what certifies it.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from swan_surgery.channels.rules.registry import facts_of
from swan_surgery.costs.formulas import FORMULAS
from swan_surgery.environment.process_wide import (
    attention_in_products,
    without_fast_path,
    without_warnings,
)
from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import InputError
from swan_surgery.gates import GatedModel
from swan_surgery.models import copy_of
from swan_surgery.models.checks import check_is_module, checked_inputs, described


@dataclass(frozen=True, slots=True)
class OperatorCounts:
    """What was found in one forward pass.

    Attributes:
        macs: of every module that multiplies by dotted name, children included; `""` is the whole model.
        calls: MACs of every product that a module itself runs, in order; children are not included.
        uncounted: number of calls of each operation without a formula that is not pointwise.
    """

    macs: Mapping[str, int]
    calls: Mapping[str, tuple[int, ...]]
    uncounted: Mapping[str, int]


def count_operators(model: nn.Module, example_inputs: Any) -> OperatorCounts:
    """Count one forward pass in eval mode, on a copy; of a gated model the base model.

    Raises:
        ModelError: not an `nn.Module`, or on the meta device.
        InputError: the model cannot be run on the inputs.
    """
    check_is_module(model)
    base = model.model if isinstance(model, GatedModel) else model
    inputs = checked_inputs(base, example_inputs, to="count MACs")
    mode = _CountingMode()
    copy = copy_of(base).eval()
    try:
        with _as_it_runs(copy, mode), mode, _EinsumMode(mode):
            inputs.run(copy)
    except Exception as err:  # the model's own code may raise anything
        first = str(err).splitlines()[0] if str(err) else ""
        raise InputError(
            f"MACs of {type(base).__name__} cannot be counted on {described(inputs)}, because it "
            f"cannot be run on them: {first}"
        ) from err
    calls = {name: tuple(own) for name, own in mode.calls.items()}
    return OperatorCounts(_with_children(calls, mode.entered), calls, dict(mode.uncounted))


def _with_children(
    calls: Mapping[str, tuple[int, ...]], entered: Mapping[str, None]
) -> Mapping[str, int]:
    """MACs of every module that ran, and of all that stand above it."""
    totals: dict[str, int] = dict.fromkeys(("", *entered), 0)
    for name, own in calls.items():
        parts = name.split(".") if name else []
        for end in range(len(parts) + 1):
            above = ".".join(parts[:end])
            totals[above] = totals.get(above, 0) + sum(own)
    return totals


class _CountingMode(TorchDispatchMode):
    """Prices every operation where it runs: `running` holds the names of the modules that do."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.running = [""]
        self.entered: dict[str, None] = {}
        self.calls: dict[str, list[int]] = defaultdict(list)
        self.uncounted: Counter[str] = Counter()
        self.is_paused = False
        # Of an einsum, whose first one counts however torch computes it.
        self.awaits_product = False

    def __torch_dispatch__(
        self,
        op: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation and note what it costs."""
        kwargs = kwargs or {}
        if self.is_paused:
            return op(*args, **kwargs)
        if isinstance(op, torch._ops.OpOverload) and not _is_priced(op):  # noqa: SLF001 - as below
            with (
                self
            ):  # what a model runs in inference mode comes in one piece: its parts are priced
                parts = op.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = op(*args, **kwargs)
        if not isinstance(op, torch._ops.OpOverload):  # noqa: SLF001 - an operation over functions
            self.uncounted[f"higher_order::{op.name()}"] += 1
            return out
        facts, own = facts_of(op), FORMULAS.get(str(op.overloadpacket))
        if facts.macs is not None:
            macs = facts.macs(_shapes((args, kwargs)), _shapes(out))
        elif own is not None:
            macs = own(args, out)
        elif self.awaits_product and op is torch.ops.aten.mul.Tensor:
            macs = out.numel()
        else:
            moves = op.is_view or facts.is_reshape or not facts.is_step
            if not moves and torch.Tag.pointwise not in op.tags and _computes(args, out):
                self.uncounted[op.name().partition(".")[0]] += 1
            return out
        self.awaits_product = False
        self.calls[self.running[-1]].append(macs)
        return out


class _EinsumMode(TorchFunctionMode):
    """Prices an einsum of two operands as written: at a width of one torch takes another way, without products.

    Of several operands each product counts as it runs, but the first in any case: as in the channel map.
    """

    def __init__(self, counting: _CountingMode) -> None:
        super().__init__()
        self.counting = counting

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the function; of an einsum note the product of all its sizes instead of what it runs."""
        kwargs = kwargs or {}
        counting = self.counting
        macs = _einsum_macs(args) if func is torch.einsum and not counting.is_paused else None
        if macs is None:
            counting.awaits_product = func is torch.einsum
            try:
                return func(*args, **kwargs)
            finally:
                counting.awaits_product = False
        counting.is_paused = True
        try:
            out = func(*args, **kwargs)
        finally:
            counting.is_paused = False
        counting.calls[counting.running[-1]].append(macs)
        return out


def _einsum_macs(args: tuple[Any, ...]) -> int | None:
    """The product of all sizes of an equation of two operands; None of any other."""
    operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
    if not isinstance(args[0], str) or "." in args[0] or len(operands) != 2:
        return None
    sizes: dict[str, int] = {}
    letters = args[0].replace(" ", "").split("->")[0].split(",")
    for own, operand in zip(letters, operands, strict=True):
        sizes |= dict(zip(own, operand.shape, strict=True))
    return prod(sizes.values())


def _is_priced(op: Any) -> bool:
    return facts_of(op).macs is not None or str(op.overloadpacket) in FORMULAS


def _computes(args: tuple[Any, ...], out: Any) -> bool:
    """Whether real numbers come in and go out."""
    return all(
        any(isinstance(leaf, Tensor) and _is_real(leaf) for leaf in tree_leaves(tree))
        for tree in (args, out)
    )


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _shapes(tree: Any) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextmanager
def _as_it_runs(model: nn.Module, mode: _CountingMode) -> Iterator[None]:
    """A run that leaves random numbers alone, tells the mode where it is, and hides no product."""
    handles = [
        handle
        for name, module in model.named_modules()
        for handle in (
            module.register_forward_pre_hook(_entering(mode, name)),
            module.register_forward_hook(_leaving(mode), always_call=True),
        )
    ]
    # Kernels of accelerators pad heads to widths of their own; the CPU's needs less memory.
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    plain = nullcontext() if on_cpu else attention_in_products()
    try:
        # In inference mode a dispatch mode would meet linear and conv2d whole.
        inference = torch.inference_mode(mode=False)
        with (
            without_warnings(),  # the model's own are for its own runs
            without_fast_path(),
            streams_kept(),
            inference,
            torch.no_grad(),
            plain,
        ):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _entering(mode: _CountingMode, name: str) -> Callable[[nn.Module, Any], None]:
    def hook(_module: nn.Module, _args: Any) -> None:
        mode.running.append(name)
        mode.entered[name] = None

    return hook


def _leaving(mode: _CountingMode) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, _args: Any, _out: Any) -> None:
        mode.running.pop()

    return hook
