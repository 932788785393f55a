"""A small Vision Transformer cut on CIFAR-10, compensated and not, beside Torch-Pruning, before and after the same training.

    python benchmarks/vit_cut.py --data cifar10-jpeg.tar.gz

The network is the one of `activations_training.py` (torchvision's, 4 layers, trained from scratch there, GELU; kept in
`--work`). Ours: heads, neurons and the residual stream by Fisher scores of 1,024 images, as cut, and solved for anew with
the same images. Torch-Pruning: uniform ratios by group L2 or Taylor scores (of the same images), the ratio that comes nearest
to the budget. Training: the same epochs, images and cosine; the peak rate is chosen for every method alike among `RATES` by
validation accuracy of seed 0. Rows in the result file are not measured again.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import activations_training as training
import torch
import torch.nn.functional as F
import torch_pruning as tp
from _measure import arguments, console, environment, output_path, report, write
from quality_data import load, normalised, synthetic
from quality_peers import nearest_cut
from safetensors.torch import load_model
from torch import Tensor, nn

import swan_surgery as swan


EPOCHS = 3
RATES = (3e-4, 1e-3, 3e-3)
SHARES = (0.5, 0.25, 0.1)
METHODS = ("ours", "ours, compensated", "tp-l2", "tp-taylor")
HEADS = 4
warnings.filterwarnings("ignore", "Unwrapped parameters detected")  # Torch-Pruning's, of tokens


def labelled(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy, as scores see it."""
    return F.cross_entropy(model(batch[0]), batch[1])


class Cuts:
    """One seed: the dense network, and what is cut out of it."""

    def __init__(self, bench: training.Bench, lr: float, seed: int, *, count: int) -> None:
        self.bench, self.seed = bench, seed
        job = training.Job("vit", "scratch", training.GIVEN, lr, seed)
        if not bench.file_of(job).exists():
            bench.run(job)
        self.dense = training.build("vit", bench.schedule.size)
        load_model(self.dense, bench.file_of(job))
        self.dense.eval()
        train = bench.splits.train
        images = normalised(train.x[:count]).split(128)
        self.pairs = list(zip(images, train.y[:count].split(128), strict=True))
        self.example = bench.example[:1]
        self.total = swan.count_macs(self.dense, self.example)

    def cut(self, method: str, share: float) -> nn.Module:
        """What is left, not trained."""
        if method.startswith("tp-"):
            return self.by_torch_pruning(method.removeprefix("tp-"), share)
        gated = swan.swanify(self.dense, self.example)
        scores = swan.importance(gated, "fisher", batches=self.pairs, loss=labelled)
        batches = [x for x, _ in self.pairs] if method.endswith("compensated") else None
        return swan.prune_by_score(gated, scores, macs=share, compensate=batches)

    def by_torch_pruning(self, score: str, share: float) -> nn.Module:
        """Its uniform cut that comes nearest; widths stay multiples of the heads, or attention breaks."""
        kind: Any = tp.importance.GroupTaylorImportance
        if score == "l2":
            kind = tp.importance.GroupMagnitudeImportance

        def pruner(trial: nn.Module, ratio: float) -> Any:
            return tp.pruner.BasePruner(
                trial, self.example, importance=kind(), pruning_ratio=ratio, max_pruning_ratio=1.0,
                ignored_layers=[trial.heads], round_to=HEADS,
            )  # fmt: skip

        def prepare(trial: nn.Module) -> None:
            for pair in self.pairs if score == "taylor" else ():
                labelled(trial, pair).backward()

        def finished(trial: nn.Module) -> nn.Module:
            trial.hidden_dim = (
                trial.conv_proj.out_channels
            )  # its users set by hand what forward reads
            return trial

        total = share * self.total
        return nearest_cut(self.dense, pruner, self.example, total, prepare, finished=finished)

    def go(self, method: str, share: float, lr: float) -> dict[str, Any]:
        """One row."""
        started = time.perf_counter()
        model = self.cut(method, share) if share < 1 else self.dense
        splits = self.bench.splits
        found = {
            "cut_seconds": round(time.perf_counter() - started, 1),
            "macs_share": swan.count_macs(model, self.example) / self.total,
            "before": training.accuracy(model, splits.test),
        }
        if share < 1:
            training.train(model, splits, self.bench.schedule, lr=lr, epochs=EPOCHS, seed=self.seed)
            found["after"] = training.accuracy(model, splits.test)
            found["validation"] = training.accuracy(model, splits.validation)
        return found


def rates(rows: dict[str, Any], method: str, share: float, seed: int) -> list[float]:
    """All of seed 0; of the others the one that was best there."""
    if share == 1:
        return [RATES[0]]
    if seed == 0:
        return list(RATES)
    own = [r for r in rows.values() if (r["method"], r["share"], r["seed"]) == (method, share, 0)]
    return [max(own, key=lambda row: row["validation"])["lr"]] if own else [RATES[1]]


def parse() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, help="CIFAR-10 as a folder or tar archive of images")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--lr", type=float, default=2e-3, help="that the network was trained with")
    parser.add_argument("--work", type=Path, default=Path("out/activations"))
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.shares, options.work = [0], [0.5], options.work / "smoke"
    elif options.data is None:
        parser.error("--data FILE: where the images are (see quality.py)")
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    schedule = training.SCHEDULES["vit"]
    if options.smoke:
        schedule = replace(schedule, epochs=1, images=64, batch=32)
    splits = load(options.data, schedule.images) if options.data else synthetic(schedule.images)
    bench = training.Bench("vit", schedule, splits, options.work)
    out, screen = output_path("vit_cut", options), console()
    rows: dict[str, dict[str, Any]] = {}
    if out is not None and out.exists():
        rows = json.loads(out.read_text())["rows"]

    def note(key: str, row: Callable[[], dict[str, Any]], **place: Any) -> None:
        if key not in rows:
            rows[key] = {**place, **row()}
            screen.print(f"{key}: {rows[key]}")
            write(out, {"theme": "vit_cut", "environment": environment(), "rows": rows})

    for seed in options.seeds:
        cuts = Cuts(bench, options.lr, seed, count=64 if options.smoke else 1024)
        for share in (1.0, *options.shares):
            for method in METHODS if share < 1 else ("dense",):
                for lr in rates(rows, method, share, seed)[: 1 if options.smoke else None]:
                    note(
                        f"{method}/{share:g}/{seed}/{lr:g}",
                        lambda own=(method, share, lr), cuts=cuts: cuts.go(*own),
                        method=method, share=share, seed=seed, lr=lr,
                    )  # fmt: skip
    report(out, screen)


if __name__ == "__main__":
    main()
