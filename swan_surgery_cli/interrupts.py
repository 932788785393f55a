"""Ctrl-C while nothing can tidy up: torch takes seconds to import, and a traceback from there says nothing."""

import os
import signal
from typing import Any


_INTERRUPTED = 130  # what shells say of a program that Ctrl-C ended


def _end(*_: Any) -> None:
    os._exit(_INTERRUPTED)  # inside an import an exception may end up anywhere


def end_on_interrupt() -> None:
    """From now on Ctrl-C ends the process at once; where it is ignored, it stays so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_on_interrupt() -> None:
    """Everything is imported: Ctrl-C is an exception again, so that what runs can tidy up."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
