"""A small Vision Transformer cut on CIFAR-10, compensated and not, beside Torch-Pruning, before and after the same training.

    python benchmarks/vit_cut.py --data cifar10-jpeg.tar.gz

The network is the one of `activations_training.py` (torchvision's, 4 layers, trained from scratch there, GELU; kept in
`--work`). Ours: heads, neurons and the residual stream by Fisher scores of 1,024 images, as cut, and solved for anew with
the same images. Torch-Pruning: uniform ratios by group L2 or Taylor scores (of the same images), the ratio that comes nearest
to the budget. Training: the same epochs, images and cosine; the peak rate is chosen for every method alike among `RATES` by
validation accuracy of seed 0. Rows in the result file are not measured again.
"""

import time
import warnings
from typing import Any

import activations_training as training
import torch.nn.functional as F
import torch_pruning as tp
from quality_data import normalised
from quality_peers import nearest_cut
from small_vit import Notes, bench_of, dense_of, parse
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
        self.dense = dense_of(bench, lr, seed)
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


def main() -> None:
    options = parse(__doc__, SHARES, 0.5)
    bench, notes = bench_of(options), Notes("vit_cut", options)
    for seed in options.seeds:
        cuts = Cuts(bench, options.lr, seed, count=64 if options.smoke else 1024)
        for share in (1.0, *options.shares):
            for method in METHODS if share < 1 else ("dense",):
                for lr in rates(notes.rows, method, share, seed)[: 1 if options.smoke else None]:
                    notes.note(
                        f"{method}/{share:g}/{seed}/{lr:g}",
                        lambda own=(method, share, lr), cuts=cuts: cuts.go(*own),
                        method=method, share=share, seed=seed, lr=lr,
                    )  # fmt: skip
    notes.end()


if __name__ == "__main__":
    main()
