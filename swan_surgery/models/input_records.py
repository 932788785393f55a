"""Example inputs as JSON: their shapes, types and structure, without what they say."""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from swan_surgery.errors import ArtifactError
from swan_surgery.models.inputs import Inputs


_DTYPES = {str(t).removeprefix("torch."): t for t in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
)}  # fmt: skip
# Integers may be positions to look up, so they are kept as they are; what is longer is kept as zeros.
_LONGEST = 1 << 16
# More than this is no example.
_MOST = 1 << 28


def inputs_to_json(inputs: Inputs, *, values: bool = True) -> Any:
    """Example inputs without their values where those are no positions to look up.

    Without `values` of these one alone (of whole numbers the largest, of truths the first), with which the
    model runs as well: nobody's text lies in the file.
    """
    tensor = _whole if values else _outline
    args = [_encoded(a, tensor) for a in inputs.args]
    return [args, {k: _encoded(v, tensor) for k, v in inputs.kwargs.items()}]


def _encoded(value: Any, tensor: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype)[6:], **tensor(value)}
    if isinstance(value, tuple):
        return [_encoded(item, tensor) for item in value]
    if isinstance(value, list):
        return {"list": [_encoded(item, tensor) for item in value]}
    if isinstance(value, dict):
        return {"items": {str(key): _encoded(item, tensor) for key, item in value.items()}}
    return value if type(value) in (int, float, bool, str) else None


def _whole(tensor: Tensor) -> dict[str, Any]:
    keeps = _is_index(tensor) and tensor.numel() <= _LONGEST
    return {"values": tensor.flatten().tolist() if keeps else None}


def _outline(tensor: Tensor) -> dict[str, Any]:
    if not _is_index(tensor) or tensor.is_meta or not tensor.numel():
        return {"values": None}
    one = tensor.flatten()[0] if tensor.dtype == torch.bool else tensor.max()
    return {"values": None, "all": one.item()}


def _is_index(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex()


def inputs_of_json(found: Any) -> Inputs:
    """What `inputs_to_json` wrote, as inputs; numbers are drawn where they were not kept."""
    args, kwargs = found
    return Inputs(tuple(map(_decoded, args)), {str(k): _decoded(v) for k, v in kwargs.items()})


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decoded(item) for item in value)
    if not isinstance(value, dict):
        return value
    if "list" in value:
        return [_decoded(item) for item in value["list"]]
    if "items" in value:
        return {str(key): _decoded(item) for key, item in value["items"].items()}
    return _tensor_of(value)


def _tensor_of(value: Mapping[str, Any]) -> Tensor:
    kind, shape = _DTYPES[value["dtype"]], [int(size) for size in value["shape"]]
    if value["values"] is not None:
        return torch.tensor(value["values"], dtype=kind).reshape(shape)
    if prod(shape) > _MOST:
        raise ArtifactError(f"the file asks for example inputs of shape {shape}")
    if "all" in value:
        return torch.full(shape, value["all"], dtype=kind)
    generator = torch.Generator().manual_seed(0)
    if kind.is_floating_point or kind.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(kind)
    return torch.zeros(shape, dtype=kind)


def plain_inputs(inputs: Inputs) -> bool:
    """Whether the example inputs come back from a file as something the model takes."""
    return all(
        isinstance(leaf, (Tensor, int, float, bool, str, type(None)))
        for leaf in tree_flatten((inputs.args, dict(inputs.kwargs)))[0]
    )


__all__ = ["inputs_of_json", "inputs_to_json", "plain_inputs"]
