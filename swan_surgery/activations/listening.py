"""Listens to the activations of a model while it runs: modules, calls of functions, and what they are given."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from swan_surgery.activations.pointwise import FUNCTIONS, settings_of
from swan_surgery.calls.mode import Called, NumberingMode
from swan_surgery.calls.swapping import first_argument


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a module."""

    module: str
    number: int


@dataclass(frozen=True, slots=True)
class Met:
    """An activation that ran once.

    Attributes:
        runs: of the modules that were running, outermost first; an activation module is the last.
        function: that was called; "" for the module itself, before it ran.
        site: where the call stands in the code.
        settings: of the call.
        given: what it was given, in the caller's words (`note`).
    """

    runs: tuple[Run, ...]
    function: str
    site: str
    settings: Mapping[str, Any]
    given: Any


@dataclass(slots=True)
class Heard:
    """All that was heard in one run, in order."""

    met: list[Met] = field(default_factory=list)


class _Listening(NumberingMode):
    def __init__(self, note: Callable[[Tensor], Any]) -> None:
        super().__init__(frozenset(FUNCTIONS))
        self.note, self.heard = note, Heard()
        self.runs: list[Run] = [Run("", 0)]
        self.count = 0

    def start(self, module: str, *, is_activation: bool, given: Any) -> None:
        self.count += 1
        self.runs.append(Run(module, self.count))
        if is_activation and isinstance(given, Tensor):
            self.heard.met.append(Met(tuple(self.runs), "", "", {}, self.note(given)))

    def stop(self) -> None:
        self.runs.pop()

    def around(self, func: Any, args: Any, kwargs: dict[str, Any], called: Called) -> Any:
        given = first_argument(args, kwargs)
        if isinstance(given, Tensor):
            settings = settings_of(called.function, args, kwargs)
            self.heard.met.append(
                Met(tuple(self.runs), called.function, called.site, settings, self.note(given))
            )
        return func(*args, **kwargs)


def listen(
    model: nn.Module,
    run: Callable[[], Any],
    *,
    activations: Iterable[str] = (),
    note: Callable[[Tensor], Any] = lambda tensor: tuple(tensor.shape),
) -> Heard:
    """Run a private model and hear what its activations are given.

    Args:
        model: hooks are put on it, and removed again.
        run: runs it.
        activations: names of modules that are activations.
        note: what is kept of a tensor.
    """
    mode = _Listening(note)
    known = frozenset(activations)
    handles = [
        handle
        for name, module in model.named_modules()
        if name
        for handle in (
            module.register_forward_pre_hook(
                _starting(mode, name, name in known), with_kwargs=True
            ),
            module.register_forward_hook(_stopping(mode), always_call=True),
        )
    ]
    try:
        with mode:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return mode.heard


def _starting(
    mode: _Listening,
    name: str,
    is_activation: bool,  # noqa: FBT001 - bound at once
) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
        mode.start(name, is_activation=is_activation, given=first_argument(args, kwargs))

    return hook


def _stopping(mode: _Listening) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, _args: Any, _out: Any) -> None:
        mode.stop()

    return hook
