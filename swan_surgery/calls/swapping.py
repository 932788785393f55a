"""Modules in whose forward some calls run a submodule in place of the torch function.

`F.relu(x)`, `x.relu()`, or one `nn.ReLU` that a block runs three times: no attribute stands for such an
activation alone. The module that runs it keeps its class as a base, its parameters and its code; what
is called instead is a submodule of it, with parameters of its own.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from torch import nn

from swan_surgery.calls.mode import CallMode, Change, guard_of
from swan_surgery.calls.sites import Call
from swan_surgery.models.subclasses import subclass_of


class Swapped(nn.Module):
    """Mixin in front of a module's own class: `swapped_calls` by mode (training or not).

    Each is a call of a torch function -> the submodule that runs instead, and where the call stands.
    """

    swapped_calls: dict[bool, dict[Call, tuple[str, str]]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the module's own class, with some functions replaced.

        Raises:
            PathError: the input takes another path through the code than the one that was mapped.
        """
        changes = {
            call: Change(instead=_of_first_argument(self.get_submodule(name)), site=site)
            for call, (name, site) in self.swapped_calls[self.training].items()
        }
        guard = guard_of(changes)
        with CallMode(changes, guard):
            result = super().forward(*args, **kwargs)
        guard.finish()
        return result


def _of_first_argument(module: nn.Module) -> Callable[..., Any]:
    """Runs a module on what an activation is given; its settings are the module's own."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return module(first_argument(args, kwargs))

    return run


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a function of one tensor is called on."""
    return args[0] if args else kwargs.get("input", kwargs.get("self"))


def swapped(base: type[nn.Module]) -> tuple[tuple[type, ...], dict[str, Any]]:
    """The subclass of a class in whose forward calls are replaced."""
    name = f"Swapped{base.__name__}"
    return (Swapped, base), {"__name__": name, "__qualname__": name}


def swap_call_(module: nn.Module, call: Call, name: str, *, training: bool, site: str = "") -> None:
    """Run the submodule `name` in place of one call of a private module; `site` is where it stands."""
    if not isinstance(module, Swapped):
        module.swapped_calls = {True: {}, False: {}}  # type: ignore[assignment]
        module.__class__ = subclass_of(type(module), swapped)
    assert isinstance(module, Swapped)  # noqa: S101 - made so above
    module.swapped_calls[training][call] = name, site


def undo_calls_(model: nn.Module) -> dict[str, dict[bool, dict[Call, tuple[str, str]]]]:
    """Let the functions of a private model run again; what is given back goes into `redo_calls_`."""
    found = {name: own.swapped_calls for name, own in model.named_modules() if _is_swapped(own)}
    for name in found:
        vars(model.get_submodule(name))["swapped_calls"] = {True: {}, False: {}}
    return found


def redo_calls_(
    model: nn.Module, calls: Mapping[str, dict[bool, dict[Call, tuple[str, str]]]]
) -> None:
    """Replace the calls again that `undo_calls_` let run."""
    for name, own in calls.items():
        vars(model.get_submodule(name))["swapped_calls"] = own


def _is_swapped(module: nn.Module) -> TypeGuard[Swapped]:
    return isinstance(module, Swapped)


__all__ = ["Swapped", "first_argument", "redo_calls_", "swap_call_", "swapped", "undo_calls_"]
