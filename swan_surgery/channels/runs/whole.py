"""Torch functions that are one ATen operation, and one step of the map, though torch takes them apart."""

from typing import Any

import torch

from swan_surgery.calls.functions import WHOLE


def whole_op(function: str, args: Any) -> Any:
    """The overload of the operation that a torch function is, where it is to be one step."""
    if function not in WHOLE:
        return None
    packet = getattr(torch.ops.aten, function)
    for name in packet.overloads():
        overload = getattr(packet, name)
        kinds = [str(argument.type) for argument in overload._schema.arguments]  # noqa: SLF001 - torch's only access
        if len(args) <= len(kinds) and all(
            isinstance(value, (list, tuple)) == kind.startswith("List")
            for value, kind in zip(args, kinds, strict=False)
        ):
            return overload
    return None
