"""`tradeoff`: what a model would be worth at several sizes."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor, nn

from swan_surgery.compressing import tradeoff_curve
from swan_surgery.environment.writing import replacing
from swan_surgery.errors import InputError
from swan_surgery.gates.conversion import swanify
from swan_surgery.models.batches import run_on_batch
from swan_surgery_cli.work.compressing import cross_entropy
from swan_surgery_cli.work.samples import checked_labels, model_with_samples
from swan_surgery_cli.work.subjects import read_rounding
from swan_surgery_cli.work.waiting import foreign_code, on_threads, warnings_told


def tradeoff_command(
    *,
    model: str,
    data: str,
    weights: Path | None,
    macs: str | None,
    params: str | None,
    round_to: str,
    labels: bool,
    svg: Path | None,
    assignments: list[str] | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Print quality over budget."""
    options: dict[str, Any] = {
        "macs": _budgets("--macs", macs),
        "params": _budgets("--params", params),
    }
    if macs is not None and params is not None:
        raise InputError("--macs and --params: a curve has budgets of one kind")
    with warnings_told(), foreign_code(), on_threads(threads):
        given, samples = model_with_samples(model, weights, data, assignments)
        if labels:
            test = checked_labels(samples, data)
            options |= {
                "evaluate": _accuracy(test),
                "quality": "accuracy in %",
                "loss": cross_entropy,
            }
        gated = swanify(given.eval(), samples.example)
        curve = tradeoff_curve(
            gated, samples.batches, round_to=read_rounding(round_to), progress=True, **options
        )
        if svg is not None:
            with replacing(svg) as temporary:
                temporary.write_text(curve.to_svg(), encoding="utf-8")
    typer.echo(curve.to_json() if as_json else str(curve))


def _budgets(option: str, text: str | None) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{option} {text}: numbers, as in 0.75,0.5,0.25") from None


def _accuracy(batches: Iterable[tuple[Tensor, Tensor]]) -> Callable[[nn.Module], float]:
    def evaluate(model: nn.Module) -> float:
        right = total = 0
        with torch.no_grad():
            for batch in batches:
                found: Tensor = run_on_batch(model, batch)
                right += int((found.argmax(1).cpu() == batch[1].cpu()).sum())
                total += len(batch[1])
        return 100 * right / total

    return evaluate


__all__ = ["tradeoff_command"]
