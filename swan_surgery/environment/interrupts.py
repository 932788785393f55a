"""Ctrl-C while the command starts: torch takes seconds to import, and a traceback from there says nothing.

Imported first of all, and light; importing it acts, in our own command alone.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any


_COMMAND = "swan-surgery"
_INTERRUPTED = 130  # what shells say of a program that Ctrl-C ended


def _end(*_: Any) -> None:
    os._exit(_INTERRUPTED)  # inside an import an exception may end up anywhere


def end_on_interrupt() -> None:
    """In our own command, Ctrl-C ends the process at once; programs that import the library stay as they are."""
    is_command = any(Path(word).stem == _COMMAND for word in sys.argv[:1])
    if is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_on_interrupt() -> None:
    """Everything is imported: Ctrl-C is an exception again, so that what runs can tidy up."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


end_on_interrupt()
