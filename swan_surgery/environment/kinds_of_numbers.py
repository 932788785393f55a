"""Numbers of whatever library: a count from numpy is one as well."""

from numbers import Integral, Real


def is_whole(value: object) -> bool:
    """Whether it is a whole number, as `len` gives."""
    return isinstance(value, Integral)


def is_number(value: object) -> bool:
    """Whether it is a number on the line, NaN included."""
    return isinstance(value, Real)


__all__ = ["is_number", "is_whole"]
