"""Files that are written whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from swan_surgery.environment.locking import locked
from swan_surgery.errors import InputError, WritingError


# Folders of unfinished files; a writer holds its own, so that what a killed one left can be told.
_UNFINISHED = ".swan-unfinished-"


def as_path(path: object, call: str) -> Path:
    """A path that a user gave.

    Args:
        path: a string or a path.
        call: how it is given, for the message: `swan.save(model, path)`.

    Raises:
        InputError: it is neither.
    """
    try:
        return Path(path)  # type: ignore[arg-type]  # that is what is found out
    except TypeError:
        raise InputError(
            f"a path is a string or a pathlib.Path, got {type(path).__name__}; the call is {call}"
        ) from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path of the same name; what is written there takes its place at the end of the block.

    What else the block writes beside it comes along. Where the block raises, `path` stays as it was and
    nothing is left over; what a killed process has left in this folder goes. The permissions are those
    that `path` had, or a new file has here.

    Raises:
        WritingError: the operating system refused, or `path` is a device, a pipe or a folder.
    """
    target = _target(path)
    try:
        with _room_in(target.parent) as room:
            temporary = room / target.name
            temporary.touch()
            mode = (target if target.exists() else temporary).stat().st_mode
            yield temporary
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
            temporary.chmod(mode)  # safetensors makes files that nobody else can read
            for other in sorted(room.iterdir(), key=temporary.__eq__):  # the file itself comes last
                other.replace(target.parent / other.name)
    except (OSError, SafetensorError) as err:
        if isinstance(err, WritingError):
            raise
        reason = err.strerror if isinstance(err, OSError) and err.strerror else str(err)
        raise WritingError(f"cannot write {path}: {reason}") from err


def _target(path: Path) -> Path:
    """Where a path leads: a link stays one."""
    try:
        target = path.resolve()
        is_taken = target.exists() and not target.is_file()
        has_folder = target.parent.is_dir()
    except (OSError, ValueError, RuntimeError) as err:  # too long, a NUL inside, a loop of links
        raise WritingError(f"cannot write {path}: {err}") from err
    if not has_folder:
        raise WritingError(f"cannot write {path}: there is no folder {target.parent}")
    if is_taken:
        raise WritingError(
            f"cannot write {path}: it exists and is no regular file; choose another path"
        )
    return target


@contextmanager
def _room_in(folder: Path) -> Iterator[Path]:
    """A new folder, held while it is in use."""
    for left in folder.glob(f"{_UNFINISHED}*"):
        with locked(left) as is_held:
            if is_held:
                shutil.rmtree(left, ignore_errors=True)
    while True:
        room = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder))
        with locked(room) as is_held:
            # Another writer may have taken it for left over before it was held.
            if is_held is False or not room.is_dir():
                continue
            try:
                yield room
            finally:
                shutil.rmtree(room, ignore_errors=True)
            return
