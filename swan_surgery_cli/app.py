"""The group of all commands, and how one is declared: its parameters here, its work imported when it runs."""

import functools
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any

import typer

from swan_surgery_cli.errors import OneLineErrors
from swan_surgery_cli.interrupts import raise_on_interrupt
from swan_surgery_cli.wording import speak_for


app = typer.Typer(
    cls=OneLineErrors,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Gate, train and cut the channels of an existing network.",
)
# Command -> `module:function` that does it.
WORK: dict[str, str] = {}


def command(
    name: str, *, work: str, short_help: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Declare a command by a function without a body: its parameters and docstring are what the user sees.

    Args:
        name: of the command.
        work: `module:function`, below `swan_surgery_cli.work`; takes the same parameters.
        short_help: in the list of commands.
    """
    WORK[name] = f"swan_surgery_cli.work.{work}"

    def declare(declared: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(declared)
        def run(**given: Any) -> None:
            speak_for(declared)
            does = work_of(name)
            raise_on_interrupt()
            does(**given)

        app.command(name, short_help=short_help)(run)
        return declared

    return declare


def work_of(name: str) -> Callable[..., None]:
    """What does a command, imported now."""
    module, _, function = WORK[name].partition(":")
    does: Callable[..., None] = getattr(import_module(module), function)
    return does


def _show_version(value: bool) -> None:  # noqa: FBT001 - typer's callback
    if value:
        typer.echo(f"swan-surgery {version('swan-surgery')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    show_version: Annotated[  # noqa: ARG001, FBT002 - handled by its callback
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: Annotated[  # noqa: ARG001, FBT002 - taken off by OneLineErrors
        bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
