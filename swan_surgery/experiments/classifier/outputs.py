"""The files that a run leaves beside the models: log, report, result."""

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from swan_surgery.environment.machine import device_of, environment
from swan_surgery.environment.writing import replacing
from swan_surgery.experiments.classifier.config import write_settings
from swan_surgery.experiments.classifier.data import Data
from swan_surgery.experiments.classifier.outcome import Outcome
from swan_surgery.experiments.classifier.settings import TrainSettings
from swan_surgery.experiments.classifier.steps import score
from swan_surgery.reporting import Report, report


_COLUMNS = (
    *("stage", "epoch", "lr", "train_loss", "loss", "accuracy", "hard_macs_share", "open_share"),
)


def write_outputs(
    outcome: Outcome, settings: TrainSettings, data: Data, folder: Path
) -> dict[str, Any]:
    """Write `config.toml`, `log.csv`, `report.*` and `result.json`; returns what the last holds.

    Raises:
        WritingError: a file could not be written.
    """
    found = report(
        outcome.dense,
        outcome.small,
        outcome.example,
        evaluate=lambda model: score(model, data, settings)["accuracy"],
        unit="%",
    )
    result = _result(outcome, settings, data)
    write_settings(settings, folder / "config.toml")
    _write_log(outcome, folder / "log.csv")
    texts = {
        "report.html": _page(found, outcome),
        "report.md": found.to_markdown(),
        "report.json": found.to_json(),
        "result.json": json.dumps(result, indent=2),
    }
    for name, text in texts.items():
        with replacing(folder / name) as temporary:
            temporary.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    return result


def _page(found: Report, outcome: Outcome) -> str:
    scores, (before, after) = outcome.scores, outcome.macs
    return found.to_html(
        channels=outcome.gated.channels,
        probabilities=outcome.probabilities,
        runs=[
            ("dense", 1.0, scores["dense"]["accuracy"]),
            ("right after the cut", after / before, scores["pruned"]["accuracy"]),
            ("fine-tuned", after / before, scores["finetuned"]["accuracy"]),
        ],
    )


def _result(outcome: Outcome, settings: TrainSettings, data: Data) -> dict[str, Any]:
    where = environment(device_of(outcome.small))
    (dense_macs, macs), (dense_params, params) = outcome.macs, outcome.params
    return {
        "accuracy": {stage: own["accuracy"] for stage, own in outcome.scores.items()},
        "loss": {stage: own["loss"] for stage, own in outcome.scores.items()},
        "macs": {"dense": dense_macs, "pruned": macs, "left": macs / dense_macs},
        "params": {"dense": dense_params, "pruned": params, "left": params / dense_params},
        "data": data.about,
        "seconds": round(outcome.seconds, 1),
        "settings": asdict(settings),
        "environment": asdict(where),
    }


def _write_log(outcome: Outcome, path: Path) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        writer.writerows(outcome.history)
