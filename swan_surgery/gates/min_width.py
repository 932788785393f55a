"""The narrowest a layer may get: a number, a share, or a mapping from layer names to either."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from math import ceil

from swan_surgery.errors import InputError


MinWidth = int | float | Mapping[str, int | float]


def least_widths(
    value: MinWidth, names: Sequence[Sequence[str]], sizes: Sequence[int]
) -> list[int]:
    """How many units each layer keeps at least.

    Args:
        value: a number of units, a share of the layer's units (a float below 1), or a mapping from
            layer names or glob patterns to either; the first that matches counts, 1 where none does.
        names: per layer the names it goes by.
        sizes: per layer its number of units.

    Raises:
        InputError: neither a whole number nor a share, or a pattern that names no layer.
    """
    rules = value if isinstance(value, Mapping) else {"*": value}
    for width in rules.values():
        whole = isinstance(width, int) and width >= 0
        if isinstance(width, bool) or not (whole or 0 < width < 1):
            raise InputError(
                f"min_width is a number of units (0, 1, 2, ...) or a share of a layer's units "
                f"between 0 and 1; got {width!r}"
            )
    known = [name for own in names for name in own]
    for pattern in rules:
        if pattern != "*" and not any(fnmatch(name, pattern) for name in known):
            raise InputError(
                f"min_width names {pattern!r}, but no layer with gates is called so; there are "
                f"{', '.join(known[:4])}{', ...' if len(known) > 4 else ''}"
            )
    least = []
    for own, size in zip(names, sizes, strict=True):
        called = own or ("",)
        width = next((w for at, w in rules.items() for n in called if fnmatch(n, at)), 1)
        least.append(min(size, width if isinstance(width, int) else ceil(width * size)))
    return least


def floors_of(names: Sequence[Sequence[str]], least: Sequence[int]) -> dict[str, int]:
    """Least widths as numbers by layer, for models that are cut from this one: a share would be one of what is left.

    Args:
        names: per layer the names it goes by; those without stay at 1.
        least: per layer its least width.
    """
    return {own[0]: width for own, width in zip(names, least, strict=True) if own}


def floors_for(names: Sequence[Sequence[str]], floors: Mapping[str, int]) -> dict[str, int]:
    """Those floors whose layers a smaller model still has gates for."""
    known = {name for own in names for name in own}
    return {name: width for name, width in floors.items() if name in known}
