"""`route`: from a model's name and some inputs to a model with a short way for easy inputs."""

import json
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

from swan_surgery.artifacts import save
from swan_surgery.environment.writing import replacing
from swan_surgery.errors import InputError
from swan_surgery.routing.adding import add_switch
from swan_surgery.routing.calibrating import calibrate_switch
from swan_surgery.routing.costs import routed_costs
from swan_surgery.routing.placing import least_apart
from swan_surgery.routing.route_stats import route_stats
from swan_surgery.routing.routed_model import RoutedModel
from swan_surgery.routing.scanning import scan_switches
from swan_surgery_cli.work.subjects import inputs_in, subject_of, tensors_in
from swan_surgery_cli.work.waiting import waiting


_BATCH = 64
_LEARNING_RATE = 1e-3
Batches = list[tuple[Tensor, ...]]


def route_command(
    *,
    model: str,
    out: Path,
    after: list[str] | None,
    light: float,
    data: Path | None,
    harm: float | None,
    confidence: float,
    share: float | None,
    macs: float | None,
    decide: str,
    steps: int,
    html: Path | None,
    weights: Path | None,
    shapes: list[str] | None,
    as_json: bool,
) -> None:
    """Give a model a short way for easy inputs: a switch, a light branch, a threshold."""
    targets = {"harm": harm, "share": share, "macs": macs}
    target: dict[str, Any] = {name: value for name, value in targets.items() if value is not None}
    _check(after, data, target, steps, html)
    with waiting(f"routing {model}"):
        making, judging = ([], []) if data is None else _halves(data, labelled=harm is not None)
        base, inputs = subject_of(
            model, weights, shapes or [], sample=making[0][0][:1] if making else None
        )
        options: dict[str, Any] = {"light": light, "decide": decide, "example_inputs": inputs}
        places = () if after else scan_switches(base.eval(), making, **options)
        chosen = after or [least_apart(places).after]
        routed = add_switch(base.eval(), chosen, batches=making or None, **options)
        _train_(routed, making, steps)
        stats = certificate = None
        if judging:
            certificate = calibrate_switch(routed.eval(), judging, confidence=confidence, **target)
            stats = route_stats(routed, judging)
            if html is not None:
                with replacing(html) as temporary:
                    temporary.write_text(stats.to_html(scan=places), encoding="utf-8")
        save(routed.eval(), out)
        costs = routed_costs(routed)
    if as_json:
        facts = {
            "out": str(out),
            "after": list(routed.after),
            "scan": {own.after: own.refused or [own.share, own.macs, own.apart] for own in places},
            "light_macs": [own / costs.given for own in costs.lights],
            "certificate": None if certificate is None else certificate.to_json(),
            "routes": None if stats is None else stats.to_json(),
        }
        typer.echo(json.dumps(facts, indent=2))
        return
    for own in places:
        typer.echo(str(own))
    typer.echo(
        f"switch after {', '.join(routed.after)}; light branch {sum(costs.lights) / costs.given:.1%} of the MACs"
    )
    typer.echo(
        "no --data: every input takes the full way" if stats is None else f"{certificate}\n{stats}"
    )
    typer.echo(f"written: {out}")


def _check(
    after: list[str] | None,
    data: Path | None,
    target: dict[str, float],
    steps: int,
    html: Path | None,
) -> None:
    if data is None and (target or steps or html or not after):
        raise InputError(
            "thresholds, training, a report and the choice of a place need --data; without it name --after, and every "
            "input takes the full way"
        )
    if data is not None and len(target) != 1:
        raise InputError("say what the threshold is set for: one of --harm, --share, --macs")
    if steps < 0:
        raise InputError(f"--steps {steps}: 0 or more")


def _halves(path: Path, *, labelled: bool) -> tuple[Batches, Batches]:
    """Batches of two halves of the samples, drawn at random: what is trained on cannot show a harm."""
    tensors = tensors_in(path)
    inputs = inputs_in(tensors, path)
    columns = [inputs, tensors["labels"]] if "labels" in tensors else [inputs]
    if labelled and len(columns) == 1:
        raise InputError(f"--harm needs 'labels' in {path}: what the light branch gets wrong")
    if any(not own.ndim or len(own) != len(inputs) for own in columns) or len(inputs) < 2:
        raise InputError(f"{path}: 'inputs' and 'labels' need as many samples, two or more")
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    first, second = (
        list(zip(*(own[half].split(_BATCH) for own in columns), strict=True))
        for half in (order[::2], order[1::2])
    )
    return first, second


def _train_(routed: RoutedModel, batches: Batches, steps: int) -> None:
    """Switch and light branch: Eq. 3 and 4, the trunk and the full branch frozen."""
    if not steps:
        return
    learning = [p for p in routed.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=_LEARNING_RATE)
    routed.train()
    for batch in islice(cycle(batches), steps):
        optimizer.zero_grad()
        routed.loss(batch).backward()
        optimizer.step()


__all__ = ["route_command"]
