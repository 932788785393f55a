"""`adapt`: from a model's name and some inputs to an adaptive model, or one of its widths."""

import json
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor

from swan_surgery.adaptive import adapt, calibrate_widths, fit_widths
from swan_surgery.artifacts import save
from swan_surgery.cli.shipping import AsJson, Name, Shapes
from swan_surgery.cli.subjects import subject_of, tensors_in
from swan_surgery.cli.waiting import waiting
from swan_surgery.errors import InputError


_BATCH = 64


def adapt_command(
    model: Name,
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the adaptive model.")],
    weights: Annotated[
        Path | None, typer.Option(help="Weights: of swan.save, or a safetensors file.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A safetensors file with one tensor of inputs, samples first: statistics of each width "
            "are measured on it, and fitted to it. Without it every input takes the full width."
        ),
    ] = None,
    macs: Annotated[
        float, typer.Option(help="Share of the multiply-adds that inputs may cost on average.")
    ] = 0.5,
    max_macs: Annotated[float | None, typer.Option(help="Share that no input may exceed.")] = None,
    widths: Annotated[str, typer.Option(help="Shares of the channels.")] = "0.25,0.5,0.75,1",
    per: Annotated[str, typer.Option(help="Who looks at the input: block or network.")] = "block",
    at: Annotated[
        float | None, typer.Option(help="Write the static model at this width instead.")
    ] = None,
    shapes: Shapes = None,
    as_json: AsJson = False,  # noqa: FBT002 - a flag on the command line
) -> None:
    """Let every input choose how wide the blocks of a model are."""
    shares = _shares(widths)
    if per not in ("block", "network"):
        raise InputError(f"--per {per}: block or network")
    batches = [] if data is None else _batches(data)
    with waiting(f"adapting {model}"):
        base, inputs = subject_of(model, weights, shapes or [])
        adapted = adapt(
            base.eval(), inputs, per="network" if per == "network" else "block", widths=shares
        )
        stats = None
        if batches:
            calibrate_widths(adapted, batches)
            stats = fit_widths(adapted, batches, macs=macs, max_macs=max_macs)
        save(adapted if at is None else adapted.at(at), out)
    if as_json:
        blocks = {name: own.tolist() for name, own in adapted.costs.blocks.items()}
        told = {
            "out": str(out),
            "dense_macs": adapted.costs.dense,
            "blocks": blocks,
            "static": [str(own) for own in adapted.structure.static],
            "widths": None if stats is None else stats.to_json(),
        }
        typer.echo(json.dumps(told, indent=2))
        return
    typer.echo(adapted.explain())
    typer.echo("no --data: every input takes the full width" if stats is None else str(stats))
    typer.echo(f"written: {out}")


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--widths {text}: numbers, as in 0.25,0.5,1") from None


def _batches(path: Path) -> list[Tensor]:
    tensors = tensors_in(path)
    if len(tensors) != 1:
        raise InputError(f"--data {path} holds {len(tensors)} tensors; one is wanted, of inputs")
    (inputs,) = tensors.values()
    return list(inputs.split(_BATCH))


__all__ = ["adapt_command"]
