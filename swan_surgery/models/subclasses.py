"""Subclasses made on the spot: the same one for the same purpose, and instances that pickle and copy.

A module whose behaviour changes keeps its class as a base, so `isinstance` and everything it can do
stay. Its new class is found again from the base and the purpose, wherever the module is unpickled.
"""

import weakref
from collections.abc import Callable, Iterator
from typing import Any, cast

from torch import nn


# (bases, namespace) of the subclass of a class; the rest of the arguments says for what.
Maker = Callable[..., tuple[tuple[type, ...], dict[str, Any]]]
_Key = tuple[Maker, type, tuple[Any, ...]]

_MADE: "weakref.WeakValueDictionary[_Key, type]" = weakref.WeakValueDictionary()


def subclass_of(base: type[nn.Module], make: Maker, *purpose: Any) -> type[nn.Module]:
    """The subclass that `make(base, *purpose)` describes, called as the base unless it names itself.

    Args:
        base: a class of modules.
        make: a function that can be imported by its name.
        purpose: hashable and picklable; the same purpose gives the same class.
    """
    key = (make, base, purpose)
    made = _MADE.get(key)
    if made is None:
        bases, namespace = make(base, *purpose)
        name = namespace.pop("__name__", base.__name__)
        own = {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "__reduce_ex__": _reduce,
            "_swan_made": key,
        }
        made = _MADE.setdefault(key, type(name, bases, own | namespace))
    return made


def maker_of(module: nn.Module) -> Maker | None:
    """What made the class of a module; None for a class that was written."""
    key: _Key | None = vars(type(module)).get("_swan_made")
    return None if key is None else key[0]


def written_class(module: nn.Module, make: Maker) -> type[nn.Module]:
    """The class of a module without what `make` put on top."""
    key: _Key | None = vars(type(module)).get("_swan_made")
    return key[1] if key is not None and key[0] is make else type(module)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that somebody wrote, under all that was put on top: it can be found by its name."""
    kind = type(module)
    while (key := vars(kind).get("_swan_made")) is not None:
        kind = key[1]
    return kind


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    # Modules are made by `__new__` alone: (copyreg.__newobj__, (class, ...), state, ...).
    _, arguments, *rest = cast(tuple[Any, ...], object.__reduce_ex__(self, max(2, int(protocol))))
    # The base may give a state of its own, which knows nothing of what the subclass holds.
    named = [name for kind in _added(self) for name in vars(kind).get("__annotations__", ())]
    held = {name: vars(self)[name] for name in named if name in vars(self)}
    return _rebuild, (*vars(type(self))["_swan_made"], held, *arguments[1:]), *rest


def _added(module: nn.Module) -> Iterator[type]:
    """The classes that makers put in front of the one that was written."""
    written: type = type(module)
    while (key := vars(written).get("_swan_made")) is not None:
        written = key[1]
    return (kind for kind in type(module).__mro__ if not issubclass(written, kind))


def _rebuild(
    make: Maker,
    base: type[nn.Module],
    purpose: tuple[Any, ...],
    held: dict[str, Any],
    *arguments: Any,
) -> Any:
    made = subclass_of(base, make, *purpose)
    module = made.__new__(made, *arguments)
    vars(module).update(held)
    return module
