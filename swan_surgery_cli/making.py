"""Commands that make models: `train`, `prune`, `compress`, `adapt`, `route`, `swap`, `export`."""

from pathlib import Path
from typing import Annotated

import typer

from swan_surgery_cli.app import command
from swan_surgery_cli.options import (
    AsJson,
    Data,
    Macs,
    Name,
    Params,
    Reading,
    RoundTo,
    Saved,
    Shapes,
    Threads,
    Weights,
)


@command(
    "train",
    work="training:train_command",
    short_help="From a config to a fine-tuned smaller model.",
)
def train_command(
    config: Annotated[
        Path | None, typer.Argument(help="Settings as .toml or .yaml; see --template.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a setting, like macs=0.3; more than once."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="As --set data=...")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder; default out/NAME of the config.")
    ] = None,
    fresh: Annotated[  # noqa: FBT002 - a flag on the command line
        bool, typer.Option("--fresh", help="Start anew where a run was interrupted.")
    ] = False,
    template: Annotated[  # noqa: FBT002 - a flag on the command line
        bool, typer.Option("--template", help="Print all settings, explained, to start from.")
    ] = False,
    as_yaml: Annotated[  # noqa: FBT002 - a flag on the command line
        bool, typer.Option("--yaml", help="The template as YAML.")
    ] = False,
    as_json: Annotated[  # noqa: FBT002 - a flag on the command line
        bool, typer.Option("--json", help="Print result.json instead of text.")
    ] = False,
) -> None:
    """Train an image classifier, dense and with gates, cut it to a budget, fine-tune it.

    Leaves pruned.swan, report.html, log.csv and result.json. The same command goes on after a kill. In several
    processes: torchrun --nproc_per_node 2 -m swan_surgery_cli train ..., or accelerate launch -m.
    """


@command(
    "prune", work="shipping:prune_command", short_help="Cut by gates, or in one shot by a score."
)
def prune_command(
    model: Name,
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the smaller model.")],
    weights: Weights = None,
    macs: Macs = None,
    params: Params = None,
    score: Annotated[
        str, typer.Option(help="For a model without gates: magnitude, bn_scale or random.")
    ] = "magnitude",
    round_to: RoundTo = "1",
    shapes: Shapes = None,
    as_json: AsJson = False,  # noqa: FBT002 - a flag on the command line
) -> None:
    """Cut a model: by the gates of a gated file, or in one shot by a score of its weights."""


@command(
    "compress",
    work="compressing:compress_command",
    short_help="Score, cut, compensate and train on.",
)
def compress_command(
    model: Annotated[
        str,
        typer.Argument(help="torchvision:NAME, timm:NAME, or package.module:factory."),
    ],
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the smaller model.")],
    weights: Weights = None,
    macs: Macs = None,
    params: Params = None,
    latency_ms: Annotated[
        float | None, typer.Option(help="Milliseconds per forward pass, by layers measured here.")
    ] = None,
    round_to: Annotated[
        str,
        typer.Option(
            help="Widths become multiples of this number. auto measures where there is --runtime or --latency-ms, else "
            "takes 8, or less where 8 would leave much of the budget unused."
        ),
    ] = "auto",
    runtime: Annotated[
        str | None,
        typer.Option(help="That ships, and that latencies are measured in: eager or onnxruntime."),
    ] = None,
    uniform: Annotated[  # noqa: FBT002 - a flag on the command line
        bool,
        typer.Option(
            "--uniform", help="One width for all layers of a kind, as configurations need it."
        ),
    ] = False,
    steps: Annotated[int, typer.Option(min=0, help="Of training after the cut.")] = 0,
    lr: Annotated[float, typer.Option(help="Peak learning rate of that training.")] = 1e-3,
    labels: Annotated[  # noqa: FBT002 - a flag on the command line
        bool,
        typer.Option("--labels", help="Score and train by the labels, not by the model's outputs."),
    ] = False,
    assignments: Reading = None,
    threads: Threads = None,
    as_json: AsJson = False,  # noqa: FBT002 - a flag on the command line
) -> None:
    """Make a smaller model of a trained one: score, cut, solve for what stays, train for as long as asked."""


