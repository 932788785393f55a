"""Memory that is free, but that the C library keeps."""

import ctypes
import sys
from collections.abc import Callable
from functools import cache


def hand_back() -> None:
    """Give free memory back to the system, where its C library can (glibc).

    It keeps what was freed, in a pool per thread: many threads that hold large tensors one after the other
    come to hold them side by side.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # musl has none
        return None
