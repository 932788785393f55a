"""Python attributes that repeat a width (`num_heads`, `normalized_shape`) and so must follow it.

Nothing says which attributes those are. Where the rehearsed model does not follow, the integers of
the module that ran are candidates, and the rehearsal itself tells which of them was meant.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

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
    return [found for name in (module, *children) for found in _repeating(model, name, size)]


def _repeating(model: nn.Module, module: str, size: int) -> Iterator[Attribute]:
    owner = model.get_submodule(module)
    if isinstance(owner, LAYERS):
        return  # their attributes follow their parameters
    for name, value in vars(owner).items():
        if type(value) is int and value == size:
            yield Attribute(module, name)
        elif isinstance(value, (tuple, list)) and all(type(item) is int for item in value):
            yield from (Attribute(module, name, i) for i, n in enumerate(value) if n == size)


# What some attributes should become: the labels whose remaining number is the new value.
Followers = Mapping[Attribute, Tensor]


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
    active: dict[tuple[int, int], list[Attribute]] = field(default_factory=dict)
    pending: dict[tuple[int, int], Iterator[dict[Attribute, Tensor]]] = field(default_factory=dict)
    busy: set[str] = field(default_factory=set)

    def try_next(
        self, place: tuple[int, int], model: nn.Module, module: str, widths: list[Tensor]
    ) -> bool:
        """Take back what did not help at this operation and try something else; False if nothing is left.

        Not for a module that is busy: nothing is known yet about what was changed there.

        Args:
            place: the run (`Trace.number`) and the operation that did not follow.
            model: at full width.
            module: where the operation ran.
            widths: label vectors of the axes that shrink there.
        """
        for attribute in self.active.pop(place, []):
            self.accepted.pop(attribute, None)
            self.busy.add(module)
        if place not in self.pending:
            self.pending[place] = _guesses(model, module, widths)
        for guess in self.pending[place]:
            fresh = {a: labels for a, labels in guess.items() if a not in self.accepted}
            if fresh:
                self.accepted |= fresh
                self.active[place] = list(fresh)
                self.busy.add(module)
                return True
        return False

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


def _guesses(
    model: nn.Module, module: str, widths: list[Tensor]
) -> Iterator[dict[Attribute, Tensor]]:
    """Every attribute of the module that repeats one of the widths: one at a time, then together."""
    together: dict[Attribute, Tensor] = {}
    for labels in widths:
        found = repeating(model, module, labels.numel())
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
