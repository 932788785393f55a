"""The arguments of a call, leaf by leaf: the numbers among them, read and replaced by position."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isclose
from typing import Any


@dataclass(frozen=True, slots=True)
class Factor:
    """Stands for the number that the code computes, times `value`."""

    value: float

    def times(self, number: float) -> float:
        """The product; whole numbers stay whole."""
        product = number * self.value
        return round(product) if isinstance(number, int) else product


# What takes the place of a number among the arguments.
Replacement = float | Factor


def after(old: Replacement, new: Replacement) -> Replacement:
    """What one replacement and then another come to."""
    if not isinstance(new, Factor):
        return new
    return Factor(old.value * new.value) if isinstance(old, Factor) else new.times(old)


def same_number(one: float, two: float) -> bool:
    """Whether two numbers are the same but for rounding."""
    return one == two or isclose(one, two, rel_tol=1e-12)


def leaves_of(value: Any) -> Iterator[Any]:
    """What arguments hold, in order: tuples and lists opened, dicts by value."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from leaves_of(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from leaves_of(item)
    else:
        yield value


def numbers_of(args: Any, kwargs: Any) -> tuple[Any, ...]:
    """The leaves of a call with tensors and all else that is no number as None."""
    return tuple(leaf if type(leaf) in (int, float) else None for leaf in leaves_of((args, kwargs)))


def replaced(value: Any, numbers: Mapping[int, Replacement]) -> Any:
    """The same arguments with the leaves at the given positions replaced."""
    position = -1

    def rebuild(item: Any) -> Any:
        nonlocal position
        if isinstance(item, (tuple, list)):
            items = [rebuild(part) for part in item]
            return items if isinstance(item, list) else tuple(items)
        if isinstance(item, dict):
            return {key: rebuild(part) for key, part in item.items()}
        position += 1
        new = numbers.get(position, item)
        return new.times(item) if isinstance(new, Factor) else new

    return rebuild(value)
