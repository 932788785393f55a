"""Multiply-adds of ATen operations by the shapes of what enters and leaves; bias and scaling are free.

Convolutions and matrix products are counted by fvcore's own formulas (which it calls flops: one multiply-add is
one); it has none for the rest.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor


with warnings.catch_warnings():  # importing fvcore meets torch's deprecation of torch.jit.script
    warnings.simplefilter("ignore", FutureWarning)
    from fvcore.nn.jit_handles import addmm_flop_jit, bmm_flop_jit, conv_flop_count


# MACs of one call by its positional arguments and what it returned.
Formula = Callable[[tuple[Any, ...], Any], int]


@dataclass(frozen=True, slots=True)
class _Value:
    """A tensor as fvcore's handles see one: the shape of a value in a traced graph."""

    shape: tuple[int, ...]

    def isCompleteTensor(self) -> bool:  # noqa: N802 - torch's name
        """It has a shape."""
        return True

    def type(self) -> "_Value":
        """Holds the sizes."""
        return self

    def sizes(self) -> list[int]:
        """The shape."""
        return list(self.shape)


def _by_fvcore(handle: Callable[[list[Any], list[Any]], Any]) -> Formula:
    """A formula of fvcore's for operations on tensors alone."""

    def macs(args: tuple[Any, ...], out: Tensor) -> int:
        values = [_Value(tuple(a.shape)) for a in args if isinstance(a, Tensor)]
        return int(handle(values, [_Value(tuple(out.shape))]))

    return macs


def _convolution(args: tuple[Any, ...], out: Tensor) -> int:
    """Each position of the output (transposed: of the input) meets the whole kernel once."""
    x, weight = (list(tensor.shape) for tensor in args[:2])
    is_transposed = bool(args[6]) if len(args) > 6 else False
    return int(conv_flop_count(x, weight, list(out.shape), transposed=is_transposed))


def _plain_convolution(args: tuple[Any, ...], out: Tensor) -> int:
    """The form that one kernel takes, which is never transposed."""
    return _convolution(args[:2], out)


def _deformed(args: tuple[Any, ...], out: Tensor) -> int:
    return out.shape[0] * int(args[1].numel()) * prod(out.shape[2:])


def _product(first: int) -> Formula:
    """Every element of the result sums over the last axis of the operand at place `first`."""

    def macs(args: tuple[Any, ...], out: Tensor) -> int:
        return out.numel() * int(args[first].shape[-1])

    return macs


def _summed_batches(args: tuple[Any, ...], out: Tensor) -> int:
    return out.numel() * int(args[1].shape[0] * args[1].shape[-1])


def _attention(args: tuple[Any, ...], out: tuple[Tensor, ...]) -> int:
    """Queries times keys, and the weights times v: [..., L, E], [..., S, E], [..., S, V]."""
    q, k = args[:2]
    return int((q.numel() + out[0].numel()) * k.shape[-2])


def _recurrent_layer(args: tuple[Any, ...], _out: Any) -> int:
    """One direction of one layer: both weights at every step of every sample."""
    x, from_input, from_state = args[:3]
    return int(x.numel() // x.shape[-1] * (from_input.numel() + from_state.numel()))


def _recurrent_layers(args: tuple[Any, ...], _out: Any) -> int:
    """All layers and directions: every matrix among the weights at every step of every sample."""
    x, weights = args[:2]
    return int(x.numel() // x.shape[-1] * sum(w.numel() for w in weights if w.ndim > 1))


FORMULAS: Mapping[str, Formula] = {
    **dict.fromkeys(
        ("aten.convolution", "aten._convolution", "aten.convolution_overrideable"), _convolution
    ),
    **dict.fromkeys(("aten.cudnn_convolution", "aten.mkldnn_convolution"), _plain_convolution),
    "torchvision.deform_conv2d": _deformed,
    "aten.bmm": _by_fvcore(bmm_flop_jit),
    "aten.addmm": _by_fvcore(addmm_flop_jit),
    **dict.fromkeys(("aten.mm", "aten.linear", "aten._grouped_mm"), _product(0)),
    **dict.fromkeys(("aten.mv", "aten.dot", "aten.vdot"), _product(0)),
    **dict.fromkeys(
        ("aten.addmm_", "aten._addmm_activation", "aten.addmv", "aten.addmv_"),
        _product(1),
    ),
    **dict.fromkeys(("aten.baddbmm", "aten.baddbmm_"), _product(1)),
    **dict.fromkeys(("aten.addbmm", "aten.addbmm_"), _summed_batches),
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten.mkldnn_rnn_layer": _recurrent_layer,
    **dict.fromkeys(("aten._cudnn_rnn", "aten.miopen_rnn"), _recurrent_layers),
}
