"""Accuracy of blocks of neurons that tokens choose, against static cuts, on CIFAR-10 with a small Vision Transformer.

    python benchmarks/adaptive_tokens_accuracy.py --data cifar10-jpeg.tar.gz

The network is the one of `activations_training.py` (trained from scratch there, GELU; kept in `--work`). Per budget:
blocks of 32 neurons whose gates are fitted in closed form on training images, a static cut by Fisher scores, and
the same compensated. Each is measured as it is, and after the same epochs with the same images, loss and learning
rate (gates of blocks stay as fitted, and are fitted anew, with their means, when training is over). *Nested* is one model for all
budgets: feed-forward layers whose samples take widths, allocated by Fisher scores and with readers solved for; its steps train two
widths each, and it is fitted to every budget before training and after. MACs are those
counted on test images. Rows in the result file are not measured again.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import activations_training as training
import torch
import torch.nn.functional as F
from quality_data import normalised
from small_vit import Notes, bench_of, dense_of, parse
from torch import Tensor, nn

import swan_surgery as swan


BLOCK = 32
EPOCHS = 2
SHARES = (0.85, 0.7, 0.55)
WIDTHS = (0.25, 0.5, 0.75, 1.0)  # of the MACs that adapt


class Comparison:
    """One seed: the dense network, and what is made of it."""

    def __init__(self, bench: training.Bench, lr: float, seed: int, *, count: int) -> None:
        self.bench, self.lr, self.seed = bench, lr, seed
        self.dense = dense_of(bench, lr, seed)
        x, y = bench.splits.train.x[:count], bench.splits.train.y[:count]
        self.images = list(normalised(x).split(128))
        self.pairs = list(zip(self.images, y.split(128), strict=True))
        self.total = swan.count_macs(self.dense, bench.example[:1])
        self.gated = swan.swanify(self.dense, bench.example[:1])
        self.scores = swan.importance(
            self.gated,
            "fisher",
            batches=self.pairs,
            loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        )
        self.nested_models: tuple[swan.AdaptiveModel, swan.AdaptiveModel] | None = None

    def accuracy(self, model: nn.Module) -> float:
        """Of test and validation images together, in %."""
        splits = self.bench.splits
        both = [training.accuracy(model, own) for own in (splits.test, splits.validation)]
        return sum(both) / 2

    def train(
        self, model: nn.Module, loss_of: Callable[[Tensor, Tensor, int], Tensor] | None = None
    ) -> None:
        """The same for all; nothing but weights."""
        schedule = self.bench.schedule
        training.train(
            model,
            self.bench.splits,
            schedule,
            lr=self.lr * schedule.later,
            epochs=EPOCHS,
            seed=self.seed,
            loss_of=loss_of,
        )

    def rows(self, share: float) -> dict[str, Callable[[], dict[str, Any]]]:
        """By method."""
        return {
            "blocks": partial(self.blocks, share),
            "nested": partial(self.nested, share),
            "static": partial(self.static, share, None),
            "static, compensated": partial(self.static, share, self.images),
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

    def nested(self, share: float) -> dict[str, Any]:
        """Every image takes a width per layer."""
        if self.nested_models is None:
            adapted = swan.adapt(
                self.dense, self.bench.example, widths=WIDTHS, scores=self.scores
            ).eval()
            swan.calibrate_widths(adapted, self.images)
            swan.compensate_widths(adapted, self.images)
            given = copy.deepcopy(adapted)
            generator = torch.Generator().manual_seed(self.seed)

            def loss(x: Tensor, y: Tensor, step: int) -> Tensor:
                def one(model: nn.Module) -> Tensor:
                    return F.cross_entropy(model(x), y)

                return swan.sandwich_loss(adapted, one, step=step, generator=generator)

            self.train(adapted, loss)
            swan.calibrate_widths(adapted.eval(), self.images)
            self.nested_models = given, adapted
        accuracies = []
        for model in self.nested_models:
            swan.fit_widths(model, self.images, macs=share)
            accuracies.append(self.accuracy(model))
        images = normalised(self.bench.splits.test.x[:1000])
        stats = swan.width_stats(self.nested_models[1], [images])
        return {
            "macs_share": stats.mean_macs / self.total,
            "before": accuracies[0],
            "after": accuracies[1],
            "entropies": dict(stats.entropies),
        }

    def static(self, share: float, batches: list[Tensor] | None) -> dict[str, Any]:
        """One width for all, of heads and neurons."""
        small = swan.prune_by_score(self.gated, self.scores, macs=share, compensate=batches)
        before = self.accuracy(small)
        macs = swan.count_macs(small, self.bench.example[:1])
        self.train(small)
        return {"macs_share": macs / self.total, "before": before, "after": self.accuracy(small)}


def main() -> None:
    options = parse(__doc__, SHARES, 0.7)
    bench, notes = bench_of(options), Notes("adaptive_tokens_accuracy", options)
    for seed in options.seeds:
        own = Comparison(bench, options.lr, seed, count=64 if options.smoke else 1024)

        def dense(own: Comparison = own) -> dict[str, Any]:
            return {"macs_share": 1.0, "before": own.accuracy(own.dense)}

        notes.note(f"dense/1/{seed}", dense, method="dense", share=1.0, seed=seed)
        for share in options.shares:
            for method, row in own.rows(share).items():
                place = {"method": method, "share": share, "seed": seed}
                notes.note(f"{method}/{share:g}/{seed}", row, **place)
    notes.end()


if __name__ == "__main__":
    main()
