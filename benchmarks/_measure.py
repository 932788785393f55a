"""What every benchmark shares: the environment header, paired timing, and result files.

Timing is paired: the variants of one comparison take turns inside one loop, so that whatever else
the machine does meets all of them. Every sample is kept, as wall seconds and as CPU seconds of this
process; CPU seconds on one thread hardly notice that other jobs share the machine.
"""

import argparse
import hashlib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from swan_surgery.environment.machine import device_name


ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "torchvision", "timm", "transformers", "torch-pruning", "fvcore", "numpy")
Sample = tuple[float, float]  # wall seconds, CPU seconds of this process

# fvcore 0.1.5 and torchvision script functions at import; torch 2.15 deprecates that.
warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")


def commit() -> str:
    """The commit that is checked out, with `+dirty` where the work tree differs from it."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+dirty" if _git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S603
    return done.stdout.strip()


def source_hash() -> str:
    """Names the exact state of the package, committed or not."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "swan_surgery").rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Where and with what a result was measured."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "source": source_hash(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "processor": device_name(torch.device("cpu")),
        "cpus": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": os.getloadavg(),
        "niceness": os.nice(0),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def paired(
    variants: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 2,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, list[Sample]]:
    """Time several variants in turns.

    Sample i of one variant was taken next to sample i of every other; who goes first rotates.

    Args:
        variants: what to time, by name.
        repeats: samples of each variant.
        warmup: untimed calls of each variant before.
        tick: called after each round, the untimed ones included.
    """
    names = list(variants)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for turn in range(warmup + repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            wall, cpu = time.perf_counter(), time.process_time()
            variants[name]()
            taken = (time.perf_counter() - wall, time.process_time() - cpu)
            if turn >= warmup:
                samples[name].append(taken)
        tick()
    return samples


def summary(values: Sequence[float]) -> dict[str, float]:
    """Least, median, quartiles and number of values."""
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {
        "min": min(values),
        "median": statistics.median(values),
        "q1": quartiles[0],
        "q3": quartiles[2],
        "num": len(values),
    }


def wall(samples: Sequence[Sample]) -> dict[str, float]:
    """Summary of the wall seconds."""
    return summary([sample[0] for sample in samples])


def cpu(samples: Sequence[Sample]) -> dict[str, float]:
    """Summary of the CPU seconds."""
    return summary([sample[1] for sample in samples])


def ratio(over: Sequence[Sample], under: Sequence[Sample], *, clock: int = 0) -> dict[str, float]:
    """Summary of the ratios pair by pair; `clock` 0 is wall seconds, 1 CPU seconds."""
    return summary([a[clock] / b[clock] for a, b in zip(over, under, strict=True)])


def spread(stats: Mapping[str, float], digits: int = 3) -> str:
    """`1.021 [1.013, 1.030]`: median and quartiles, as text."""
    median, low, high = (f"{stats[key]:.{digits}f}" for key in ("median", "q1", "q3"))
    return f"{median} [{low}, {high}]"


def arguments(description: str) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--output", type=Path, help="result file (default: benchmarks/results/)")
    return parser


def output_path(theme: str, options: argparse.Namespace) -> Path | None:
    """Where results go: `results/2026-11_cpu2_<theme>.json`. A smoke run writes where told, only."""
    if options.output is not None:
        return Path(options.output)
    if options.smoke:
        return None
    date = datetime.now(UTC).strftime("%Y-%m")
    return RESULTS / f"{date}_cpu{os.cpu_count()}_{theme}.json"


def write(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write a result file whole or not at all."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)


def report(path: Path | None, console: Console) -> None:
    """Say where the result went."""
    console.print("smoke run, nothing written" if path is None else f"written: {path}")


def console() -> Console:
    """Where benchmarks print; wide enough for the tables when it is a file."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=180)


def progress_bar(console: Console) -> Progress:
    """One bar with a count and the time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
