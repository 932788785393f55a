"""How long channel map, swanify and prune take, and how that grows with the number of layers.

    python benchmarks/speed.py
    python benchmarks/speed.py --profile densenet201    # the functions that take the time

One thread, float32, 64x64 pixels (56x56 for patches of 14), after one untimed call; prune closes half
of the units at random and verifies. Every model has a process of its own, for the peak of its
memory. The slope of log time over log layers, fitted over each family and over all models, is 1
where time grows linearly; layers are convolutions and linear layers.
"""

import argparse
import cProfile
import io
import json
import os
import pstats
import resource
import subprocess
import sys
from pathlib import Path
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
from torch import Tensor, nn

import swan_surgery as swan


RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
DENSENETS = ("densenet121", "densenet169", "densenet201")
VITS = ("vit_b_16", "vit_l_16", "vit_h_14")
SWINS = ("swin_t", "swin_s", "swin_b")
FAMILIES = ("resnet", "densenet", "vit", "swin")
SIZE = 64
SIZES = {"vit_h_14": 56}
WHAT = ("map", "swanify", "prune")
TARGETS = {"map": 0.5, "swanify": 1.5}  # seconds for resnet50
ONE = "--one"  # how this script calls itself


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A model with random weights, and an image."""
    torch.manual_seed(0)
    size = SIZES.get(name, SIZE)
    options = {"image_size": size} if name.startswith("vit") else {}
    model = torchvision.models.get_model(name, weights=None, **options).eval()
    return model, torch.randn(1, 3, size, size)


def measure(name: str, repeats: int) -> dict[str, Any]:
    """One model in this process."""
    torch.set_num_threads(1)
    model, example = build(name)
    before = peak_gib()
    channels = swan.channel_map(model, example)
    map_peak = peak_gib()
    gated = swan.swanify(model, example)
    closed = torch.rand(gated.gates.num_units) < 0.5
    gated.gates.logits.data = torch.where(closed, -3.0, 3.0)
    functions = {
        "map": lambda: swan.channel_map(model, example),
        "swanify": lambda: swan.swanify(model, example),
        "prune": lambda: swan.prune(gated),
    }
    samples = paired(functions, repeats=repeats, warmup=1)
    row: dict[str, Any] = {
        "model": name,
        "layers": sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules()),
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "units": channels.num_units,
        "image_size": example.shape[-1],
        "samples": samples,
    }
    for what, taken in samples.items():
        row[what] = {"wall": wall(taken), "cpu": cpu(taken)}
    # The model itself is in `built`; the map needs no copy of it, swanify and prune do.
    return row | {"gib": {"built": before, "map": map_peak, "all": peak_gib()}}


def peak_gib() -> float:
    """The most memory this process has held, in GiB; Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def in_fresh_process(name: str, repeats: int) -> dict[str, Any]:
    script = str(Path(__file__).resolve())
    command = [sys.executable, "-W", "ignore", script, ONE, name, "--repeats", str(repeats)]
    done = subprocess.run(  # noqa: S603 - this script itself
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode != 0:
        raise RuntimeError(f"{name} failed in its own process:\n{done.stderr}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def slope(rows: list[dict[str, Any]], what: str) -> float:
    """Of log CPU time over log layers, by least squares."""
    layers = np.log([row["layers"] for row in rows])
    seconds = np.log([row[what]["cpu"]["median"] for row in rows])
    return float(np.polyfit(layers, seconds, 1)[0])


def slopes(rows: list[dict[str, Any]]) -> dict[str, float]:
    found = {}
    for family in (*FAMILIES, ""):
        members = [row for row in rows if row["model"].startswith(family)]
        if len({row["layers"] for row in members}) > 1:
            for what in WHAT:
                found[f"{what} {family or 'all'}"] = slope(members, what)
    return found


def profiled(name: str, num_lines: int = 25) -> str:
    """Profile of one swanify call (cProfile), by own time and by cumulative time."""
    model, example = build(name)
    swan.swanify(model, example)
    profiler = cProfile.Profile()
    profiler.runcall(swan.swanify, model, example)
    text = io.StringIO()
    stats = pstats.Stats(profiler, stream=text).strip_dirs()
    stats.sort_stats("tottime").print_stats(num_lines)
    stats.sort_stats("cumtime").print_stats(2 * num_lines)
    return text.getvalue()


def show(rows: list[dict[str, Any]]) -> Table:
    columns = [column for what in WHAT for column in (f"{what} s", "ms/layer")]
    table = Table("model", "layers", *columns, "GiB: model", "map", "all")
    for row in rows:
        cells = [row["model"], str(row["layers"])]
        for what in WHAT:
            cells += [
                f"{spread(row[what]['cpu'], 2)} (wall {row[what]['wall']['median']:.2f})",
                f"{1e3 * row[what]['cpu']['median'] / row['layers']:.1f}",
            ]
        table.add_row(*cells, *(f"{gib:.2f}" for gib in row["gib"].values()))
    return table


def parse() -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.add_argument("--models", nargs="+", default=[*RESNETS, *DENSENETS, *VITS, *SWINS])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(ONE, metavar="MODEL", help="internal: measure one and print the row")
    parser.add_argument("--profile", metavar="MODEL", help="profile one model and stop")
    options = parser.parse_args()
    if options.smoke:
        options.models, options.repeats = ["resnet18", "squeezenet1_1"], 1
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    terminal = console()
    if options.profile:
        print(profiled(options.profile))
        return
    if options.one:
        print(json.dumps(measure(options.one, options.repeats)))
        return
    path = output_path("speed", options)
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"theme": "speed", "environment": environment(), "rows": rows}
    sizes = {"size": SIZE, "sizes": SIZES}
    result["config"] = {**sizes, "repeats": options.repeats, "targets_seconds": TARGETS}
    with progress_bar(terminal) as bar:
        task = bar.add_task("models", total=len(options.models))
        for name in options.models:
            bar.update(task, description=name)
            rows.append(in_fresh_process(name, options.repeats))
            bar.advance(task)
            result["slopes"] = slopes(rows)
            write(path, result)
    terminal.print(show(rows))
    fitted = ", ".join(f"{what} {value:.2f}" for what, value in result["slopes"].items())
    terminal.print(f"slope of log time over log layers: {fitted}")
    terminal.print(f"targets for resnet50, seconds: {TARGETS}")
    report(path, terminal)


if __name__ == "__main__":
    main()
