"""Planning without memory: the channel map of Llama-3 models that were never given weights.

    python benchmarks/planning.py
    python benchmarks/planning.py --models llama-3-8b --repeats 1

The published configurations, built with transformers on the `meta` device in float32, and mapped on
eight real token ids. Every sample is a fresh process with one thread, because the peak of its
resident memory is part of the result; the memory before mapping (the imports and the empty model)
stands beside it.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from _measure import (
    arguments,
    console,
    environment,
    output_path,
    progress_bar,
    report,
    summary,
    write,
)
from rich.table import Table

import swan_surgery as swan


SHARED = {
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
}
# config.json of meta-llama/Meta-Llama-3-8B and -70B, as far as it decides shapes and paths.
MODELS: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        **SHARED,
    },
    "llama-3-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        **SHARED,
    },
}
SMOKE = {**MODELS["llama-3-8b"], "num_hidden_layers": 1, "vocab_size": 1000}
TOKENS = 8
TARGETS = {"wall_seconds": 60, "peak_gib": 4}  # for llama-3-70b
ONE = "--one"  # how this script calls itself
# A process of its own has one thread from the start.
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def map_one(config: dict[str, Any]) -> dict[str, Any]:
    """Build and map one model in this process."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 - only the child needs it

    torch.set_num_threads(1)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config))
    before = peak_gib()
    wall, cpu = time.perf_counter(), time.process_time()
    ids = torch.arange(TOKENS).unsqueeze(0)
    channels = swan.channel_map(model, {"input_ids": ids, "use_cache": False})
    sample = {
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "before_gib": before,
        "peak_gib": peak_gib(),
    }
    by_reason: Counter[str] = Counter()
    for pin in channels.pins:
        by_reason[pin.reason] += len(pin.channels)
    return {
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "layers": len(channels.layers),
        "channels": channels.num_channels,
        "gated_channels": channels.num_gated_channels,
        "output_channels": model.config.vocab_size,
        "units": channels.num_units,
        "pinned": dict(by_reason),
        "sample": sample,
    }


def peak_gib() -> float:
    """The most memory this process has held, in GiB; Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def in_fresh_process(config: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), ONE]
    done = subprocess.run(  # noqa: S603 - this script itself
        [*command, json.dumps(config)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **QUIET},
    )
    if done.returncode != 0:
        raise RuntimeError(f"mapping failed in its own process:\n{done.stderr}")
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def as_row(name: str, config: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The facts of all runs, which must agree, and their samples."""
    samples = [run.pop("sample") for run in runs]
    if any(run != runs[0] for run in runs):
        raise RuntimeError(f"{name}: two runs gave different channel maps")
    stats = {key: summary([sample[key] for sample in samples]) for key in samples[0]}
    inner = runs[0]["channels"] - runs[0]["output_channels"]
    shares = {"gated_percent": 100 * runs[0]["gated_channels"] / inner}
    return {"model": name, "config": config, **runs[0], **shares, **stats, "samples": samples}


def show(rows: list[dict[str, Any]]) -> Table:
    table = Table("model", "params", "layers", "units", "gated %", "wall s", "CPU s", "peak GiB")
    for row in rows:
        table.add_row(
            row["model"],
            f"{row['params'] / 1e9:.1f} G",
            str(row["layers"]),
            f"{row['units']:,}",
            f"{row['gated_percent']:.2f}",
            *(f"{row[key]['median']:.2f}" for key in ("wall_seconds", "cpu_seconds", "peak_gib")),
        )
    return table


def parse() -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(ONE, metavar="CONFIG", help="internal: map one model and print the facts")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.one:
        print(json.dumps(map_one(json.loads(options.one))))
        return
    models = {name: MODELS[name] for name in options.models}
    if options.smoke:
        models, options.repeats = {"llama-3-8b, one layer": SMOKE}, 1
    terminal = console()
    path = output_path("planning", options)
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"theme": "planning", "environment": environment(), "rows": rows}
    result["config"] = {"tokens": TOKENS, "repeats": options.repeats, "targets": TARGETS}
    with progress_bar(terminal) as bar:
        task = bar.add_task("models", total=len(models) * options.repeats)
        for name, config in models.items():
            runs = []
            for _ in range(options.repeats):
                bar.update(task, description=name)
                runs.append(in_fresh_process(config))
                bar.advance(task)
            rows.append(as_row(name, config, runs))
            write(path, result)
    terminal.print(show(rows))
    terminal.print(f"targets for llama-3-70b: {TARGETS}")
    report(path, terminal)


if __name__ == "__main__":
    main()
