"""The command line, declared beside the library: help and completion need no torch, which takes seconds to import."""

import os
import sys
from importlib import import_module

from swan_surgery_cli.interrupts import end_on_interrupt


_COMPLETES = "_SWAN_SURGERY_COMPLETE"  # set by the shell's completion


def main() -> None:
    """Entry point of the `swan-surgery` command."""
    end_on_interrupt()
    if _COMPLETES in os.environ:
        # typer would have rich take the markup out of help texts: there is none, and rich takes as long as the rest.
        sys.modules["rich"] = None  # type: ignore[assignment]  # Python's way to say that there is no such module
    try:
        app = import_module("swan_surgery_cli.commands").app
    except ModuleNotFoundError as err:
        sys.stderr.write(
            f"error: the command line needs {err.name}; pip install 'swan-surgery[cli]'\n"
        )
        sys.exit(2)
    try:
        app()
    finally:
        end_on_interrupt()  # while Python shuts down


__all__ = ["main"]
