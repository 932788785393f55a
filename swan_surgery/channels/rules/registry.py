"""The table of operations: one `OpFacts` per ATen operation, by the name of its overload packet.

A rule reads the fields of a call's inputs, tells `Labels` what it concludes, and gives the outputs
their fields. Operations that torch tags as pointwise share one rule; everything else without an
entry is unknown, and pins what it touches.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from swan_surgery.channels.labels.labels import Labels, Rule
from swan_surgery.channels.labels.recording import Call
from swan_surgery.channels.rules.op_facts import OpFacts
from swan_surgery.errors import RuleError


_OPS: dict[str, OpFacts] = {}
# Whatever it does, its result may tell how many equal values it was given.
_UNKNOWN = OpFacts(counts=True)


def rule(*names: str, **facts: Any) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operations, by name as in `rule("mean", "torchvision.nms")`.

    Decorators stack: `facts`, the other attributes of `OpFacts`, hold for the names beside them.

    Raises:
        RuleError: a name has a rule already.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            if _OPS.get(key_of(name), OpFacts()).rule is not None:
                raise RuleError(f"{key_of(name)} has a rule already")
        describe(*names, rule=function, **facts)
        return function

    return register


def describe(*names: str, **facts: Any) -> None:
    """Note facts about operations whose rule, if they have one, stands elsewhere."""
    for name in names:
        key = key_of(name)
        _OPS[key] = replace(_OPS.get(key, OpFacts()), **facts)
    facts_of.cache_clear()


def key_of(name: str) -> str:
    """How the table calls an operation: `mean` is `aten.mean`."""
    return name if "." in name else f"aten.{name}"


def noted(key: str) -> OpFacts | None:
    """The record under exactly this name."""
    return _OPS.get(key)


def exchange(key: str, facts: OpFacts | None) -> OpFacts | None:
    """Put another record (None: none) in the place of one; returns what was there."""
    before = _OPS.pop(key, None)
    if facts is not None:
        _OPS[key] = facts
    facts_of.cache_clear()
    return before


@functools.cache
def facts_of(op: Any) -> OpFacts:
    """What is known of an operation (an overload); in-place variants share the plain one's record."""
    facts = facts_named(str(op.overloadpacket))
    if torch.Tag.pointwise not in op.tags:
        return facts
    if facts is _UNKNOWN:
        facts = _OPS["aten.pointwise"]
    return replace(facts, rule=facts.rule or _OPS["aten.pointwise"].rule, fixes_numbers=True)


@functools.cache
def writes_in_place(op: Any) -> bool:
    """Whether an operation (an overload) writes its first argument; the tag that says so came after torch 2.11."""
    first = next(iter(op._schema.arguments), None)  # noqa: SLF001 - torch's only access
    if first is None or first.kwarg_only or first.alias_info is None:
        return False
    return bool(first.alias_info.is_write)


def facts_named(name: str) -> OpFacts:
    """What was noted of an operation by its name without overload, as in `aten.add`."""
    found = _OPS.get(name)
    if found is None and name.endswith("_"):
        found = _OPS.get(name[:-1])
    return _UNKNOWN if found is None else found


def find_rule(op: Any) -> Rule | None:
    """The rule of an operation, if it has one."""
    return facts_of(op).rule


def registered_ops() -> tuple[str, ...]:
    """The operations that have a rule of their own, sorted."""
    return tuple(sorted(name for name, facts in _OPS.items() if facts.rule is not None))


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
