"""Counts with fvcore: MACs per module, and the operations that it has no formula for.

fvcore calls multiply-adds "flops". It traces with torch.jit, which drops layers whose output nobody
reads; its own handles for einsum, broadcast matmul and string paddings are replaced by exact ones.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from swan_surgery.channels.rules.op_facts import OpFacts
from swan_surgery.channels.rules.registry import macs_formulas
from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import InputError, ModelError
from swan_surgery.gates import GatedModel
from swan_surgery.models import Inputs, as_inputs, copy_of
from swan_surgery.models.checks import check_arguments, check_data, described
from swan_surgery.models.outputs import iter_tensors


with warnings.catch_warnings():  # importing fvcore meets torch's deprecation of torch.jit.script
    warnings.simplefilter("ignore", FutureWarning)
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import conv_flop_count


# fvcore's names of the operations whose multiply-adds are counted.
_COUNTED = (
    "conv",
    "linear",
    "addmm",
    "matmul",
    "mm",
    "bmm",
    "einsum",
    "baddbmm",
    "mv",
    "attention",
    "recurrent",
    "registered",
)


_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


class _Traceable(nn.Module):
    """What torch.jit can trace: positional arguments in, a tuple of tensors out."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self._num_args = len(inputs.args)
        self._names = list(inputs.kwargs)

    def forward(self, *values: Any) -> Any:
        named = dict(zip(self._names, values[self._num_args :], strict=True))
        found = tuple(iter_tensors(self.model(*values[: self._num_args], **named)))
        return found or torch.zeros(())


@dataclass(frozen=True, slots=True)
class OperatorCounts:
    """What fvcore found in one forward pass.

    Attributes:
        macs: of every module by dotted name, children included; `""` is the whole model.
        uncounted: number of calls of each operation that fvcore has no formula for.
    """

    macs: Mapping[str, int]
    uncounted: Mapping[str, int]


def count_operators(model: nn.Module, example_inputs: Any) -> OperatorCounts:
    """Count one forward pass in eval mode, on a copy; of a gated model the base model.

    Raises:
        ModelError: not an `nn.Module`, or on the meta device.
        InputError: the model cannot be run on the inputs.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    base = model.model if isinstance(model, GatedModel) else model
    inputs = as_inputs(example_inputs)
    check_data(base, inputs, to="count MACs")
    check_arguments(base, inputs)
    wrapper = _Traceable(copy_of(base).eval(), inputs)
    values = (*inputs.args, *inputs.kwargs.values())
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with streams_kept():
            analysis = FlopCountAnalysis(wrapper, values)
            analysis.unsupported_ops_warnings(enabled=False)
            analysis.uncalled_modules_warnings(enabled=False)
            analysis.tracer_warnings("none")
            analysis.set_op_handle("aten::_convolution_mode", _same_conv_macs)
            analysis.set_op_handle("aten::einsum", _einsum_macs)
            analysis.set_op_handle("aten::matmul", _matmul_macs)
            analysis.set_op_handle("aten::baddbmm", _baddbmm_macs)
            analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_macs)
            for name in _RECURRENT:
                analysis.set_op_handle(f"aten::{name}", _recurrent_macs)
                analysis.set_op_handle(f"aten::{name}_cell", _cell_macs)
            for name, facts in macs_formulas().items():
                analysis.set_op_handle(name.replace(".", "::", 1), _by_formula(facts))
            counts = analysis.by_module_and_operator()
            uncounted = dict(analysis.unsupported_ops())
    except Exception as err:  # the model's own code may raise anything
        first = str(err).splitlines()[0] if str(err) else ""
        raise InputError(
            f"MACs of {type(base).__name__} cannot be counted on {described(inputs)}: {first}"
        ) from err
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    macs = {
        name.removeprefix("model").removeprefix("."): sum(int(by_op[op]) for op in _COUNTED)
        for name, by_op in counts.items()
        if name.startswith("model")
    }
    return OperatorCounts(macs, uncounted)


def _by_formula(facts: OpFacts) -> Callable[[list[Any], list[Any]], Counter[str]]:
    """A handle for an operation with a formula of the user's."""

    def count(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
        assert facts.macs is not None  # noqa: S101 - chosen for it
        given, returned = ([s for v in values for s in _shapes(v)] for values in (inputs, outputs))
        return Counter({"registered": facts.macs(given, returned)})

    return count


def _shapes(value: Any) -> Iterator[tuple[int, ...]]:
    """The shapes of the tensors that a value of a traced graph holds."""
    if value.node().kind() == "prim::ListConstruct":
        for item in value.node().inputs():
            yield from _shapes(item)
    elif value.type().kind() == "TensorType":
        yield tuple(value.type().sizes())


def _recurrent_macs(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Multiply-adds of a recurrent layer: every weight matrix once for each sample at each step.

    It reads [T, B, I], [B, T, I], or packed [sum of lengths, I]; its weights are the last list.
    """
    del outputs
    lists = [value for value in inputs if value.node().kind() == "prim::ListConstruct"]
    positions = prod(inputs[0].type().sizes()[:-1])
    weights = sum(prod(shape) for shape in _shapes(lists[-1]) if len(shape) > 1)
    return Counter({"recurrent": positions * weights})


def _cell_macs(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Multiply-adds of one step of a recurrent cell: what it reads, and its state, by their weights."""
    del outputs
    weights = sum(prod(value.type().sizes()) for value in inputs[2:4])
    return Counter({"recurrent": prod(inputs[0].type().sizes()[:-1]) * weights})


def _einsum_macs(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Multiply-adds of a two-operand einsum: the product of all index sizes.

    fvcore's own handle halves numpy's FLOP estimate, which is a few MACs off.
    """
    del outputs
    equation = str(inputs[0].toIValue()).replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    shapes = [value.type().sizes() for value in inputs[1].node().inputs()]
    for letters, shape in zip(equation, shapes, strict=True):
        sizes |= dict(zip(letters[::-1], shape[::-1], strict=False))
    return Counter({"einsum": prod(sizes.values())})


def _same_conv_macs(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """A convolution with `padding="same"` or `"valid"`, which fvcore has no handle for."""
    x, weight, out = (value.type().sizes() for value in (inputs[0], inputs[1], outputs[0]))
    return Counter({"conv": conv_flop_count(x, weight, out, transposed=False)})


def _matmul_macs(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Multiply-adds of a matmul: output elements times the summed size.

    fvcore's own handle forgets the batch when only the second operand has one.
    """
    summed = inputs[0].type().sizes()[-1]
    return Counter({"matmul": prod(outputs[0].type().sizes()) * summed})


def _baddbmm_macs(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Multiply-adds of a batched product that is added to something; fvcore has no handle."""
    summed = inputs[1].type().sizes()[-1]
    return Counter({"baddbmm": prod(outputs[0].type().sizes()) * summed})


def _attention_macs(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Multiply-adds of q k^T and of the weights times v: [..., L, E], [..., S, E], [..., S, V]."""
    q, k, _, out = (value.type().sizes() for value in (*inputs[:3], outputs[0]))
    return Counter({"attention": prod(q) * k[-2] + prod(out) * k[-2]})
