"""Accuracy of blocks of neurons that tokens choose, against static cuts, on CIFAR-10 with a small Vision Transformer.

    python benchmarks/adaptive_tokens_accuracy.py --data cifar10-jpeg.tar.gz

The network is the one of `activations_training.py` (trained from scratch there, GELU; kept in `--work`). Per budget:
blocks of 32 neurons whose gates are fitted in closed form on training images, a static cut by Fisher scores, and
the same compensated. Each is measured as it is, and after the same epochs with the same images, loss and learning
rate (gates of blocks stay as fitted, and are fitted anew, with their means, when training is over). MACs are those
counted on test images. Rows in the result file are not measured again.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import activations_training as training
import torch
import torch.nn.functional as F
from _measure import arguments, console, environment, output_path, report, write
from quality_data import load, normalised, synthetic
from safetensors.torch import load_model
from torch import Tensor, nn

import swan_surgery as swan


BLOCK = 32
EPOCHS = 2
SHARES = (0.85, 0.7, 0.55)


class Comparison:
    """One seed: the dense network, and what is made of it."""

    def __init__(self, bench: training.Bench, lr: float, seed: int, *, count: int) -> None:
        self.bench, self.lr, self.seed = bench, lr, seed
        job = training.Job("vit", "scratch", training.GIVEN, lr, seed)
        if not bench.file_of(job).exists():
            bench.run(job)
        self.dense = training.build("vit", bench.schedule.size)
        load_model(self.dense, bench.file_of(job))
        self.dense.eval()
        x, y = bench.splits.train.x[:count], bench.splits.train.y[:count]
        self.images = list(normalised(x).split(128))
        self.pairs = list(zip(self.images, y.split(128), strict=True))
        self.total = swan.count_macs(self.dense, bench.example[:1])

    def accuracy(self, model: nn.Module) -> float:
        """Of test and validation images together, in %."""
        splits = self.bench.splits
        both = [training.accuracy(model, own) for own in (splits.test, splits.validation)]
        return sum(both) / 2

    def train(self, model: nn.Module) -> None:
        """The same for all; nothing but weights."""
        schedule = self.bench.schedule
        training.train(
            model,
            self.bench.splits,
            schedule,
            lr=self.lr * schedule.later,
            epochs=EPOCHS,
            seed=self.seed,
        )

    def rows(self, share: float) -> dict[str, dict[str, Any]]:
        """By method."""
        return {
            "blocks": self.blocks(share),
            "static": self.static(share, None),
            "static, compensated": self.static(share, self.images),
        }

    def blocks(self, share: float) -> dict[str, Any]:
        """Every token chooses."""
        adapted = swan.adapt(
            self.dense, self.bench.example, structure="blocks", block_size=BLOCK
        ).eval()
        swan.calibrate_widths(adapted, self.images)
        swan.fit_widths(adapted, self.images, macs=share)
        before = self.accuracy(adapted)
        for block in adapted.blocks().values():
            block.effort.requires_grad_(requires_grad=False)
        self.train(adapted)
        swan.calibrate_widths(adapted.eval(), self.images)
        swan.fit_widths(adapted, self.images, macs=share)
        stats = swan.width_stats(adapted, [normalised(self.bench.splits.test.x[:1000])])
        return {
            "macs_share": stats.mean_macs / self.total,
            "before": before,
            "after": self.accuracy(adapted),
        }

    def static(self, share: float, batches: list[Tensor] | None) -> dict[str, Any]:
        """One width for all, of heads and neurons."""

        def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1])

        gated = swan.swanify(self.dense, self.bench.example[:1])
        scores = swan.importance(gated, "fisher", batches=self.pairs, loss=loss)
        small = swan.prune_by_score(gated, scores, macs=share, compensate=batches)
        before = self.accuracy(small)
        macs = swan.count_macs(small, self.bench.example[:1])
        self.train(small)
        return {"macs_share": macs / self.total, "before": before, "after": self.accuracy(small)}


def parse() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, help="CIFAR-10 as a folder or tar archive of images")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--lr", type=float, default=2e-3, help="that the network was trained with")
    parser.add_argument("--work", type=Path, default=Path("out/activations"))
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.shares, options.work = [0], [0.7], options.work / "smoke"
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
    out, screen = output_path("adaptive_tokens_accuracy", options), console()
    rows: dict[str, dict[str, Any]] = {}
    if out is not None and out.exists():
        rows = json.loads(out.read_text())["rows"]

    def note(key: str, row: Callable[[], dict[str, Any]], **place: Any) -> None:
        if key not in rows:
            rows[key] = {**place, **row()}
            told = {name: value for name, value in rows[key].items() if isinstance(value, float)}
            screen.print(f"{key}: {told}")
            head = {"theme": "adaptive_tokens_accuracy", "environment": environment()}
            write(out, {**head, "rows": rows})

    for seed in options.seeds:
        own = Comparison(bench, options.lr, seed, count=64 if options.smoke else 1024)

        def dense(own: Comparison = own) -> dict[str, Any]:
            return {"macs_share": 1.0, "before": own.accuracy(own.dense)}

        note(f"dense/1/{seed}", dense, method="dense", share=1.0, seed=seed)
        for share in options.shares:
            if f"static/{share:g}/{seed}" not in rows:
                for method, row in own.rows(share).items():
                    note(
                        f"{method}/{share:g}/{seed}",
                        lambda row=row: row,
                        method=method,
                        share=share,
                        seed=seed,
                    )
    report(out, screen)


if __name__ == "__main__":
    main()
