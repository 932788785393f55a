"""`adapt`: from a model's name and some inputs to an adaptive model, or one of its widths."""

import json
from pathlib import Path

import typer
from torch import Tensor

from swan_surgery.adaptive import adapt, calibrate_widths, compensate_widths, fit_widths
from swan_surgery.artifacts import save
from swan_surgery.compressing.own_outputs import Sensitivity
from swan_surgery.errors import InputError
from swan_surgery.gates import GatedModel
from swan_surgery.gates.conversion import swanify
from swan_surgery.selection.importance import importance
from swan_surgery_cli.work.subjects import inputs_in, subject_of, tensors_in
from swan_surgery_cli.work.waiting import waiting


_BATCH = 64


def adapt_command(
    *,
    model: str,
    out: Path,
    weights: Path | None,
    data: Path | None,
    macs: float,
    max_macs: float | None,
    structure: str,
    widths: str | None,
    block_size: int,
    per: str,
    at: float | None,
    shapes: list[str] | None,
    as_json: bool,
) -> None:
    """Let every input choose how wide the blocks of a model are."""
    shares = None if widths is None else _shares(widths)
    if per not in ("block", "network"):
        raise InputError(f"--per {per}: block or network")
    if structure not in ("nested", "free", "blocks"):
        raise InputError(f"--structure {structure}: nested, free or blocks")
    of_nested = (shares, at)
    if structure != "nested" and (per != "block" or any(own is not None for own in of_nested)):
        raise InputError(
            f"--structure {structure} knows no --widths, --per network or --at: nested does"
        )
    batches = [] if data is None else _batches(data)
    with waiting(f"adapting {model}"):
        base, inputs = subject_of(
            model, weights, shapes or [], sample=batches[0][:1] if batches else None
        )
        is_scored = structure == "nested" and bool(batches)
        gated = swanify(base.eval(), inputs, in_place=True)
        adapted = adapt(
            gated,
            structure=structure,  # type: ignore[arg-type]  # checked above
            per="network" if per == "network" else "block",
            widths=shares,
            block_size=block_size,
            scores=_scores(gated, batches) if is_scored else None,
        )
        stats = None
        if batches:
            calibrate_widths(adapted, batches)
            if is_scored:
                compensate_widths(adapted, batches)
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


def _scores(gated: GatedModel, batches: list[Tensor]) -> Tensor:
    """How far each unit moves the outputs: no labels are needed."""
    return importance(gated, "fisher", batches=batches, loss=Sensitivity())


def _batches(path: Path) -> list[Tensor]:
    return list(inputs_in(tensors_in(path), path).split(_BATCH))


__all__ = ["adapt_command"]
