"""`compress`: a trained model and images in, a smaller model out."""

import json
from pathlib import Path
from typing import Any

import torch.nn.functional as F
import typer
from torch import Tensor, nn

from swan_surgery.artifacts import save
from swan_surgery.compressing import compress
from swan_surgery.costs.macs import count_macs
from swan_surgery.costs.params import count_params
from swan_surgery.errors import InputError
from swan_surgery.models.batches import run_on_batch
from swan_surgery_cli.work.samples import checked_labels, model_with_samples
from swan_surgery_cli.work.subjects import read_rounding
from swan_surgery_cli.work.waiting import foreign_code, on_threads, warnings_told


def compress_command(
    *,
    model: str,
    data: str,
    out: Path,
    weights: Path | None,
    macs: float | None,
    params: float | None,
    latency_ms: float | None,
    round_to: str,
    runtime: str | None,
    uniform: bool,
    steps: int,
    lr: float,
    labels: bool,
    assignments: list[str] | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Make a smaller model of a trained one: score, cut, solve for what stays, train for as long as asked."""
    if macs is params is latency_ms is None:
        raise InputError("say how small it shall get: --macs 0.5, --params 0.5 or --latency-ms 20")
    with warnings_told(), foreign_code(), on_threads(threads):
        given, samples = model_with_samples(model, weights, data, assignments)
        if labels:
            checked_labels(samples, data)
        done = compress(
            given.eval(),
            samples.batches,
            macs=macs,
            params=params,
            latency_ms=latency_ms,
            round_to=read_rounding(round_to),
            runtime=runtime,  # type: ignore[arg-type]  # checked there
            uniform=uniform,
            loss=cross_entropy if labels else "self",
            finetune=steps,
            lr=lr,
            example_inputs=samples.example,
        )
        save(done.model.eval(), out)
        costs = {
            "macs": [count_macs(own, samples.example) for own in (given, done.model)],
            "params": [count_params(own) for own in (given, done.model)],
        }
    facts: dict[str, Any] = {
        "file": str(out),
        **costs,
        "steps": done.steps,
        "seconds": done.seconds,
    }
    typer.echo(json.dumps(facts) if as_json else f"{done}\n{out}")


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Of (inputs, labels)."""
    logits: Tensor = run_on_batch(model, batch)
    return F.cross_entropy(logits.float(), batch[1].to(logits.device))


__all__ = ["compress_command", "cross_entropy"]