@command("adapt", work="adapting:adapt_command", short_help="Widths that look at the input.")
def adapt_command(
    model: Name,
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the adaptive model.")],
    weights: Weights = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A safetensors file: 'inputs', samples first (their shape is --input's default): what matters, and what "
            "each width needs, is measured on it, and who takes what fitted to it. Without it every input takes the full width."
        ),
    ] = None,
    macs: Annotated[
        float, typer.Option(help="Share of the multiply-adds that inputs may cost on average.")
    ] = 0.5,
    max_macs: Annotated[float | None, typer.Option(help="Share that no input may exceed.")] = None,
    structure: Annotated[
        str,
        typer.Option(
            help="nested: widths of each block; free: a gate per channel; blocks: of neurons, for each token of a "
            "transformer."
        ),
    ] = "nested",
    widths: Annotated[
        str | None,
        typer.Option(
            help="Shares of the channels, with --data of their multiply-adds, of nested: by default 0.25,0.5,0.75,1."
        ),
    ] = None,
    block_size: Annotated[int, typer.Option(help="Neurons in a block, of blocks.")] = 128,
    per: Annotated[str, typer.Option(help="Who looks at the input: block or network.")] = "block",
    at: Annotated[
        float | None, typer.Option(help="Write the static model at this width instead.")
    ] = None,
    shapes: Shapes = None,
    as_json: AsJson = False,  # noqa: FBT002 - a flag on the command line
) -> None:
    """Let every input choose how wide the blocks of a model are."""


@command("route", work="routing:route_command", short_help="A short way for easy inputs.")
def route_command(
    model: Name,
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the routed model.")],
    after: Annotated[
        list[str] | None,
        typer.Option(
            help="The module behind which the switch stands; several times for nested switches. By default the best "
            "of a few depths, which needs --data."
        ),
    ] = None,
    light: Annotated[
        float,
        typer.Option(help="The light branch: share of the multiply-adds of what it stands for."),
    ] = 0.25,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A safetensors file: 'inputs', samples first, and 'labels' for --harm. One half, drawn at random, "
            "makes and trains the light branch, the other sets the threshold."
        ),
    ] = None,
    harm: Annotated[
        float | None,
        typer.Option(help="The most harm, guaranteed: light wrong where full is right."),
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of the guarantee.")] = 0.9,
    share: Annotated[
        float | None, typer.Option(help="Share of the inputs that leave early.")
    ] = None,
    macs: Annotated[
        float | None, typer.Option(help="Mean multiply-adds, over the given model's.")
    ] = None,
    decide: Annotated[str, typer.Option(help="predicted, margin or auto.")] = "auto",
    steps: Annotated[int, typer.Option(help="Training steps of switch and light branch.")] = 0,
    html: Annotated[
        Path | None, typer.Option(help="Write what inputs take as one HTML file; needs --data.")
    ] = None,
    weights: Weights = None,
    shapes: Shapes = None,
    as_json: AsJson = False,  # noqa: FBT002 - a flag on the command line
) -> None:
    """Give a model a short way for easy inputs: a switch, a light branch, a threshold."""


@command(
    "swap",
    work="swapping:swap_command",
    short_help="Other activations, the same function at first.",
)
def swap_command(
    model: Name,
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the model.")],
    activation: Annotated[
        str, typer.Option(help="fles, acon-c, smu, silu, ...; a wrong name lists all.")
    ] = "fles",
    where: Annotated[
        list[str] | None,
        typer.Option(help="Which activations: names or patterns, once each. All by default."),
    ] = None,
    start: Annotated[
        str, typer.Option(help="identity (computes the same at first), blend, or fresh.")
    ] = "identity",
    weights: Weights = None,
    shapes: Shapes = None,
    as_json: AsJson = False,  # noqa: FBT002 - a flag on the command line
) -> None:
    """Put other activations into a model that starts as the same function; list them, and what it costs."""


@command(
    "export",
    work="shipping:export_command",
    short_help="To ONNX or torch.export, run and compared.",
)
def export_command(
    model: Name,
    file: Saved,
    out: Annotated[Path, typer.Argument(help="Ends in .onnx or .pt2.")],
    shapes: Shapes = None,
    fixed_batch: Annotated[  # noqa: FBT002 - a flag on the command line
        bool, typer.Option("--fixed-batch", help="Only the batch size of the inputs.")
    ] = False,
    as_json: AsJson = False,  # noqa: FBT002 - a flag on the command line
) -> None:
    """Export a pruned model to ONNX or torch.export; run it, and keep it if it agrees."""
