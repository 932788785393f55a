"""The commands. Everything they print is made elsewhere; errors are `OneLineErrors`'."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from swan_surgery.cli.adapting import adapt_command
from swan_surgery.cli.compressing import compress_command
from swan_surgery.cli.demo_output import Teller, closing, file_list, result_table, verdict
from swan_surgery.cli.errors import OneLineErrors
from swan_surgery.cli.inspect_tables import tables
from swan_surgery.cli.inspection import inspect_model
from swan_surgery.cli.models import build_model, parse_inputs
from swan_surgery.cli.routing import route_command
from swan_surgery.cli.shipping import export_command, latency_command, prune_command, report_command
from swan_surgery.cli.swapping import swap_command
from swan_surgery.cli.training import train_command
from swan_surgery.cli.waiting import waiting
from swan_surgery.environment.interrupts import raise_on_interrupt
from swan_surgery.environment.machine import own_version
from swan_surgery.experiments.digits import DemoSettings, run_study


# Columns of a table that goes to a file or a pipe, where no terminal says how wide it is.
_FILE_WIDTH = 140

app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Gate, train and cut the channels of an existing network.",
)


def main() -> None:
    """Entry point of the `swan-surgery` command."""
    raise_on_interrupt()
    app()


def _show_version(value: bool) -> None:  # noqa: FBT001 - typer's callback
    if value:
        typer.echo(f"swan-surgery {own_version()}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[  # noqa: FBT002 - handled by its callback
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: Annotated[  # noqa: FBT002 - taken off by OneLineErrors
        bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")
    ] = False,
) -> None:
    pass


@app.command("inspect", short_help="What can be cut, what hangs together, what stays.")
def inspect_command(
    model: Annotated[
        str,
        typer.Argument(
            help="A torchvision name (resnet50, torchvision:fcn_resnet50), timm:NAME, or "
            "package.module:factory; a factory returns a model, or (model, example_inputs)."
        ),
    ],
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            help="Input shape, like 1,3,224,224, or 1,16:int64 for token ids; once per input. "
            "For detection models one image each, like 3,480,640. Guessed by default.",
        ),
    ] = None,
    everything: Annotated[  # noqa: FBT002 - a flag on the command line
        bool, typer.Option("--all", help="Show every layer, not only the first 40.")
    ] = False,
    as_json: Annotated[  # noqa: FBT002 - a flag on the command line
        bool, typer.Option("--json", help="Print JSON instead of tables.")
    ] = False,
) -> None:
    """Show which channels can be cut, which belong together, which must stay and why, and the cost.

    Weights are random; nothing is downloaded.
    """
    with waiting(f"mapping {model}"), _one_thread():
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


@contextmanager
def _one_thread() -> Iterator[None]:
    """Labels and the demo's images are tiny: more threads wait for each other, on a busy machine long.

    Measured with two shared cores under load: the map of vit_b_16 takes 2 s with one thread, 38 s with
    two; inspecting maskrcnn_resnet50_fpn, which runs on data, takes 20 s and 50 s.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@app.command(short_help="A digits network, cut to a quarter and compared.")
def demo(
    seeds: Annotated[
        int, typer.Option(min=1, help="How many seeds; more than one shows the spread.")
    ] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/demo"),
    epochs: Annotated[
        int | None, typer.Option(help="Epochs in all: 2/5 dense, 2/5 with gates, 1/5 fine-tuning.")
    ] = None,
    macs: Annotated[float, typer.Option(help="Share of the multiply-adds to keep.")] = 0.25,
) -> None:
    """Train a digits network, close three quarters of its work, and compare. About a minute a seed."""
    settings = (
        DemoSettings(macs=macs) if epochs is None else DemoSettings.of_length(epochs, macs=macs)
    )
    console = Console()
    console.print(
        "This demo takes a network that reads handwritten digits, puts a switch on every channel, "
        "trains switches and weights together, removes what was switched off, and compares.",
        highlight=False,
    )
    with _one_thread():
        study, report = run_study(range(seeds), settings, out, Teller(console))
    for part in (
        closing(report),
        "",
        result_table(study),
        verdict(study),
        "",
        file_list(out, study),
    ):
        console.print(part, highlight=False, markup=False, soft_wrap=isinstance(part, str))


app.command("train", short_help="From a config to a fine-tuned smaller model.")(train_command)
app.command("prune", short_help="Cut by gates, or in one shot by a score.")(prune_command)
app.command("compress", short_help="Score, cut, compensate and train on.")(compress_command)
app.command("adapt", short_help="Widths that look at the input.")(adapt_command)
app.command("route", short_help="A short way for easy inputs.")(route_command)
app.command("swap", short_help="Other activations, the same function at first.")(swap_command)
app.command("report", short_help="Before and after: cost, size, latency, widths.")(report_command)
app.command("export", short_help="To ONNX or torch.export, run and compared.")(export_command)
app.command("latency", short_help="Milliseconds per forward pass.")(latency_command)
