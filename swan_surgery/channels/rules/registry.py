"""The table of rules: one entry per ATen operation, looked up by its overload packet.

A rule reads the fields of a call's inputs, tells `Labels` what it concludes, and gives the outputs
their fields. Operations that torch tags as pointwise share one rule; everything else without an
entry is unknown, and pins what it touches.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from swan_surgery.channels.labels.labels import Labels, Rule
from swan_surgery.channels.labels.recording import Call


_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operations, by name as in `rule("mean", "torchvision.nms")`.

    Raises:
        ValueError: a name has a rule already.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            key = name if "." in name else f"aten.{name}"
            if key in _RULES:
                raise ValueError(f"{key} has a rule already")
            _RULES[key] = function
        return function

    return register


def find_rule(op: Any) -> Rule | None:
    """The rule of an operation; in-place variants share the rule of the plain one."""
    name = str(op.overloadpacket)
    found = _RULES.get(name)
    if found is None and name.endswith("_"):
        found = _RULES.get(name[:-1])
    if found is None and torch.Tag.pointwise in op.tags:
        found = _RULES["aten.pointwise"]
    return found


def is_pointwise(op: Any) -> bool:
    """Whether the operation computes or fills values position by position."""
    name = str(op.overloadpacket).removesuffix("_")
    return torch.Tag.pointwise in op.tags or name == "aten.fill"


def registered_ops() -> tuple[str, ...]:
    """The operations that have a rule of their own, sorted."""
    return tuple(sorted(_RULES))


def pin_inputs(call: Call, labels: Labels, text: str) -> None:
    """Pin every channel that enters an operation."""
    for tensor in call.inputs:
        for field in labels.fields(tensor):
            labels.pin(field, text, call)


def as_tuple(value: int | Iterable[int] | None) -> tuple[int, ...]:
    """ATen's `dim` arguments: an int, a list, or nothing."""
    if value is None:
        return ()
    if isinstance(value, int):
        return (value,)
    return tuple(value)
