"""Is the pruned network really faster? Speed-up beside the MACs that are left.

    python benchmarks/latency.py

Cut to a half and a quarter of the MACs in the order that gates start in, with widths that are
multiples of the number that `swan.measure_latency_table` finds to be the fastest (`round_to="auto"`);
224x224 pixels, float32, eval mode, in torch and in onnxruntime. All of them take turns in one loop. A cut to half
the milliseconds (`latency_ms=`) shows how far the table's prediction is off, where the table was measured: eager, batch 1.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import torchvision
from _measure import (
    Sample,
    arguments,
    console,
    environment,
    output_path,
    paired,
    progress_bar,
    ratio,
    report,
    spread,
    summary,
    wall,
    write,
)
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.models import Inputs
from swan_surgery.timing.runtimes import forward_pass


MODELS = ("resnet50", "vgg16_bn", "mobilenet_v3_large", "vit_b_16")
RUNTIMES = ("eager", "onnxruntime")
SIZE = 224
BATCHES = (1, 8)
THREADS = (1,)
BUDGETS = (0.5, 0.25)
DENSE, TIMED = "dense", "latency 0.5"
SHARE_OF_TIME = 0.5


@dataclass(frozen=True)
class Cut:
    """A network and what it costs; `budget` is dense, `macs SHARE` or `latency SHARE`."""

    budget: str
    model: nn.Module
    macs: int
    params: int


def cuts_of(name: str, size: int, repeats: int) -> tuple[list[Cut], swan.LatencyTable]:
    """The dense model and the pruned ones."""
    torch.manual_seed(0)
    dense = torchvision.models.get_model(name, weights=None, num_classes=1000).eval()
    example = torch.randn(1, 3, size, size)
    gated = swan.swanify(dense, example)
    table = swan.measure_latency_table(gated, repeats=repeats)
    # In the order that gates start in.
    sizes, plainly = gated.gates.probabilities().detach(), {"per_cost": False, "diminishing": False}
    cut = partial(
        swan.prune_by_score, gated, sizes, round_to="auto", latency_table=table, **plainly
    )
    made = [(DENSE, dense), *((f"macs {share:g}", cut(macs=share)) for share in BUDGETS)]
    made.append((TIMED, cut(latency_ms=SHARE_OF_TIME * table.total_ms)))
    return [costed(budget, model.eval(), example) for budget, model in made], table


def costed(budget: str, model: nn.Module, example: Tensor) -> Cut:
    return Cut(budget, model, swan.count_macs(model, example), swan.count_params(model))


def measure(
    name: str, options: argparse.Namespace, bar: Progress, save: Callable[[dict[str, Any]], None]
) -> None:
    size = 64 if options.smoke else SIZE
    torch.set_num_threads(options.threads[0])
    cuts, table = cuts_of(name, size, 2 if options.smoke else 10)
    multiples = {
        str(own.multiple): {"macs_share": own.macs_share, "milliseconds": own.milliseconds}
        for own in table.multiples
    }
    for threads, runtime, batch in product(options.threads, options.runtimes, options.batches):
        torch.set_num_threads(threads)
        inputs = Inputs((torch.randn(batch, 3, size, size),), {})
        was_measured = runtime == "eager" and batch == 1 and threads == options.threads[0]
        taking = [cut for cut in cuts if cut.budget != TIMED or was_measured]
        passes = {cut.budget: untracked(forward_pass(cut.model, inputs, runtime)) for cut in taking}
        label = f"{name}, {runtime}, batch {batch}, threads {threads}"
        task = bar.add_task(label, total=options.repeats + 2)
        samples = paired(passes, repeats=options.repeats, tick=lambda task=task: bar.advance(task))
        for cut in taking[1:]:
            row = {
                "model": name,
                "budget": cut.budget,
                "runtime": runtime,
                "batch": batch,
                "threads": threads,
                "round_to": table.best_multiple,
                "multiples": multiples,
            }
            save(row | compare(samples, cut, cuts[0]))


def untracked(run: Callable[[], None]) -> Callable[[], None]:
    def quiet() -> None:
        with torch.inference_mode():
            run()

    return quiet


def compare(samples: dict[str, list[Sample]], cut: Cut, dense: Cut) -> dict[str, Any]:
    """What one cut saves; `kept` is its speed-up over that of its MACs."""
    before, after = samples[DENSE], samples[cut.budget]
    share = cut.macs / dense.macs
    taken = ratio(after, before)
    return {
        "macs_ratio": share,
        "params_ratio": cut.params / dense.params,
        "macs": cut.macs,
        "dense_macs": dense.macs,
        "dense": wall(before),
        "pruned": wall(after),
        "latency_ratio": taken,
        "kept": summary([share * b[0] / a[0] for a, b in zip(after, before, strict=True)]),
        "samples": {"dense": before, "pruned": after},
    }


def show(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        *("model", "asked for", "MACs %", "runtime", "batch", "threads", "dense ms", "pruned ms"),
        *("speed-up", "speed-up / MAC ratio"),
    )
    for row in rows:
        table.add_row(
            row["model"],
            row["budget"],
            f"{100 * row['macs_ratio']:.1f}",
            row["runtime"],
            str(row["batch"]),
            str(row["threads"]),
            f"{1e3 * row['dense']['median']:.1f}",
            f"{1e3 * row['pruned']['median']:.1f}",
            f"{1 / row['latency_ratio']['median']:.2f}",
            spread(row["kept"], 2),
        )
    return table


def parse() -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--threads", nargs="+", type=int, default=list(THREADS))
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES), choices=RUNTIMES)
    parser.add_argument("--repeats", type=int, default=20)
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
    result["config"] = {"size": SIZE, "budgets": BUDGETS, "round_to": "auto", "seed": 0}

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
