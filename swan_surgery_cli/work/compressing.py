"""`compress`: a trained model and images in, a smaller model out."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.nn.functional as F
import typer
from torch import Tensor, nn

from swan_surgery.artifacts import save
from swan_surgery.compressing import compress
from swan_surgery.costs.macs import count_macs
from swan_surgery.costs.params import count_params
from swan_surgery.experiments.classifier import (
    Data,
    ShuffledBatches,
    TrainSettings,
    input_channels,
    load_data,
    read_settings,
)
from swan_surgery.models.batches import run_on_batch
from swan_surgery_cli.work.models import build_model
from swan_surgery_cli.work.subjects import read_rounding, with_weights
from swan_surgery_cli.work.waiting import foreign_code, on_threads


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
    runtime: str,
    uniform: bool,
    steps: int,
    lr: float,
    labels: bool,
    assignments: list[str] | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Make a smaller model of a trained one: score, cut, solve for what stays, train for as long as asked."""
    settings = read_settings(None, [f"data={json.dumps(data)}", *(assignments or [])])
    with foreign_code(), on_threads(threads):
        given = build_model(model, with_data=True).model
        given = given if weights is None else with_weights(given, weights)
        images = load_data(settings, input_channels(given))
        done = compress(
            given.eval(),
            _Batches(images, settings),
            macs=macs,
            params=params,
            latency_ms=latency_ms,
            round_to=read_rounding(round_to),
            runtime=runtime,  # type: ignore[arg-type]  # checked there
            uniform=uniform,
            loss=_cross_entropy if labels else "self",
            finetune=steps,
            lr=lr,
            example_inputs=images.example(),
        )
        save(done.model.eval(), out)
        costs = {
            "macs": [count_macs(own, images.example()) for own in (given, done.model)],
            "params": [count_params(own) for own in (given, done.model)],
        }
    facts: dict[str, Any] = {
        "file": str(out),
        **costs,
        "steps": done.steps,
        "seconds": done.seconds,
    }
    typer.echo(json.dumps(facts) if as_json else f"{done}\n{out}")


class _Batches:
    """The images to train on, in a new order every time."""

    def __init__(self, images: Data, settings: TrainSettings) -> None:
        self._images, self._settings = images, settings
        self._seed = settings.seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self._seed += 1
        return iter(ShuffledBatches(self._images.train, self._settings, self._seed))


def _cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    logits: Tensor = run_on_batch(model, batch)
    return F.cross_entropy(logits.float(), batch[1].to(logits.device))


__all__ = ["compress_command"]
