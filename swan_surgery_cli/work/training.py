"""`train`: one file of settings, and all the way to a smaller model."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from swan_surgery.errors import InputError, WritingError
from swan_surgery.experiments.classifier import (
    Narrator,
    Silent,
    TrainSettings,
    input_channels,
    load_data,
    read_settings,
    run_experiment,
    text_of,
    write_outputs,
)
from swan_surgery.experiments.processes import joined
from swan_surgery_cli.work.models import build_model
from swan_surgery_cli.work.subjects import with_weights
from swan_surgery_cli.work.waiting import foreign_code, on_threads


class _Teller:
    """Sentences and progress bars on stderr, so that stdout holds the result alone."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False)

    @contextmanager
    def epochs(self, text: str, total: int) -> Iterator[Callable[[str], None]]:
        columns = (
            *(TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn()),
            *(TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}")),
        )
        with Progress(*columns, console=self._console) as bar:
            task = bar.add_task(text, total=total, note="")
            yield lambda note: bar.update(task, advance=1, note=note)


def train_command(
    *,
    config: Path | None,
    assignments: list[str] | None,
    data: str | None,
    out: Path | None,
    fresh: bool,
    template: bool,
    as_yaml: bool,
    as_json: bool,
) -> None:
    """Train an image classifier, dense and with gates, cut it to a budget, fine-tune it.

    Leaves pruned.swan, report.html, log.csv and result.json. The same command goes on after a kill.
    """
    own = list(assignments or [])
    if data is not None:
        own.append(f"data={data}")
    if template:
        typer.echo(text_of(read_settings(config, own), as_yaml=as_yaml), nl=False)
        return
    if config is None and not own:
        raise InputError("give a config, or settings with --set; `train --template` prints one")
    settings = read_settings(config, own)
    folder = out or Path("out") / ("train" if config is None else config.stem)
    result = _run(settings, folder, fresh=fresh)
    if result is None:
        return
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    right = result["accuracy"]
    typer.echo(
        f"dense {right['dense']:.2f} %, right after the cut {right['pruned']:.2f} %, fine-tuned "
        f"{right['finetuned']:.2f} % of the test images"
    )
    if "baseline" in right:
        typer.echo(f"the dense model, trained as long: {right['baseline']:.2f} %")
    typer.echo(
        f"{result['macs']['left']:.1%} of the MACs, {result['params']['left']:.1%} of the parameters"
    )
    typer.echo(f"{folder}: pruned.swan, report.html, log.csv, result.json, config.toml")


def _run(settings: TrainSettings, folder: Path, *, fresh: bool) -> dict[str, Any] | None:
    """What `result.json` holds; None in all processes but the first."""
    with (
        foreign_code(),
        on_threads(settings.threads or None),
        torch.random.fork_rng(),
        joined(settings.device) as processes,
    ):
        teller: Narrator = _Teller() if processes.is_first else Silent()
        torch.manual_seed(settings.seed)
        found = load_data(settings)
        subject = build_model(
            settings.model, with_data=True, classes=settings.classes or found.classes
        )
        model = subject.model
        if settings.weights:
            model = with_weights(model, Path(settings.weights))
        found = load_data(settings, input_channels(model))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise WritingError(f"cannot make the folder {folder}: {err.strerror}") from err
        teller.say(f"{settings.model} on {found.about}.")
        outcome = run_experiment(
            model,
            settings,
            found,
            folder=folder,
            narrator=teller,
            fresh=fresh,
            processes=processes,
        )
        if not processes.is_first:
            return None
        teller.say("Measuring both models.")
        return write_outputs(outcome, settings, found, folder)
