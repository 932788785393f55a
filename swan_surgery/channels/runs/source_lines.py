"""The line of a model's code that called an operation, found on the running stack."""

import inspect
import linecache
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from traceback import walk_tb
from types import CodeType, FrameType

import torch


_PACKAGE = str(Path(__file__).parents[2])
_TORCH = str(Path(torch.__file__).parent)
_STANDARD = sysconfig.get_path("stdlib")
_INSTALLED = ("site-packages", "dist-packages")


def calling_line(below: CodeType) -> str:
    """The innermost line outside torch, as `my_model.py:31   return torch.cumsum(x, 1)`.

    Args:
        below: the function that runs the model; what called it is not the model's code.

    Returns:
        A line of the user's own, else one of an installed package, else "".
    """
    frame = inspect.currentframe()
    places = []
    while frame is not None and frame.f_code is not below:
        places.append((frame, frame.f_lineno))
        frame = frame.f_back
    return _innermost(places)


def raising_line(err: BaseException) -> str:
    """The innermost line outside torch through which an error came, as of `calling_line`."""
    return _innermost(reversed(list(walk_tb(err.__traceback__))))


def _innermost(places: Iterable[tuple[FrameType, int]]) -> str:
    installed = ""
    for frame, number in places:
        name = frame.f_code.co_filename
        if not _is_machinery(name):
            if not _is_installed(name):
                return _text(frame, number)
            installed = installed or _text(frame, number)
    return installed


def _is_installed(filename: str) -> bool:
    return any(part in _INSTALLED for part in Path(filename).parts)


def _is_machinery(filename: str) -> bool:
    """Code of torch, of this package, of Python itself, or without a file."""
    if filename.startswith(("<frozen", "<string>")):
        return True
    path = Path(filename)
    if path.is_relative_to(_TORCH) or path.is_relative_to(_PACKAGE):
        return True
    return path.is_relative_to(_STANDARD) and not _is_installed(filename)


def _text(frame: FrameType, number: int) -> str:
    name = frame.f_code.co_filename
    code = linecache.getline(name, number, frame.f_globals).strip()
    return f"{_short(name)}:{number}" + (f"   {code}" if code else "")


def _short(filename: str) -> str:
    """Relative to the folder of installed packages or to the working folder, if it lies there."""
    path = Path(filename)
    for index, part in enumerate(path.parts):
        if part in _INSTALLED:
            return str(Path(*path.parts[index + 1 :]))
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
