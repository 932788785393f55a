"""Every model of torchvision, every family of timm, transformers, other libraries: converted, exact, at what price?

    python benchmarks/zoo.py                              # all suites; continues where it stopped
    python benchmarks/zoo.py --suite timm --models 'res*' # only these
    python benchmarks/zoo.py --stale                      # again those measured with an older package
    python benchmarks/zoo.py --failed                     # again those that are not exact

Parameters are random, norms and constants included, so that a wrong channel shows (`zoo_models`).
Each model runs in two processes of its own, one for us (`zoo_work`) and one for Torch-Pruning
(`zoo_peer`), with a time and a memory limit. One result file per suite.
"""

import argparse
import fnmatch
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from _measure import (
    arguments,
    commit,
    console,
    environment,
    output_path,
    progress_bar,
    report,
    source_hash,
    write,
)
from rich.console import Console
from rich.table import Table
from tables import zoo_cells, zoo_row, zoo_totals
from zoo_models import PEER_SECONDS, SUITES, suite


LIMIT_SECONDS = {"torchvision": 1200, "timm": 600, "transformers": 600, "libraries": 600}
LIMIT_GIB = {"torchvision": 14.0, "timm": 8.0, "transformers": 8.0, "libraries": 8.0}
LOCK = Lock()


# --- in the process of one model -------------------------------------------------------------


def work(job: str, suite_name: str, name: str, memory_gib: float) -> None:
    """Run one job and print its facts, each time all so far, as lines of JSON."""
    limit = int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(1)
    seen: dict[str, Any] = {}

    def emit(facts: Mapping[str, Any]) -> None:
        seen.clear()
        seen.update(facts)
        seen["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(seen), flush=True)

    try:
        if job == "swan":
            from zoo_work import work_swan  # noqa: PLC0415 - each process imports what it needs

            work_swan(suite_name, name, emit)
        elif job == "ship":
            from zoo_ship import work_ship  # noqa: PLC0415 - each process imports what it needs

            work_ship(suite_name, name, emit)
        else:
            from zoo_peer import work_peer  # noqa: PLC0415 - each process imports what it needs

            work_peer(suite_name, name, emit)
    except Exception as err:  # noqa: BLE001 - whatever a model or a peer raises is the result
        text = str(err).strip()
        detail = f"{type(err).__name__}: {text.splitlines()[0] if text else ''}"
        emit(dict(seen) | {"verdict": "raises", "detail": f"{seen.get('stage')}: {detail}"})


# --- in the process that drives the sweep ----------------------------------------------------


def spawn(job: str, suite_name: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, "--worker", job, suite_name, name]
    command += ["--memory", str(options.memory or LIMIT_GIB[suite_name])]
    seconds = options.limit or LIMIT_SECONDS[suite_name]
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(  # noqa: S603 - ourselves
            command,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            env=os.environ | offline,
        )
        out, err, code = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as stopped:
        out = stopped.stdout.decode() if isinstance(stopped.stdout, bytes) else stopped.stdout or ""
        err, code = "", None
    lines = [line for line in out.splitlines() if line.startswith("{")]
    facts: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    stage = facts.get("stage", "start")
    if code is None:
        return facts | {"verdict": "hangs", "detail": f"{stage}: more than {seconds} s"}
    if code == -signal.SIGPROF:
        return facts | {
            "verdict": "hangs",
            "detail": f"{stage}: more than {PEER_SECONDS[suite_name]} s of CPU time",
        }
    if code:
        tail = (err.strip().splitlines() or [""])[-1]
        return facts | {"verdict": "raises", "detail": f"{stage}: exit code {code}: {tail}"}
    return facts


def load(path: Path | None, theme: str) -> dict[str, Any]:
    if path is None or not path.exists():
        return {"theme": theme, "environment": environment(), "rows": {}}
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def wanted(suite_name: str, options: argparse.Namespace) -> list[str]:
    models = suite(suite_name)
    if options.models:
        return [n for n in models.names() if any(fnmatch.fnmatch(n, p) for p in options.models)]
    return [models.SMOKE] if options.smoke else list(models.names())


def is_due(name: str, rows: Mapping[str, Any], options: argparse.Namespace) -> bool:
    """Not measured yet; with `--stale` also with other sources, with `--failed` also not exact."""
    if options.again or name not in rows:
        return True
    row = rows[name]
    if options.peer == "only":
        return bool(row["torch_pruning"]["verdict"] == "not run")
    failed = options.failed and row["swan"]["verdict"] != "exact"
    return failed or (options.stale and row["source"] != source_hash())


def measure(suite_name: str, name: str, options: argparse.Namespace, old: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"commit": commit(), "source": source_hash()}
    if options.peer == "only" and old is not None:
        row = dict(old)
    else:
        row["swan"] = spawn("swan", suite_name, name, options)
    known = {"verdict": "not run"} if old is None else old["torch_pruning"]
    if options.peer == "no" or (known["verdict"] != "not run" and not options.again):
        row["torch_pruning"] = known  # it does not change with our sources
    else:
        row["torch_pruning"] = spawn("peer", suite_name, name, options)
    return row


def sweep(suite_name: str, options: argparse.Namespace, terminal: Console) -> None:
    path = output_path(f"zoo_{suite_name}", options)
    result = load(path, f"zoo_{suite_name}")
    names = [n for n in wanted(suite_name, options) if is_due(n, result["rows"], options)]
    with progress_bar(terminal) as bar, ThreadPoolExecutor(options.jobs) as pool:
        task = bar.add_task(suite_name, total=len(names))

        def one(name: str) -> None:
            row = measure(suite_name, name, options, result["rows"].get(name))
            with LOCK:
                result["rows"][name] = row
                write(path, result)
                bar.console.print(" | ".join(cell for cell in zoo_row(name, row) if cell))
                bar.advance(task)

        list(pool.map(one, names))
    rows = {n: r for n, r in result["rows"].items() if not names or n in names}
    header, cells = zoo_cells(rows)
    table = Table(*header, title=suite_name)
    for row in cells:
        table.add_row(*row)
    terminal.print(table)
    terminal.print(zoo_totals(rows))
    report(path, terminal)


def parse() -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.add_argument("--suite", choices=SUITES, help="default: all")
    parser.add_argument("--models", nargs="+", metavar="PATTERN", help="names or glob patterns")
    parser.add_argument("--again", action="store_true", help="measure models already in the file")
    parser.add_argument(
        "--stale", action="store_true", help="measure again what an older package measured"
    )
    parser.add_argument("--failed", action="store_true", help="measure again what is not exact")
    parser.add_argument(
        "--peer",
        choices=("yes", "no", "only"),
        default="yes",
        help="run Torch-Pruning too: yes, later (no), or where it has not run yet (only)",
    )
    parser.add_argument("--limit", type=int, help="seconds per process")
    parser.add_argument("--memory", type=float, help="GiB per process")
    parser.add_argument("--jobs", type=int, default=1, help="models at once")
    parser.add_argument(
        "--worker", nargs=3, metavar=("JOB", "SUITE", "MODEL"), help=argparse.SUPPRESS
    )
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.worker:
        work(*options.worker, options.memory)
        return
    suites = SUITES[:1] if options.smoke and not options.suite else SUITES
    for name in [options.suite] if options.suite else suites:
        sweep(name, options, console())


if __name__ == "__main__":
    main()
