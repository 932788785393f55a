"""What a rehearsal finds: an operation that did not follow, or code that refused a narrower width."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from traceback import walk_tb
from types import FrameType
from typing import Any

from torch import Tensor

from swan_surgery.channels.labels.makers import Makers
from swan_surgery.channels.runs.source_lines import raising_line


class Diverged(Exception):  # noqa: N818 - a signal inside the package, never shown
    """The rehearsed run left the recorded path at operation `index`."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


@dataclass(frozen=True, slots=True)
class Raised:
    """The model's Python code refused: in which module, at which line, with what kind of error.

    `at_hand` are the tensors that it held there, function by function, the innermost first: by the
    operation that made each and the number of the output.
    """

    module: str
    line: str
    error: str
    at_hand: tuple[tuple[tuple[int, int], ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Failure:
    """An operation that did not follow: by its shapes, or only by which channels met.

    `leaves` are the numbers its torch function was called with, if that is tracked. `raised` says who
    refused where it was no operation but code in front of operation `index`. What comes after a module
    was skipped may be a consequence: that `is_tentative`.
    """

    index: int
    labels_only: bool = False
    leaves: tuple[Any, ...] = ()
    raised: Raised | None = None
    is_tentative: bool = False


def failure_of(
    err: BaseException, index: int, *, names: Mapping[int, str], makers: Makers
) -> Failure:
    """Who is to blame for an error.

    Args:
        err: what came out of the model's code.
        index: the operation that would have come next.
        names: of modules, by identity.
        makers: of the tensors of this run.
    """
    if isinstance(err, Diverged):
        return Failure(err.index)
    module, frames = "", list[FrameType]()
    for frame, _ in walk_tb(err.__traceback__):
        name = names.get(id(_owner(frame)))
        if name is not None and name != module:
            module, frames = name, []
        frames.append(frame)
    held = [
        tuple(place for tensor in _tensors(frame) if (place := makers.of(tensor)) is not None)
        for frame in reversed(frames)
    ]
    at_hand = tuple(dict.fromkeys(filter(None, held)))
    return Failure(index, raised=Raised(module, raising_line(err), type(err).__name__, at_hand))


def _owner(frame: FrameType) -> Any:
    """What a method was called on."""
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None


def _tensors(frame: FrameType) -> Iterator[Tensor]:
    for value in list(frame.f_locals.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from (item for item in value if isinstance(item, Tensor))
