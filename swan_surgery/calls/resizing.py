"""Modules whose code repeats a width as a number: their forward runs with those numbers replaced.

`view(B, T, 4, 16)`, `reshape(B, N, 3, heads, C // heads)`, `split(8)`: when channels are removed, the
number no longer fits, and no parameter says so. Such a module keeps its class as a base, its
parameters and its code; in its forward, the arguments of the named calls are replaced.
"""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from swan_surgery.calls.arguments import Replacement, after
from swan_surgery.calls.functions import NAMED
from swan_surgery.calls.mode import CallMode, Change, guard_of
from swan_surgery.models.subclasses import maker_of, subclass_of


class Resized(nn.Module):
    """Mixin in front of a module's own class: `replacements` by mode (training or not)."""

    replacements: dict[bool, dict[tuple[str, int], dict[int, Replacement]]]
    call_sites: dict[bool, dict[tuple[str, int], str]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the module's own class, with numbers replaced.

        Raises:
            PathError: the input takes another path through the code than the one that was mapped.
        """
        # einops tells torch.compile to take its calls as they are, past all modes.
        if torch.compiler.is_compiling() and _has_named(self.replacements[self.training]):
            return _UNCOMPILED[0](self, args, kwargs)
        return self.replacing(*args, **kwargs)

    def replacing(self, *args: Any, **kwargs: Any) -> Any:
        """The forward itself."""
        numbers, sites = self.replacements[self.training], self.call_sites[self.training]
        changes = {call: Change(own, site=sites.get(call, "")) for call, own in numbers.items()}
        guard = guard_of(changes)
        with CallMode(changes, guard):
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


_UNCOMPILED: list[Callable[[Resized, Any, Any], Any]] = []


def _has_named(changed: Iterable[tuple[str, int]]) -> bool:
    return any(function in NAMED for function, _ in changed)


def _run(module: Resized, args: Any, kwargs: Any) -> Any:
    return module.replacing(*args, **kwargs)


def _make_uncompiled() -> None:
    """Beforehand: torch.compile cannot."""
    if not _UNCOMPILED:
        _UNCOMPILED.append(torch.compiler.disable(_run))


def resized(base: type[nn.Module]) -> tuple[tuple[type, ...], dict[str, Any]]:
    """The subclass of a class whose numbers are replaced."""
    if "einops.einops" in sys.modules:  # a pickle, too, makes its classes here
        _make_uncompiled()
    name = f"Resized{base.__name__}"
    return (Resized, base), {"__name__": name, "__qualname__": name}


def resize_(
    module: nn.Module,
    call: tuple[str, int],
    leaf: int,
    number: Replacement,
    *,
    training: bool,
    site: str = "",
) -> None:
    """Replace one number in one call of a module on a private copy; `site` is where it is called.

    A factor is for what the call is given by now: an earlier cut may have replaced that already.
    """
    if maker_of(module) is not resized:
        module.replacements = {True: {}, False: {}}  # type: ignore[assignment]
        module.call_sites = {True: {}, False: {}}  # type: ignore[assignment]
        module.__class__ = subclass_of(type(module), resized)
    assert isinstance(module, Resized)  # noqa: S101 - made so above
    if call[0] in NAMED:
        _make_uncompiled()
    own = module.replacements[training].setdefault(call, {})
    own[leaf] = after(own[leaf], number) if leaf in own else number
    if site:
        module.call_sites[training][call] = site


__all__ = ["Resized", "resize_", "resized"]
