"""What gates cost in training: a step of the gated network over a step of the ungated one.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --profile resnet50    # where the extra time goes

A step is forward, cross-entropy and backward (and, reported apart, the SGD step), at 64x64 pixels,
batch 8, float32. Folded is what swanify makes: gates scale the parameters of the layer in front
wherever that pays; explicit ones all multiply the activation. All variants take turns; a ratio is taken within one turn.
"""

import argparse
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
import torchvision
from _measure import (
    Sample,
    arguments,
    console,
    environment,
    output_path,
    progress_bar,
    ratio,
    report,
    spread,
    wall,
    write,
)
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import swan_surgery as swan
from swan_surgery.gates import FoldedGate


MODELS = ("resnet50", "vgg16_bn")
MODES = ("ste", "soft")
BATCH = 8
SIZE = 64
CLASSES = 1000
TARGET = 1.03

# One variant: prepares the model (outside the clock), and the model it trains.
Variant = tuple[Callable[[], None], nn.Module]


def set_gates_(gated: swan.GatedModel, mode: str, folded_sites: Collection[str]) -> None:
    gated.gates.mode = mode
    for name, site in gated.sites.items():
        if isinstance(site, FoldedGate):
            site.is_folded = name in folded_sites


def variants(name: str) -> dict[str, Variant]:
    torch.manual_seed(0)
    dense = torchvision.models.get_model(name, weights=None).train()
    gated = swan.swanify(dense, torch.randn(1, 3, SIZE, SIZE)).train()
    folded = {n for n, site in gated.sites.items() if getattr(site, "is_folded", False)}
    found: dict[str, Variant] = {"ungated": (lambda: None, dense)}
    for mode in MODES:
        for kind, sites in (("folded", folded), ("explicit", set[str]())):
            found[f"{kind}_{mode}"] = (partial(set_gates_, gated, mode, sites), gated)
    return found


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> tuple[Sample, Sample]:
    """Seconds (wall, CPU) of forward and backward, and of the whole step with the optimizer."""
    optimizer.zero_grad(set_to_none=True)
    wall_start, cpu_start = time.perf_counter(), time.process_time()
    F.cross_entropy(model(images), labels).backward()
    middle = (time.perf_counter() - wall_start, time.process_time() - cpu_start)
    optimizer.step()
    return middle, (time.perf_counter() - wall_start, time.process_time() - cpu_start)


def measure(name: str, repeats: int, warmup: int, tick: Callable[[], None]) -> list[dict[str, Any]]:
    found = variants(name)
    # Tiny steps: the weights must stay what they are, only the work counts.
    optimizers = {
        id(model): torch.optim.SGD(model.parameters(), lr=1e-6) for _, model in found.values()
    }
    images, labels = torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(CLASSES, (BATCH,))
    names = list(found)
    samples: dict[str, list[Sample]] = {n: [] for n in names}
    whole: dict[str, list[Sample]] = {n: [] for n in names}
    for turn in range(warmup + repeats):
        first = turn % len(names)
        for variant in names[first:] + names[:first]:
            prepare, model = found[variant]
            prepare()
            middle, end = step(model, optimizers[id(model)], images, labels)
            if turn >= warmup:
                samples[variant].append(middle)
                whole[variant].append(end)
        tick()
    return [row_of(name, mode, samples, whole) for mode in MODES]


def row_of(
    name: str, mode: str, samples: dict[str, list[Sample]], whole: dict[str, list[Sample]]
) -> dict[str, Any]:
    ratios, cpu_ratios = {}, {}
    for kind in ("folded", "explicit"):
        for suffix, taken in (("", samples), ("_with_optimizer", whole)):
            pair = taken[f"{kind}_{mode}"], taken["ungated"]
            ratios[kind + suffix] = ratio(*pair)
            cpu_ratios[kind + suffix] = ratio(*pair, clock=1)
    return {
        "model": name,
        "mode": mode,
        "ungated_step_seconds": wall(samples["ungated"]),
        "ratios": ratios,
        "cpu_ratios": cpu_ratios,
        "samples": {key: samples[key] for key in ("ungated", f"folded_{mode}", f"explicit_{mode}")},
        "samples_with_optimizer": {
            key: whole[key] for key in ("ungated", f"folded_{mode}", f"explicit_{mode}")
        },
    }


def profile_steps(name: str, num_steps: int = 5) -> str:
    """Operators by their own CPU time, ungated and folded, over a few steps."""
    images, labels = torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(CLASSES, (BATCH,))
    found = variants(name)
    texts = []
    for variant in ("ungated", "folded_ste"):
        prepare, model = found[variant]
        prepare()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        step(model, optimizer, images, labels)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(num_steps):
                step(model, optimizer, images, labels)
        table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25)
        texts.append(f"{variant}, {num_steps} steps\n{table}")
    return "\n".join(texts)


def show(rows: list[dict[str, Any]]) -> Table:
    table = Table("model", "gates", "folded", "explicit", "folded + SGD", "explicit + SGD")
    for row in rows:
        ratios = row["ratios"]
        table.add_row(
            row["model"],
            row["mode"],
            spread(ratios["folded"]),
            spread(ratios["explicit"]),
            spread(ratios["folded_with_optimizer"]),
            spread(ratios["explicit_with_optimizer"]),
        )
    return table


def parse() -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", metavar="MODEL", help="profile one model and stop")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    terminal = console()
    if options.profile:
        print(profile_steps(options.profile))
        return
    models, repeats, warmup = options.models, options.repeats, 3
    if options.smoke:
        models, repeats, warmup = ["resnet18"], 2, 1
    path = output_path("overhead", options)
    result: dict[str, Any] = {"theme": "overhead", "environment": environment()}
    result["config"] = {"batch": BATCH, "size": SIZE, "dtype": "float32", "repeats": repeats}
    rows: list[dict[str, Any]] = []
    result["rows"] = rows
    with progress_bar(terminal) as bar:
        for name in models:
            task = bar.add_task(name, total=repeats + warmup)
            rows += measure(name, repeats, warmup, lambda task=task: bar.advance(task))
            write(path, result)
    terminal.print(show(rows), f"target: folded <= {TARGET}")
    report(path, terminal)


if __name__ == "__main__":
    main()
