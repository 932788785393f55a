"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident

from safetensors import SafetensorError

from swan_surgery.errors import WritingError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; what is written there takes its place at the end of the block.

    Where the block raises, `path` stays as it was and nothing is left over. The permissions are those
    that `path` had, or a new file has here.

    Raises:
        WritingError: the operating system refused, or `path` is a device, a pipe or a folder.
    """
    target = path.resolve()  # a link stays one
    if not target.parent.is_dir():
        raise WritingError(f"cannot write {path}: there is no folder {target.parent}")
    if target.exists() and not target.is_file():
        raise WritingError(
            f"cannot write {path}: it exists and is no regular file; choose another path"
        )
    owner = f"{os.getpid()}-{get_ident()}"  # threads of one process write apart as well
    temporary = target.with_name(f".{target.stem}.{owner}{target.suffix}")
    try:
        try:
            temporary.touch()
            mode = (target if target.exists() else temporary).stat().st_mode
            yield temporary
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
            temporary.chmod(mode)  # safetensors makes files that nobody else can read
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as err:
        if isinstance(err, WritingError):
            raise
        reason = err.strerror if isinstance(err, OSError) and err.strerror else str(err)
        raise WritingError(f"cannot write {path}: {reason}") from err
