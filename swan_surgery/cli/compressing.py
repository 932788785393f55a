"""`compress`: a trained model and images in, a smaller model out."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from swan_surgery.artifacts import save
from swan_surgery.cli.models import build_model
from swan_surgery.cli.subjects import with_weights
from swan_surgery.cli.waiting import foreign_code, on_threads
from swan_surgery.compressing import compress
from swan_surgery.costs.macs import count_macs
from swan_surgery.costs.params import count_params
from swan_surgery.experiments.classifier import (
    Data,
    TrainSettings,
    input_channels,
    load_data,
    loader,
    read_settings,
)
from swan_surgery.models.batches import run_on_batch


def compress_command(
    model: Annotated[
        str,
        typer.Argument(help="torchvision:NAME, timm:NAME, or package.module:factory."),
    ],
    data: Annotated[
        str, typer.Option(help="Images: a folder, a torchvision dataset's root, or sklearn:digits.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the smaller model.")],
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Weights to start from: of swan.save, safetensors, or a checkpoint (.pth)."
        ),
    ] = None,
    macs: Annotated[float | None, typer.Option(help="Share of the multiply-adds to keep.")] = None,
    params: Annotated[float | None, typer.Option(help="Share of the parameters to keep.")] = None,
    latency_ms: Annotated[
        float | None, typer.Option(help="Milliseconds per forward pass, by layers measured here.")
    ] = None,
    steps: Annotated[int, typer.Option(min=0, help="Of training after the cut.")] = 0,
    lr: Annotated[float, typer.Option(help="Peak learning rate of that training.")] = 1e-3,
    labels: Annotated[  # noqa: FBT002 - a flag on the command line
        bool,
        typer.Option("--labels", help="Score and train by the labels, not by the model's outputs."),
    ] = False,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", help="How images are read, like size=224, batch=32; as for `train`."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,  # noqa: FBT002
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
        self._generator = torch.Generator().manual_seed(settings.seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return loader(self._images.train, self._settings, self._generator)


def _cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    logits: Tensor = run_on_batch(model, batch)
    return F.cross_entropy(logits.float(), batch[1].to(logits.device))


__all__ = ["compress_command"]
