"""Python attributes that repeat a width (`num_heads`, `normalized_shape`) and so must follow it.

Nothing says which attributes those are. Where the rehearsed model does not follow, the integers of
the module that ran are candidates, and the rehearsal itself tells which of them was meant.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd


LAYERS = (_ConvNd, nn.Linear, _NormBase)


@dataclass(frozen=True, slots=True)
class Attribute:
    """An integer attribute of a module, or one element (`index`) of a tuple or list of integers."""

    module: str
    name: str
    index: int | None = None

    def read(self, model: nn.Module) -> int:
        """The value at full width."""
        value = getattr(model.get_submodule(self.module), self.name)
        return int(value if self.index is None else value[self.index])

    def write_(self, model: nn.Module, value: int) -> None:
        """Set it on a private copy."""
        owner = model.get_submodule(self.module)
        if self.index is None:
            setattr(owner, self.name, value)
            return
        old = getattr(owner, self.name)
        items = [value if i == self.index else item for i, item in enumerate(old)]
        setattr(owner, self.name, items if isinstance(old, list) else tuple(items))


def repeating(model: nn.Module, module: str, size: int) -> list[Attribute]:
    """The attributes of one module, then of its direct children, whose value is `size`."""
    own = model.get_submodule(module)
    children = [f"{module}.{name}".strip(".") for name, _ in own.named_children()]
    return [found for name in (module, *children) for found in repeating_in(model, name, size)]


def repeating_in(
    model: nn.Module, module: str, size: int, *, only: str | None = None
) -> Iterator[Attribute]:
    """The attributes of one module whose value is `size`; all of them, or `only` one."""
    owner = model.get_submodule(module)
    for name, index, value in whole_numbers_of(owner):
        if value == size and only in (None, name):
            yield Attribute(module, name, index)


def whole_numbers_of(owner: nn.Module) -> Iterator[tuple[str, int | None, int]]:
    """Name, index and value of what may follow a width: own whole numbers, alone or in a row of them."""
    if isinstance(owner, LAYERS):
        return  # their attributes follow their parameters
    for name, value in vars(owner).items():
        if type(value) is int:
            yield name, None, value
        elif isinstance(value, (tuple, list)) and all(type(item) is int for item in value):
            yield from ((name, index, item) for index, item in enumerate(value))


@contextmanager
def reads_noted(model: nn.Module, note: Callable[[nn.Module, str, Any], object]) -> Iterator[None]:
    """Call `note(module, name, value)` when code reads an attribute of a private model's own modules.

    Not of torch's: its layers read their settings when they run.
    """
    classes = [(module, type(module)) for module in model.modules()]

    def watched(kind: type[nn.Module]) -> type[nn.Module]:
        def read(self: nn.Module, key: str) -> Any:
            value = kind.__getattribute__(self, key)
            note(self, key, value)
            return value

        return type(
            kind.__name__, (kind,), {"__getattribute__": read, "__module__": kind.__module__}
        )

    made = {kind: watched(kind) for kind in {kind for _, kind in classes}}
    try:
        for module, kind in classes:
            if not kind.__module__.startswith("torch.nn."):
                module.__class__ = made[kind]
        yield
    finally:
        for module, kind in classes:
            module.__class__ = kind


# What some attributes should become: the labels whose remaining number is the new value.
Followers = Mapping[Attribute, Tensor]

# Something that did not follow: the run (`Trace.number`), the operation, and the line that raised there,
# if one did.
Where = tuple[int, int, str]

Proposed = Callable[[int], Sequence[Attribute]]


@dataclass(slots=True)
class Hypotheses:
    """What is tried, operation by operation, for attributes to follow a width.

    Attributes:
        accepted: attributes that follow, with the labels they count.
        active: what was tried last at an operation; if it fails again, that was wrong.
        pending: what is left to try at an operation.
        busy: modules in which something was tried or taken back in this round; one at a time tells
            what helped.
    """

    accepted: dict[Attribute, Tensor] = field(default_factory=dict)
    active: dict[Where, list[Attribute]] = field(default_factory=dict)
    pending: dict[Where, Iterator[dict[Attribute, Tensor]]] = field(default_factory=dict)
    busy: set[str] = field(default_factory=set)

    def try_next(self, place: Where, module: str, widths: list[Tensor], proposed: Proposed) -> bool:
        """Take back what did not help at this operation and try something else.

        False if nothing is left, and nothing was taken back.
        Not for a module that is busy: nothing is known yet about what was changed there.

        Args:
            place: what did not follow.
            module: where it ran.
            widths: label vectors of the axes that shrink there.
            proposed: attributes with a given value, the likeliest first.
        """
        wrong = self.active.pop(place, [])
        for attribute in wrong:
            self.accepted.pop(attribute, None)
            self.busy.add(module)
        if place not in self.pending:
            self.pending[place] = _guesses(widths, proposed)
        for guess in self.pending[place]:
            fresh = {a: labels for a, labels in guess.items() if a not in self.accepted}
            if fresh:
                self.accepted |= fresh
                self.active[place] = list(fresh)
                self.busy.add(module)
                return True
        return bool(wrong)

    def reconsider(self, module: str) -> bool:
        """Take back what was guessed last about a module, and guess again; False if nothing was."""
        for place, attributes in reversed(self.active.items()):
            if not any(attribute.module == module for attribute in attributes):
                continue
            for attribute in attributes:
                self.accepted.pop(attribute, None)
            del self.active[place]
            self.busy.add(module)
            for guess in self.pending[place]:
                fresh = {a: labels for a, labels in guess.items() if a not in self.accepted}
                if fresh:
                    self.accepted |= fresh
                    self.active[place] = list(fresh)
                    break
            return True
        return False


def _guesses(widths: list[Tensor], proposed: Proposed) -> Iterator[dict[Attribute, Tensor]]:
    """Every attribute that may repeat one of the widths: one at a time, then together."""
    together: dict[Attribute, Tensor] = {}
    for labels in widths:
        found = proposed(labels.numel())
        for attribute in found:
            yield {attribute: labels}
        fresh = next((a for a in found if a not in together), None)
        if fresh is not None:
            together[fresh] = labels
    if len(together) > 1:
        yield together  # a split with two lengths, each an attribute


def follow_(model: nn.Module, followers: Followers, stays: Tensor) -> None:
    """Set attributes on a private copy; `stays[label]` says which labels remain."""
    for attribute, labels in followers.items():
        attribute.write_(model, int(torch.count_nonzero(stays[labels])))
