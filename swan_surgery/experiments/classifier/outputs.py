"""The files that a run leaves beside the models: log, report, result."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from swan_surgery.environment.machine import device_of, environment
from swan_surgery.environment.writing import replacing
from swan_surgery.experiments.classifier.config import write_settings
from swan_surgery.experiments.classifier.data import Data
from swan_surgery.experiments.classifier.outcome import Outcome, write_log
from swan_surgery.experiments.classifier.settings import TrainSettings
from swan_surgery.experiments.classifier.steps import score
from swan_surgery.reporting import Report, report


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
        evaluate=lambda model: score(model, data.test, settings)["accuracy"],
        unit="%",
    )
    result = _result(outcome, settings, data)
    write_settings(settings, folder / "config.toml")
    write_log(outcome.history, folder / "log.csv")
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
    before, after = outcome.macs
    shares = {
        "dense": ("dense", 1.0),
        "baseline": ("dense, trained as long", 1.0),
        "pruned": ("right after the cut", after / before),
        "finetuned": ("fine-tuned", after / before),
    }
    runs = [
        (*told, outcome.scores[stage]["accuracy"])
        for stage, told in shares.items()
        if stage in outcome.scores
    ]
    return found.to_html(channels=outcome.channels, probabilities=outcome.probabilities, runs=runs)


def _result(outcome: Outcome, settings: TrainSettings, data: Data) -> dict[str, Any]:
    where = environment(device_of(outcome.small))
    (dense_macs, macs), (dense_params, params) = outcome.macs, outcome.params
    gates = outcome.gated.gates
    units = {"dense": outcome.channels.num_units, "pruned": int(gates.open_mask().sum())}
    kinds = next(iter(outcome.scores.values()))
    return {
        **{kind: {stage: own[kind] for stage, own in outcome.scores.items()} for kind in kinds},
        "macs": {"dense": dense_macs, "pruned": macs, "left": macs / dense_macs},
        "params": {"dense": dense_params, "pruned": params, "left": params / dense_params},
        **({"units": units} if "gated" in outcome.scores else {}),
        "data": data.about,
        "seconds": round(outcome.seconds, 1),
        "settings": asdict(settings),
        "environment": asdict(where),
    }
