"""`prune`, `report`, `export` and `latency`: from a model's name and a file to what is shipped."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
import typer
from torch import nn

from swan_surgery.adaptive import AdaptiveModel, compact
from swan_surgery.artifacts import save
from swan_surgery.costs.macs import count_macs
from swan_surgery.costs.params import count_params
from swan_surgery.cutting.pruning import prune, prune_by_score
from swan_surgery.environment.machine import device_of, environment
from swan_surgery.environment.writing import replacing
from swan_surgery.errors import InputError
from swan_surgery.exporting import export
from swan_surgery.gates import GatedModel
from swan_surgery.gates.conversion import swanify
from swan_surgery.models import Inputs
from swan_surgery.reporting import report
from swan_surgery.reporting.rendering import milliseconds
from swan_surgery.selection.importance import importance
from swan_surgery.timing.layers import measure_latency_table
from swan_surgery.timing.loop import latencies_in_turns
from swan_surgery.timing.runtimes import forward_pass
from swan_surgery_cli.work.models import build_model
from swan_surgery_cli.work.subjects import inputs_of, read_rounding, subject_of, with_weights
from swan_surgery_cli.work.waiting import on_threads, waiting


def prune_command(
    *,
    model: str,
    out: Path,
    weights: Path | None,
    macs: float | None,
    params: float | None,
    score: str,
    round_to: str,
    shapes: list[str] | None,
    as_json: bool,
) -> None:
    """Cut a model: by the gates of a gated file, or in one shot by a score of its weights."""
    rounding = read_rounding(round_to)
    if score not in ("magnitude", "bn_scale", "random"):
        raise InputError(f"--score {score}: without data there are magnitude, bn_scale and random")
    with waiting(f"pruning {model}"):
        base, inputs = subject_of(model, weights, shapes or [])
        if isinstance(base, GatedModel):
            options = _rounding(base, rounding)
            # `train` gates what a first cut left: shares are still those of the model that is named.
            small = prune(base, macs=macs, params=params, of="original", **options)
            before = build_model(model, with_data=True).model
        else:
            if macs is None and params is None:
                raise InputError("say how small it shall get: --macs 0.5 or --params 0.5")
            gated = swanify(base, inputs)
            before = base
            scores = importance(gated, score)  # type: ignore[arg-type]  # checked above
            options = _rounding(gated, rounding)
            small = prune_by_score(gated, scores, macs=macs, params=params, **options)
        save(small, out)
        macs_of = [count_macs(own, inputs) for own in (before, small)]
        params_of = [count_params(own) for own in (before, small)]
    if as_json:
        typer.echo(json.dumps({"file": str(out), "macs": macs_of, "params": params_of}))
        return
    parts = [
        f"{new:,} of {old:,} {what} ({new / old:.1%})"
        for what, (old, new) in (("MACs", macs_of), ("parameters", params_of))
    ]
    typer.echo(f"{out}: {', '.join(parts)}")


def _rounding(gated: GatedModel, round_to: int | Literal["auto"]) -> dict[str, Any]:
    if round_to != "auto":
        return {"round_to": round_to}
    return {"round_to": "auto", "latency_table": measure_latency_table(gated)}


def report_command(
    *,
    model: str,
    file: Path,
    weights: Path | None,
    html: Path | None,
    markdown: bool,
    runtime: str,
    shapes: list[str] | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Compare a model before and after: cost, size, memory, latency, and widths layer by layer."""
    with waiting(f"measuring {model}"), on_threads(threads):
        before, after, inputs = _both(model, weights, file, shapes)
        found = report(before, after, inputs, runtime=runtime)  # type: ignore[arg-type]  # checked there
        channels = after.channels if isinstance(after, GatedModel) else None
        if html is not None:
            with replacing(html) as temporary:
                temporary.write_text(found.to_html(channels=channels), encoding="utf-8")
    if as_json:
        typer.echo(found.to_json())
    else:
        typer.echo(found.to_markdown() if markdown else str(found))
    if html is not None:
        typer.echo(f"written: {html}", err=True)


def export_command(
    *, model: str, file: Path, out: Path, shapes: list[str] | None, fixed_batch: bool, as_json: bool
) -> None:
    """Export a pruned model to ONNX or torch.export; run it, and keep it if it agrees."""
    with waiting(f"exporting {file}"):
        small, inputs = subject_of(model, file, shapes or [])
        if isinstance(small, AdaptiveModel):
            holds_groups = out.suffix == ".onnx" and small.structure.kind != "free"
            small = compact(small, execution="auto" if holds_groups else "masked", verify=False)
        found = export(small, out, inputs, dynamic_batch=not fixed_batch)
    facts = {
        "file": str(out),
        "relative_error": found.relative_error,
        "batches": found.batches,
        "size_bytes": found.size_bytes,
    }
    kind = "any batch size" if found.has_dynamic_batch else f"batch {found.batches[0]} only"
    typer.echo(
        json.dumps(facts)
        if as_json
        else f"{out}: {found.size_bytes / 1e6:.1f} MB, {kind}, agrees to {found.relative_error:.1e}"
    )


def latency_command(
    *,
    model: str,
    file: Path | None,
    weights: Path | None,
    runtime: str,
    shapes: list[str] | None,
    seconds: float,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure milliseconds per forward pass; of two models in turns."""
    with waiting(f"measuring {model}"), on_threads(threads):
        if file is None:
            base, inputs = subject_of(model, weights, shapes or [])
            models: dict[str, nn.Module] = {"dense": base}
        else:
            before, after, inputs = _both(model, weights, file, shapes)
            models = {"before": before, "after": after}
        passes = [forward_pass(own, inputs, runtime) for own in models.values()]  # type: ignore[arg-type]
        batch = next((x.shape[0] for x in inputs.args if isinstance(x, torch.Tensor)), 1)
        timed = latencies_in_turns(passes, batch, seconds_each=seconds)
        where = environment(device_of(next(iter(models.values()))))
    facts: dict[str, Any] = {
        "runtime": runtime,
        "batch": batch,
        "threads": where.threads,
        "device": where.device,
        "torch": where.torch,
        "median_ms": {name: own.median_ms for name, own in zip(models, timed, strict=True)},
        "quartiles_ms": {
            name: [own.lower_quartile_ms, own.upper_quartile_ms]
            for name, own in zip(models, timed, strict=True)
        },
    }
    if as_json:
        typer.echo(json.dumps(facts))
        return
    typer.echo(f"{runtime}, batch {batch}, {where.threads} threads, {where.device}")
    for name, own in zip(models, timed, strict=True):
        median, low, high = map(
            milliseconds, (own.median_ms, own.lower_quartile_ms, own.upper_quartile_ms)
        )
        typer.echo(f"{name}: {median} ms [{low}, {high}] over {own.repeats} passes")
    if len(timed) == 2:
        typer.echo(f"{timed[0].median_ms / timed[1].median_ms:.2f} times as fast")


def _both(
    name: str, weights: Path | None, file: Path, shapes: list[str] | None
) -> tuple[nn.Module, nn.Module, Inputs]:
    subject = build_model(name, with_data=True)
    after = with_weights(subject.model, file)
    before = subject.model
    if weights is not None:  # into a model of its own: a checkpoint's weights are filled in
        before = with_weights(build_model(name, with_data=True).model, weights)
    return before, after, inputs_of(subject, shapes or [], after)
