"""Where in a model's code a torch function is called, so that another path is noticed.

Gates on statistics and numbers that are replaced belong to the k-th call of a function in one run of
a module. An input that takes another path (a larger image, a longer text) may make other calls: the
k-th one then stands elsewhere in the code. That is an error, never a wrong result.
"""

import sys
from collections.abc import Mapping
from types import FrameType

import torch

from swan_surgery.errors import PathError


# (torch function, number of the call in one run of a module)
Call = tuple[str, int]

# Between a model's code and a function mode there may be only the modules of this folder, and these:
# torch's own, and the module of the mode that the channel map runs under.
_BETWEEN = frozenset(
    {
        "torch._compile",
        "torch._dynamo.eval_frame",
        "torch._tensor",
        "torch.functional",
        "torch.nn.functional",
        "torch.overrides",
        "torch.utils._contextlib",
    }
)
_OURS = __name__.rpartition(".")[0] + "."


def call_site() -> str:
    """The place that is calling, as `Attention.forward+7`: a function and a line within it."""
    frame = sys._getframe(1)  # noqa: SLF001 - the documented way to the stack
    while _stands_between(frame) and frame.f_back is not None:
        frame = frame.f_back
    code = frame.f_code
    return f"{code.co_qualname}+{frame.f_lineno - code.co_firstlineno}"


def _stands_between(frame: FrameType) -> bool:
    module = str(frame.f_globals.get("__name__"))
    return module in _BETWEEN or module.startswith(_OURS)


class PathGuard:
    """Checks during one run of a module that the named calls are made where they were planned."""

    def __init__(self, sites: Mapping[Call, str]) -> None:
        """`sites`: the place of each call, by function and number."""
        self._sites = sites
        self._reached: set[Call] = set()

    def check(self, call: Call) -> None:
        """Note a call.

        Raises:
            PathError: it is made at another place.
        """
        wanted = self._sites.get(call)
        if wanted is None or torch.compiler.is_compiling():
            return
        self._reached.add(call)
        seen = call_site()
        if seen != wanted:
            raise PathError(_message(call, f"is made at {seen}, not at {wanted}"))

    def finish(self) -> None:
        """The module has run.

        Raises:
            PathError: a call was not made.
        """
        if torch.compiler.is_compiling():
            return
        for call in self._sites.keys() - self._reached:
            raise PathError(_message(call, f"at {self._sites[call]} was not made"))


def _message(call: Call, what: str) -> str:
    function, number = call
    return (
        f"call {number} of {function}() {what}: this input takes another path through the code than "
        f"the example inputs did; pass example inputs of this size or kind to swanify"
    )
