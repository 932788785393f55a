"""The call mode: finds the k-th call of a torch function in one run of a module, and changes it.

Calls are numbered per run of every module, its children's calls included, by the name of the torch
function. The numbering is written here once; the channel map numbers with it while it runs a model
(`channels.runs.tracing`), and what acts on calls later finds them by the same numbers: replaced
numbers (`calls.resizing`), statistics that count gates (`gates.weighted_statistics`).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from swan_surgery.calls.arguments import Replacement, leaves_of, replaced
from swan_surgery.calls.einops_moves import show_einops
from swan_surgery.calls.functions import SCALING
from swan_surgery.calls.sites import Call, PathGuard, call_site
from swan_surgery.calls.slim_forms import SLIM_FORMS


def counted_name(function: Any, args: Any) -> str | None:
    """The name under which a call counts; None if it does not.

    Sizes that torch.jit turns into integer scalars make no calls of their own.
    """
    name: str = getattr(function, "__name__", "")
    if name not in SCALING:
        return name
    arrays = (leaf for leaf in leaves_of(args) if isinstance(leaf, Tensor))
    return name if any(leaf.ndim > 0 or leaf.is_floating_point() for leaf in arrays) else None


class Numbering:
    """Numbers the calls in the runs of modules that are under way, the innermost run last."""

    def __init__(self) -> None:
        self.runs: list[tuple[str, Counter[str]]] = [("", Counter())]

    def enter(self, module: str) -> None:
        """A module starts to run."""
        self.runs.append((module, Counter()))

    def leave(self) -> None:
        """The innermost module has run."""
        self.runs.pop()

    def count(self, name: str) -> tuple[str, int]:
        """Count a call for every run; the innermost module and the number there."""
        for _, counts in self.runs:
            counts[name] += 1
        module, counts = self.runs[-1]
        return module, counts[name]


@dataclass(frozen=True, slots=True)
class Called:
    """Which call it is: the `number`-th of a function in one run of a module, and where it stands."""

    module: str
    function: str
    number: int
    site: str


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of one call.

    Attributes:
        numbers: position among the leaves of the arguments -> the number put there.
        instead: called in place of the function, with the same arguments.
        site: where in the code the call stands (`call_site`); "" where that is not checked.
    """

    numbers: Mapping[int, Replacement] = field(default_factory=dict)
    instead: Callable[..., Any] | None = None
    site: str = ""


def guard_of(changes: Mapping[Call, Change]) -> PathGuard:
    """Checks during one run that these calls are made where they were planned."""
    return PathGuard({call: own.site for call, own in changes.items() if own.site})


class CallMode(TorchFunctionMode):
    """Changes the named calls during one run of one module.

    A call that an inner run replaces still counts for the runs around it (`outer`): they do not see
    it. Everything that runs `instead` is out of sight of all of them.
    """

    def __init__(
        self,
        changes: Mapping[Call, Change],
        guard: PathGuard | None = None,
        outer: Sequence["CallMode"] = (),
    ) -> None:
        """Make a mode for one run.

        Args:
            changes: what becomes of which call.
            guard: of `guard_of(changes)`; its `finish` is to be called when the module has run
                (torch.compile knows no methods of modes).
            outer: the modes of the runs around this one.
        """
        super().__init__()
        show_einops()
        self._changes = changes
        self._names = frozenset(name for name, _ in changes)
        self._guard = guard or PathGuard({})
        self._outer = outer
        self.counts: Counter[str] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the call as it is, or changed.

        Raises:
            PathError: it stands at another place in the code than the one that was meant.
        """
        kwargs = kwargs or {}
        name = counted_name(func, args)
        if name not in self._names or name is None:
            return func(*args, **kwargs)
        self.counts[name] += 1
        call = (name, self.counts[name])
        self._guard.check(call)
        change = self._changes.get(call)
        if change is None:
            return func(*args, **kwargs)
        if change.numbers:
            args, kwargs = replaced((args, kwargs), change.numbers)
            func = SLIM_FORMS.get(name, func)
        if change.instead is None:
            return func(*args, **kwargs)
        for mode in self._outer:
            mode.counts[name] += 1
        with torch._C.DisableTorchFunction():  # noqa: SLF001 - as torch.overrides does
            return change.instead(*args, **kwargs)


class NumberingMode(TorchFunctionMode):
    """Numbers the calls of some functions while a whole model runs, and says where each stands."""

    def __init__(self, names: frozenset[str]) -> None:
        """`names`: of the torch functions whose calls count."""
        super().__init__()
        show_einops()
        self.numbering = Numbering()
        self._names = names

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count the call, and hand it on."""
        kwargs = kwargs or {}
        name = counted_name(func, args)
        if name not in self._names or name is None:
            return func(*args, **kwargs)
        module, number = self.numbering.count(name)
        return self.around(func, args, kwargs, Called(module, name, number, call_site()))

    def around(self, func: Any, args: Any, kwargs: dict[str, Any], called: Called) -> Any:
        """Run a call that counts."""
        del called
        return func(*args, **kwargs)
