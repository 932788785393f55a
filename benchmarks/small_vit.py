"""What the benchmarks of a small Vision Transformer share: options, the dense network, rows that are not measured again."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import activations_training as training
import torch
from _measure import arguments, console, environment, output_path, report, write
from quality_data import load, synthetic
from safetensors.torch import load_model
from torch import nn


def parse(doc: str | None, shares: Sequence[float], smoke: float) -> argparse.Namespace:
    """Options; `shares` of the MACs by default, `smoke` alone in a smoke run."""
    parser = arguments(doc)
    parser.add_argument("--data", type=Path, help="CIFAR-10 as a folder or tar archive of images")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--shares", nargs="+", type=float, default=list(shares))
    parser.add_argument("--lr", type=float, default=2e-3, help="that the network was trained with")
    parser.add_argument("--work", type=Path, default=Path("out/activations"))
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.shares, options.work = [0], [smoke], options.work / "smoke"
    elif options.data is None:
        parser.error("--data FILE: where the images are (see quality.py)")
    return options


def bench_of(options: argparse.Namespace) -> training.Bench:
    """The network's trainings, on one thread."""
    torch.set_num_threads(1)
    schedule = training.SCHEDULES["vit"]
    if options.smoke:
        schedule = replace(schedule, epochs=1, images=64, batch=32)
    splits = load(options.data, schedule.images) if options.data else synthetic(schedule.images)
    return training.Bench("vit", schedule, splits, options.work)


def dense_of(bench: training.Bench, lr: float, seed: int) -> nn.Module:
    """Trained once, and kept."""
    job = training.Job("vit", "scratch", training.GIVEN, lr, seed)
    if not bench.file_of(job).exists():
        bench.run(job)
    dense = training.build("vit", bench.schedule.size)
    load_model(dense, bench.file_of(job))
    return dense.eval()


class Notes:
    """The result file of a theme, written after every row."""

    def __init__(self, theme: str, options: argparse.Namespace) -> None:
        self.theme, self.out, self.screen = theme, output_path(theme, options), console()
        self.rows: dict[str, dict[str, Any]] = {}
        if self.out is not None and self.out.exists():
            self.rows = json.loads(self.out.read_text())["rows"]

    def note(self, key: str, row: Callable[[], dict[str, Any]], **place: Any) -> None:
        """Measure it, unless it is there."""
        if key not in self.rows:
            self.rows[key] = {**place, **row()}
            self.screen.print(f"{key}: {self.rows[key]}")
            head = {"theme": self.theme, "environment": environment()}
            write(self.out, {**head, "rows": self.rows})

    def end(self) -> None:
        """Say where they are."""
        report(self.out, self.screen)
