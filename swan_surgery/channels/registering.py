"""`register_rule`: a channel rule for an operation of the user's own, checked before it is believed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace as with_
from typing import Any

import torch
from torch import Tensor

from swan_surgery.channels.labels.labels import Rule
from swan_surgery.channels.rehearsal.alone import check_rule
from swan_surgery.channels.rules.op_facts import MacsFormula, OpFacts
from swan_surgery.channels.rules.ready_made import READY_MADE, priced, ready_made_rule
from swan_surgery.channels.rules.registry import exchange, facts_of, key_of, noted
from swan_surgery.errors import InputError, RuleError


@dataclass(frozen=True, slots=True)
class RegisteredRule:
    """A rule in force until `remove()`, or until the end of the `with` block it is given to."""

    op: str
    facts: OpFacts
    before: OpFacts | None

    def remove(self) -> None:
        """Take the rule out again; what it replaced is back. A second time does nothing."""
        if noted(self.op) is self.facts:
            exchange(self.op, self.before)

    def __enter__(self) -> "RegisteredRule":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def register_rule(
    op: Any,
    rule: str | Rule,
    *,
    example: Callable[[], tuple[Any, ...]] | None = None,
    axes: Sequence[int] | None = None,
    macs: MacsFormula | None = None,
    replace: bool = False,
) -> RegisteredRule:
    """Say what an operation does to channels, so that those that pass through it can have gates.

    The rule is checked on the example before it counts: channels are removed from the arguments, and
    what is left of the result must be what the operation returns without them. Models that were
    mapped before are not mapped anew.

    Args:
        op: an operation of `torch.library` or ATen: `torch.ops.mylib.swish2`, what
            `torch.library.custom_op` returned, or a name, `"mylib::swish2"`.
        rule: `"pointwise"`: position by position, operands broadcast. `"reduction"`: one value (or
            values that depend on one another) along some axes of the first tensor. `"keeps_axis"`:
            each channel by itself, all other axes mixed, as by a filter along H and W. Or a function
            of a `Call` and `Labels`, as those of the library in `channels/rules`.
        example: returns a tuple of arguments to check the rule on; float64 checks to 1e-9, other
            types to 1e-4. None: random tensors, of shape (3, 8, 6, 5), for an operation that takes
            nothing else.
        axes: for `"reduction"` the axes that are reduced (None: its argument `dim`, else all), for
            `"keeps_axis"` those that stay (None: axis 1).
        macs: multiply-adds of one call, from the shapes of the tensors that enter and of those that
            come out: `lambda inputs, outputs: 9 * math.prod(outputs[0])`. None: it does not multiply.
        replace: take the place of a rule that is there.

    Returns:
        the registration: `remove()` ends it, and so does the end of a `with` block.

    Raises:
        InputError: there is no such operation, no ready-made rule of that name, or no example.
        RuleError: the operation has a rule already, or the example shows that this one is wrong.

    Example:
        >>> @torch.library.custom_op("mylib::swish2", mutates_args=())
        ... def swish2(x: torch.Tensor) -> torch.Tensor:
        ...     return x * torch.sigmoid(2 * x)
        >>> @swish2.register_fake
        ... def _(x: torch.Tensor) -> torch.Tensor:
        ...     return torch.empty_like(x)
        >>> class Swish2(nn.Module):
        ...     def forward(self, x: torch.Tensor) -> torch.Tensor:
        ...         return torch.ops.mylib.swish2(x)
        >>> net = nn.Sequential(nn.Linear(3, 8), Swish2(), nn.Linear(8, 2))
        >>> swan.channel_map(net, torch.zeros(1, 3)).num_units
        0
        >>> with swan.register_rule(torch.ops.mylib.swish2, "pointwise"):
        ...     swan.channel_map(net, torch.zeros(1, 3)).num_units
        8
    """
    packet = _packet(op)
    key = str(packet)
    before = noted(key)
    known = before is not None and before.rule is not None
    if not replace and (known or _known_overloads(packet)):
        raise RuleError(f"{key} has a rule already; replace=True takes its place")
    facts = _facts(rule, axes, macs, before or OpFacts())
    args = _example(packet, example)
    exchange(key, facts)
    try:
        check_rule(key, packet, args, {}, macs)
    except BaseException:
        exchange(key, before)
        raise
    return RegisteredRule(key, facts, before)


def _packet(op: Any) -> Any:
    """The overload packet of whatever names an operation.

    Raises:
        InputError: there is no such operation.
    """
    if isinstance(op, str):
        namespace, _, name = key_of(op.replace("::", ".")).partition(".")
        packet = getattr(getattr(torch.ops, namespace), name, None)
    else:
        packet = getattr(op, "_opoverload", op)  # of torch.library.custom_op
        packet = getattr(packet, "overloadpacket", packet)
    if not hasattr(packet, "overloads"):
        raise InputError(
            f"op={op!r} is no operation that torch knows; give torch.ops.mylib.name or "
            "'mylib::name', registered by torch.library (a plain Python function needs no rule)"
        )
    return packet


def _known_overloads(packet: Any) -> bool:
    return any(facts_of(getattr(packet, name)).rule is not None for name in packet.overloads())


def _facts(
    rule: str | Rule, axes: Sequence[int] | None, macs: MacsFormula | None, before: OpFacts
) -> OpFacts:
    ready = READY_MADE.get(rule) if isinstance(rule, str) else None
    if isinstance(rule, str) and ready is None:
        names = ", ".join(map(repr, READY_MADE))
        raise InputError(f"rule={rule!r} is none of {names}, and no function of a call and labels")
    if not isinstance(rule, str) and not callable(rule):
        raise InputError(f"rule must be a name or a function, got {type(rule).__name__}")
    if axes is not None and (ready is None or not ready.takes_axes):
        raise InputError(f"axes={tuple(axes)} means nothing to rule={rule!r}")
    function = (
        ready_made_rule(rule, None if axes is None else tuple(axes))
        if isinstance(rule, str)
        else rule
    )
    # Of an operation that nobody knows, numbers may enter values, and values may tell how many.
    return with_(
        before,
        rule=function if macs is None else priced(function, macs),
        macs=macs,
        fixes_numbers=True,
        counts=ready is None or ready.counts,
        by_place=ready is not None and ready.by_place,
    )


def _example(packet: Any, example: Callable[[], tuple[Any, ...]] | None) -> tuple[Any, ...]:
    """The arguments to check on: the user's, or random tensors if the operation takes nothing else."""
    if example is not None:
        args = example()
        if not isinstance(args, tuple):
            raise InputError(
                f"example= must return a tuple of arguments, got {type(args).__name__}"
            )
        return args
    schema = getattr(packet, packet.overloads()[0])._schema  # noqa: SLF001 - torch's only access
    needed = [a for a in schema.arguments if not a.has_default_value()]
    other = [a.name for a in needed if str(a.type) != "Tensor"]
    if other or not needed:
        raise InputError(
            f"{packet} takes {', '.join(other) or 'no tensor'}: give example=, a function that "
            "returns a tuple of arguments"
        )
    generator = torch.Generator().manual_seed(0)
    return tuple(_random(generator) for _ in needed)


def _random(generator: torch.Generator) -> Tensor:
    return torch.randn(3, 8, 6, 5, dtype=torch.float64, generator=generator)
