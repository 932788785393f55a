"""Errors on the command line: one line on stderr, exit code 2; the traceback on request."""

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from swan_surgery_cli.wording import spoken


_DEBUG = "--debug"


class OneLineErrors(TyperGroup):
    """A group of commands whose errors are one line each; `--debug` may stand anywhere."""

    def main(self, args: Any = None, **options: Any) -> Any:  # type: ignore[override]
        """Run a command and exit: 0 when it worked, 2 when not, 130 when interrupted."""
        words = list(sys.argv[1:] if args is None else args)
        debug = _DEBUG in words
        options["standalone_mode"] = False
        try:
            code = super().main(args=[word for word in words if word != _DEBUG], **options)
        except typer.Abort:
            sys.exit(130)
        except Exception as err:
            if debug:
                raise
            typer.echo(f"error: {one_line(err)}", err=True)
            sys.exit(2)
        sys.exit(code if isinstance(code, int) else 0)


def one_line(err: Exception) -> str:
    """What went wrong, without line breaks; an unexpected error also says its class."""
    if isinstance(err, typer.TyperException):
        text = err.format_message()
    elif type(err).__module__.startswith("swan_surgery"):
        text = spoken(str(err))
    else:
        text = f"{type(err).__name__}: {err} (run again with {_DEBUG} for the traceback)"
    return " ".join(text.split())
