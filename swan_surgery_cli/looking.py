"""Commands that look at models: `inspect`, `tradeoff`, `report`, `latency`, and the `demo`."""

from pathlib import Path
from typing import Annotated

import typer

from swan_surgery_cli.app import command
from swan_surgery_cli.options import (
    AsJson,
    Before,
    Data,
    Name,
    Reading,
    Runtime,
    Saved,
    Shapes,
    Threads,
    Weights,
)


@command(
    "inspect",
    work="inspecting:inspect_command",
    short_help="What can be cut, what hangs together, what stays.",
)
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


@command(
    "tradeoff",
    work="tradeoff:tradeoff_command",
    short_help="What a model would be worth at several sizes.",
)
def tradeoff_command(
    model: Name,
    data: Data,
    weights: Weights = None,
    macs: Annotated[
        str | None,
        typer.Option(help="Shares of the multiply-adds; by default 0.9,0.75,0.5,0.25,0.1."),
    ] = None,
    params: Annotated[
        str | None, typer.Option(help="Shares of the parameters, in place of --macs.")
    ] = None,
    round_to: Annotated[
        str,
        typer.Option(
            help="Widths become multiples of this number; auto takes 8, or less where 8 would leave much of a budget unused."
        ),
    ] = "auto",
    labels: Annotated[  # noqa: FBT002 - a flag on the command line
        bool,
        typer.Option(
            "--labels", help="Score by the labels, and show the accuracy on samples held out."
        ),
    ] = False,
    svg: Annotated[Path | None, typer.Option(help="Write the curve as a picture.")] = None,
    assignments: Reading = None,
    threads: Threads = None,
    as_json: AsJson = False,  # noqa: FBT002 - a flag on the command line
) -> None:
    """Score the channels once, cut to several budgets, and show what is left: before `compress`, without training.

    Without --labels it shows how much of the model's outputs the smaller ones explain, on data held out.
    """


@command("demo", work="demo:demo", short_help="A digits network, cut to a quarter and compared.")
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


@command(
    "report",
    work="shipping:report_command",
    short_help="Before and after: cost, size, latency, widths.",
)
def report_command(
    model: Name,
    file: Saved,
    weights: Before = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML file.")] = None,
    markdown: Annotated[bool, typer.Option(help="Print markdown.")] = False,  # noqa: FBT002
    runtime: Runtime = "eager",
    shapes: Shapes = None,
    threads: Threads = None,
    as_json: AsJson = False,  # noqa: FBT002 - a flag on the command line
) -> None:
    """Compare a model before and after: cost, size, memory, latency, and widths layer by layer."""


@command("latency", work="shipping:latency_command", short_help="Milliseconds per forward pass.")
def latency_command(
    model: Name,
    file: Annotated[
        Path | None, typer.Argument(help="A pruned model to compare with, of swan.save.")
    ] = None,
    weights: Before = None,
    runtime: Annotated[str, typer.Option(help="eager, compile or onnxruntime.")] = "eager",
    shapes: Shapes = None,
    seconds: Annotated[
        float, typer.Option(min=0.001, help="How long to measure each model.")
    ] = 2.0,
    threads: Threads = None,
    as_json: AsJson = False,  # noqa: FBT002 - a flag on the command line
) -> None:
    """Measure milliseconds per forward pass; of two models in turns."""
