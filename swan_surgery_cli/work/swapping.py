"""`swan-surgery swap`: other activations in a model, saved as a file that every other command takes."""

import json
from pathlib import Path
from typing import Any

import typer

from swan_surgery.activations import swap_activations, swaps
from swan_surgery.artifacts import save
from swan_surgery.costs.macs import count_macs
from swan_surgery.costs.params import count_params
from swan_surgery.errors import InputError
from swan_surgery.gates import GatedModel
from swan_surgery_cli.work.subjects import subject_of
from swan_surgery_cli.work.waiting import waiting


def swap_command(
    *,
    model: str,
    out: Path,
    activation: str,
    where: list[str] | None,
    start: str,
    weights: Path | None,
    shapes: list[str] | None,
    as_json: bool,
) -> None:
    """Put other activations into a model that starts as the same function; list them, and what it costs."""
    with waiting(f"swapping activations of {model}"):
        base, inputs = subject_of(model, weights, shapes or [])
        if isinstance(base, GatedModel):
            raise InputError(
                f"{weights} holds a gated model; prune it first, or swap before gating"
            )
        chosen: Any = where or "*"
        swapped = swap_activations(base, activation, inputs, where=chosen, start=start)  # type: ignore[arg-type]  # checked there
        save(swapped, out)
        done = swaps(swapped)
        macs = [count_macs(own, inputs) for own in (base, swapped)]
        params = [count_params(own) for own in (base, swapped)]
    if as_json:
        facts = {
            "file": str(out),
            "activation": done.activation,
            "swapped": [place.name for place in done.swapped],
            "kept": {own.name: own.why for own in done.kept},
            "macs": macs,
            "params": params,
        }
        typer.echo(json.dumps(facts))
        return
    typer.echo(str(done))
    typer.echo(
        f"{out}: {macs[1]:,} MACs ({macs[1] / macs[0]:.1%} of before), {params[1]:,} parameters "
        f"({params[1] / params[0]:.1%})"
    )
