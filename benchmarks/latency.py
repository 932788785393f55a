"""Is the pruned network really faster? Latency ratio beside MAC ratio.

    python benchmarks/latency.py

Half of the units closed, at random and by lowest p (the importance order that gates start in), cut
with `round_to=8`; 224x224 pixels, float32, eval mode. The dense and both pruned networks take turns.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torchvision
from _measure import (
    arguments,
    console,
    environment,
    output_path,
    paired,
    progress_bar,
    ratio,
    report,
    spread,
    wall,
    write,
)
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import swan_surgery as swan


MODELS = ("vgg16_bn", "resnet50")
SIZE = 224
BATCHES = (1, 8)
THREADS = (1, 2)
SHARE = 0.5
ROUND_TO = 8
CLOSINGS = ("random", "lowest p")


def closed_units(gated: swan.GatedModel, closing: str) -> Tensor:
    """Exactly half of the units, as a bool mask."""
    number = gated.channels.num_units
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(number, generator=generator)
    if closing == "lowest p":
        p = gated.gates.probabilities().detach()
        order = p.argsort(stable=True)
    closed = torch.zeros(number, dtype=torch.bool)
    closed[order[: round(SHARE * number)]] = True
    return closed


def pruned_models(name: str, size: int) -> Iterator[tuple[str, nn.Module, dict[str, float]]]:
    """The dense model and each pruned one, with their costs."""
    torch.manual_seed(0)
    dense = torchvision.models.get_model(name, weights=None).eval()
    example = torch.randn(1, 3, size, size)
    gated = swan.swanify(dense, example)
    started = gated.gates.logits.detach().clone()
    macs, params = swan.count_macs(dense, example), swan.count_params(dense)
    yield "dense", dense, {"macs": macs, "params": params, "closed_share": 0.0}
    for closing in CLOSINGS:
        gated.gates.logits.data.copy_(started)
        closed = closed_units(gated, closing)
        gated.gates.logits.data = torch.where(closed, -3.0, 3.0)
        pruned = swan.prune(gated, round_to=ROUND_TO).eval()
        costs = {"macs": swan.count_macs(pruned, example), "params": swan.count_params(pruned)}
        yield closing, pruned, costs | {"closed_share": float(closed.double().mean())}


def forward_of(model: nn.Module, images: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return model(images)

    return run


def measure(
    name: str, options: argparse.Namespace, bar: Progress, save: Callable[[dict[str, Any]], None]
) -> None:
    size = 64 if options.smoke else SIZE
    models = list(pruned_models(name, size))
    costs = {key: cost for key, _, cost in models}
    for threads in options.threads:
        torch.set_num_threads(threads)
        for batch in options.batches:
            images = torch.randn(batch, 3, size, size)
            functions = {key: forward_of(model, images) for key, model, _ in models}
            label = f"{name}, batch {batch}, threads {threads}"
            task = bar.add_task(label, total=options.repeats + 2)
            samples = paired(
                functions, repeats=options.repeats, tick=lambda task=task: bar.advance(task)
            )
            for closing in CLOSINGS:
                row = {"model": name, "closing": closing, "batch": batch, "threads": threads}
                save(row | compare(samples, costs, closing))


def compare(
    samples: dict[str, list[tuple[float, float]]], costs: dict[str, dict[str, float]], closing: str
) -> dict[str, Any]:
    dense, own = costs["dense"], costs[closing]
    return {
        "closed_share": own["closed_share"],
        "macs_ratio": own["macs"] / dense["macs"],
        "params_ratio": own["params"] / dense["params"],
        "macs": own["macs"],
        "dense_macs": dense["macs"],
        "dense": wall(samples["dense"]),
        "pruned": wall(samples[closing]),
        "latency_ratio": ratio(samples[closing], samples["dense"]),
        "samples": {"dense": samples["dense"], "pruned": samples[closing]},
    }


def show(rows: list[dict[str, Any]]) -> Table:
    table = Table("model", "closed", "batch", "threads", "dense ms", "latency ratio", "MAC ratio")
    for row in rows:
        table.add_row(
            row["model"],
            row["closing"],
            str(row["batch"]),
            str(row["threads"]),
            f"{1e3 * row['dense']['median']:.1f}",
            spread(row["latency_ratio"]),
            f"{row['macs_ratio']:.3f}",
        )
    return table


def parse() -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--threads", nargs="+", type=int, default=list(THREADS))
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    if options.smoke:
        options.models, options.batches, options.threads = ["resnet18"], [1], [1]
        options.repeats = 2
    return options


def main() -> None:
    options = parse()
    terminal = console()
    path = output_path("latency", options)
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"theme": "latency", "environment": environment(), "rows": rows}
    result["config"] = {"size": SIZE, "closed_share": SHARE, "round_to": ROUND_TO, "seed": 0}

    def save(row: dict[str, Any]) -> None:
        rows.append(row)
        write(path, result)

    with progress_bar(terminal) as bar:
        for name in options.models:
            measure(name, options, bar, save)
    terminal.print(show(rows))
    report(path, terminal)


if __name__ == "__main__":
    main()
