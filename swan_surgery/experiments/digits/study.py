"""Several seeds of the demo: mean and spread, and the files they leave."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from safetensors.torch import save_file

from swan_surgery.artifacts import save
from swan_surgery.environment.locking import alone_in
from swan_surgery.environment.machine import environment
from swan_surgery.errors import InputError
from swan_surgery.experiments.digits.data import Digits, load_digits
from swan_surgery.experiments.digits.experiment import (
    METHODS,
    Narrator,
    Networks,
    SeedResult,
    run_seed,
)
from swan_surgery.experiments.digits.scores import accuracy
from swan_surgery.experiments.digits.settings import DemoSettings
from swan_surgery.reporting import Environment, Report, report


_VERSION = 1
_REPORT_BATCH = 32


@dataclass(frozen=True, slots=True)
class Study:
    """Results of all seeds under one setting; `num_test` images were tested for each."""

    settings: DemoSettings
    results: tuple[SeedResult, ...]
    environment: Environment
    num_test: int

    def mean_test(self, method: str) -> float:
        """Mean test accuracy over the seeds, in percent."""
        return mean(result.test[method] for result in self.results)

    def spread_test(self, method: str) -> float:
        """Sample standard deviation of the test accuracy over the seeds; 0 for a single seed."""
        values = [result.test[method] for result in self.results]
        return stdev(values) if len(values) > 1 else 0.0

    def wrong(self, method: str) -> int:
        """Test images that are classified wrong, over all seeds."""
        return sum(
            round(self.num_test * (1 - result.test[method] / 100)) for result in self.results
        )

    def mean_macs(self, method: str) -> float:
        """Mean MACs per image over the seeds."""
        return mean(result.macs[method] for result in self.results)

    def to_json(self) -> str:
        """Settings, environment, every seed, and mean and spread per method, as versioned JSON."""
        summary = {
            method: {
                "test_mean": self.mean_test(method),
                "test_stdev": self.spread_test(method),
                "macs_mean": self.mean_macs(method),
                "macs_share": self.mean_macs(method) / self.mean_macs("dense"),
            }
            for method in METHODS
        }
        return json.dumps({"version": _VERSION, **asdict(self), "summary": summary}, indent=2)


def run_study(
    seeds: Sequence[int], settings: DemoSettings, folder: Path, narrator: Narrator
) -> tuple[Study, Report]:
    """Run every seed and write its files to `folder/seed-N`; the report is of the first seed.

    Raises:
        InputError: no seed, `folder` cannot be made, or scikit-learn is not installed.
        WritingError: another demo is under way in the folder.
    """
    if not seeds:
        raise InputError("the demo needs at least one seed")
    digits = load_digits(settings.num_train)
    _make(folder)
    results, reports = [], []
    with alone_in(folder, "demo"):
        for seed in seeds:
            own = folder / f"seed-{seed}"
            _make(own)
            result, networks = run_seed(seed, settings, digits, narrator)
            results.append(result)
            narrator.say("Measuring both networks.")
            reports.append(_report(networks, digits))
            _write(own, networks, reports[-1], runs=_runs(result))
        study = Study(settings, tuple(results), environment(torch.device("cpu")), len(digits.test))
        (folder / "results.json").write_text(study.to_json() + "\n", encoding="utf-8")
    return study, reports[0]


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise InputError(f"cannot write to {folder}: {err.strerror}") from err


def _report(networks: Networks, digits: Digits) -> Report:
    return report(
        networks.dense,
        networks.pruned,
        digits.test.x[:_REPORT_BATCH],
        evaluate=lambda model: accuracy(model, digits.test),
    )


def _runs(result: SeedResult) -> list[tuple[str, float, float]]:
    """Name, share of MACs and test accuracy of what had the same epochs, for the Pareto front."""
    return [
        (METHODS[method], result.macs[method] / result.macs["dense"], result.test[method])
        for method in ("dense", "one_shot", "swan")
    ]


def _write(
    folder: Path, networks: Networks, measured: Report, *, runs: Sequence[tuple[str, float, float]]
) -> None:
    save(networks.pruned, folder / "pruned.swan")
    dense = {key: value.contiguous() for key, value in networks.dense.state_dict().items()}
    save_file(dense, folder / "dense.safetensors")
    texts = {
        "plan.json": networks.plan.to_json(),
        "report.json": measured.to_json(),
        "report.md": measured.to_markdown(),
        "report.html": measured.to_html(
            channels=networks.channels, probabilities=networks.probabilities, runs=runs
        ),
    }
    for name, text in texts.items():
        (folder / name).write_text(text.rstrip("\n") + "\n", encoding="utf-8")
