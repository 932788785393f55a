"""Locks on folders that end with the process that holds them, however it ends.

Where the system has none (Windows, some network drives) nobody can tell, and nothing is refused.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from swan_surgery.errors import WritingError


def _flock() -> Any:
    try:
        return import_module("fcntl")
    except ImportError:  # Windows
        return None


_FCNTL = _flock()


@contextmanager
def locked(folder: Path) -> Iterator[bool | None]:
    """Hold a folder inside the block: True; False where another thread or process holds it.

    None where nobody can tell: no such folder, or a system without such locks.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        yield None
        return
    try:
        yield _try(handle)
    finally:
        os.close(handle)  # which lets go


def _try(handle: int) -> bool | None:
    if _FCNTL is None:
        return None
    try:
        _FCNTL.flock(handle, _FCNTL.LOCK_EX | _FCNTL.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextmanager
def alone_in(folder: Path, what: str) -> Iterator[None]:
    """Only one block at a time runs in a folder, in all processes.

    Raises:
        WritingError: another one does; says `what`, as in "training".
    """
    with locked(folder) as is_held:
        if is_held is False:
            raise WritingError(
                f"another {what} is under way in {folder}: wait for it, end it, or take another folder"
            )
        yield
