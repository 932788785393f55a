"""`inspect`: a model's channel map as tables or JSON."""

import json

import typer
from rich.console import Console

from swan_surgery_cli.work.inspect_tables import tables
from swan_surgery_cli.work.inspection import inspect_model
from swan_surgery_cli.work.models import build_model, parse_inputs
from swan_surgery_cli.work.waiting import on_threads, waiting


# Columns of a table that goes to a file or a pipe, where no terminal says how wide it is.
_FILE_WIDTH = 140


def inspect_command(
    *, model: str, shapes: list[str] | None, everything: bool, as_json: bool
) -> None:
    """Print what can be cut, what hangs together, what stays and why, and the cost."""
    with waiting(f"mapping {model}"), on_threads(1):
        subject = build_model(model)
        inputs = parse_inputs(shapes or [], subject)
        inspection = inspect_model(model, subject.model, inputs)
    if as_json:
        typer.echo(json.dumps(inspection.to_json(), indent=2))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    for table in tables(inspection, everything=everything):
        console.print(table)
