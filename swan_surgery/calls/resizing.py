"""Modules whose code repeats a width as a number: their forward runs with those numbers replaced.

`view(B, T, 4, 16)`, `reshape(B, N, 3, heads, C // heads)`, `split(8)`: when channels are removed, the
number no longer fits, and no parameter says so. Such a module keeps its class as a base, its
parameters and its code; in its forward, the arguments of the named calls are replaced.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from swan_surgery.calls.functions import RESIZABLE, SCALING
from swan_surgery.calls.sites import PathGuard, stands_between


stands_between(__name__)


# (function, number of the call in one run of the module) -> position among the leaves -> number
Replacements = Mapping[tuple[str, int], Mapping[int, float]]


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


def is_counted(name: str, args: Any) -> bool:
    """Whether a call counts: sizes that torch.jit turns into integer scalars make none of their own."""
    if name not in SCALING:
        return True
    return any(
        isinstance(leaf, Tensor) and (leaf.ndim > 0 or leaf.is_floating_point())
        for leaf in leaves_of(args)
    )


def replaced(value: Any, numbers: Mapping[int, float]) -> Any:
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
        return numbers.get(position, item)

    return rebuild(value)


class _Resizing(TorchFunctionMode):
    """Replaces numbers in chosen calls during one run of one module."""

    def __init__(self, replacements: Replacements, guard: PathGuard) -> None:
        super().__init__()
        self.guard = guard
        self.replacements = replacements
        self.counts: Counter[str] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in RESIZABLE or not is_counted(name, args):
            return func(*args, **kwargs)
        self.counts[name] += 1
        self.guard.check((name, self.counts[name]))
        numbers = self.replacements.get((name, self.counts[name]))
        if numbers:
            args, kwargs = replaced((args, kwargs), numbers)
        return func(*args, **kwargs)


class Resized(nn.Module):
    """Mixin in front of a module's own class: `replacements` by mode (training or not)."""

    replacements: dict[bool, dict[tuple[str, int], dict[int, float]]]
    call_sites: dict[bool, dict[tuple[str, int], str]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the module's own class, with numbers replaced.

        Raises:
            PathError: the input takes another path through the code than the one that was mapped.
        """
        guard = PathGuard(self.call_sites[self.training])
        with _Resizing(self.replacements[self.training], guard):
            result = super().forward(*args, **kwargs)
        guard.finish()
        return result

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        calls = [
            f"{function} #{number}"
            for (function, number) in self.replacements.get(self.training, {})
        ]
        own = super().extra_repr()
        return f"{own}{', ' if own else ''}sizes replaced in {', '.join(calls)}"


def resize_(
    module: nn.Module,
    call: tuple[str, int],
    leaf: int,
    number: float,
    *,
    training: bool,
    site: str = "",
) -> None:
    """Replace one number in one call of a module on a private copy; `site` is where it is called."""
    kind = type(module)
    if not isinstance(module, Resized):
        module.replacements = {True: {}, False: {}}  # type: ignore[assignment]
        module.call_sites = {True: {}, False: {}}  # type: ignore[assignment]
        module.__class__ = type(f"Resized{kind.__name__}", (Resized, kind), {})
    assert isinstance(module, Resized)  # noqa: S101 - made so above
    module.replacements[training].setdefault(call, {})[leaf] = number
    if site:
        module.call_sites[training][call] = site


__all__ = ["Resized", "numbers_of", "resize_"]
