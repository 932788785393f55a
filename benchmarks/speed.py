"""How long channel map and swanify take, and how that grows with the number of layers.

    python benchmarks/speed.py
    python benchmarks/speed.py --profile densenet201    # the functions that take the time

One thread, 64x64 pixels, after one untimed call. The slope of log time over log layers, fitted over
each family and over all models, is 1 where time grows linearly.
"""

import argparse
import cProfile
import io
import pstats
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torchvision
from _measure import (
    arguments,
    console,
    cpu,
    environment,
    output_path,
    paired,
    progress_bar,
    report,
    spread,
    wall,
    write,
)
from rich.table import Table
from torch import nn

import swan_surgery as swan


RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
DENSENETS = ("densenet121", "densenet169", "densenet201")
SIZE = 64
TARGETS = {"map": 0.5, "swanify": 1.5}  # seconds for resnet50


def measure(name: str, repeats: int, tick: Callable[[], None]) -> dict[str, Any]:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    example = torch.randn(1, 3, SIZE, SIZE)
    functions = {
        "map": lambda: swan.channel_map(model, example),
        "swanify": lambda: swan.swanify(model, example),
    }
    samples = paired(functions, repeats=repeats, warmup=1, tick=tick)
    layers = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules())
    row: dict[str, Any] = {"model": name, "layers": layers, "samples": samples}
    for what, taken in samples.items():
        row[what] = {"wall": wall(taken), "cpu": cpu(taken)}
    return row


def slope(rows: list[dict[str, Any]], what: str) -> float:
    """Of log CPU time over log layers, by least squares."""
    layers = np.log([row["layers"] for row in rows])
    seconds = np.log([row[what]["cpu"]["median"] for row in rows])
    return float(np.polyfit(layers, seconds, 1)[0])


def slopes(rows: list[dict[str, Any]]) -> dict[str, float]:
    found = {}
    for family in ("resnet", "densenet", ""):
        members = [row for row in rows if row["model"].startswith(family)]
        if len(members) > 1:
            for what in TARGETS:
                found[f"{what} {family or 'all'}"] = slope(members, what)
    return found


def profiled(name: str, num_lines: int = 25) -> str:
    """Profile of one swanify call (cProfile), by own time and by cumulative time."""
    model = torchvision.models.get_model(name, weights=None).eval()
    example = torch.randn(1, 3, SIZE, SIZE)
    swan.swanify(model, example)
    profiler = cProfile.Profile()
    profiler.runcall(swan.swanify, model, example)
    text = io.StringIO()
    stats = pstats.Stats(profiler, stream=text).strip_dirs()
    stats.sort_stats("tottime").print_stats(num_lines)
    stats.sort_stats("cumtime").print_stats(2 * num_lines)
    return text.getvalue()


def show(rows: list[dict[str, Any]]) -> Table:
    table = Table("model", "layers", "map s", "map ms/layer", "swanify s", "swanify ms/layer")
    for row in rows:
        cells = [row["model"], str(row["layers"])]
        for what in TARGETS:
            cells += [
                f"{spread(row[what]['cpu'], 2)} (wall {row[what]['wall']['median']:.2f})",
                f"{1e3 * row[what]['cpu']['median'] / row['layers']:.1f}",
            ]
        table.add_row(*cells)
    return table


def parse() -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.add_argument("--models", nargs="+", default=[*RESNETS, *DENSENETS])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--profile", metavar="MODEL", help="profile one model and stop")
    options = parser.parse_args()
    if options.smoke:
        options.models, options.repeats = ["resnet18", "resnet34"], 1
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    terminal = console()
    if options.profile:
        print(profiled(options.profile))
        return
    path = output_path("speed", options)
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"theme": "speed", "environment": environment(), "rows": rows}
    result["config"] = {"size": SIZE, "repeats": options.repeats, "targets_seconds": TARGETS}
    with progress_bar(terminal) as bar:
        task = bar.add_task("models", total=len(options.models) * (options.repeats + 1))
        for name in options.models:
            bar.update(task, description=name)
            rows.append(measure(name, options.repeats, lambda: bar.advance(task)))
            result["slopes"] = slopes(rows)
            write(path, result)
    terminal.print(show(rows))
    fitted = ", ".join(f"{what} {value:.2f}" for what, value in result["slopes"].items())
    terminal.print(f"slope of log time over log layers: {fitted}")
    terminal.print(f"targets for resnet50, seconds: {TARGETS}")
    report(path, terminal)


if __name__ == "__main__":
    main()
