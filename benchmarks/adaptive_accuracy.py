"""Accuracy of nested widths and free units that look at the input, against static cuts, on CIFAR-10.

    python benchmarks/adaptive_accuracy.py --data cifar10-jpeg.tar.gz --pretrained cifar_resnets

One nested model is made per seed, its widths allocated by Fisher scores and compensated, and trained (all widths
together, distilled from the dense network), then fitted to each budget, per block and per network. Against it: the same model with one width
for all (`adapted.at`), before training too, and one static cut per budget (one-shot Fisher, compensated or not), trained for as
many steps with the same images, loss and learning rate. A nested step runs two widths. `--structures learnt`: the nested model per block goes on for as many
steps under its own choices, one training per budget, in which its efforts learn as well (`swan.gate_penalty`); beside it a compensated static cut that is
trained for as many in all. `--structures free`: per budget a gate per unit and input, fitted in closed form to the dense network; then the
weights are trained under these gates for as many steps, and statistics measured anew. `--structures ftwt`: the same, but
what a unit is worth to a sample is its share of its group's mean activation (Fire Together Wire Together, CVPR 2022: the mask
of the strongest activations is predicted). `--structures fbs`: a share of each block's inner units that is the same for all
inputs, the ones with the largest saliency, relu(W |x| + 1) of the mean |x| of the block's channels, which also multiplies what
they give (Feature Boosting and Suppression, ICLR 2019; there with a batch-norm's shift left out of it). Taken are fitted on training images that no step has seen; test accuracy, in %, is that of the first
`TEST` images of the test half of `quality_data`. Rows in the result file are not
measured again, and trained nested models are kept in `--work`.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from _measure import arguments, console, environment, output_path, report, write
from quality import Row, accuracy, dense_network
from quality_data import Images, Splits, batches, load, normalised, synthetic
from quality_networks import build
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.adaptive import unit_fitting
from swan_surgery.adaptive.candidates import NestedGroup
from swan_surgery.adaptive.free_block import FreeBlock


STEPS, BATCH, TRAIN, FIT, TEST = 60, 128, 5_000, 512, 2_000
LR, EFFORT_LR, WEIGHT_DECAY = 0.02, 0.01, 1e-4
MACS_WEIGHT = 100.0  # of the budget while efforts learn
WIDTHS = (0.24, 0.49, 0.74, 1.0)  # of what adapts: 25, 50 and 75 % of all MACs, scarcely less


class Comparison:
    """One seed: the dense network, and what is made of it."""

    def __init__(self, seed: int, splits: Splits, options: argparse.Namespace) -> None:
        self.seed, self.network = seed, options.network
        self.work = None if options.smoke else options.work
        row = Row(options.network, options.base, "dense", 1.0, distil=False, seed=seed, lr=LR)
        self.dense = dense_network(row, splits, options).eval()
        train = splits.train
        self.train_images = Images(train.x[: options.train], train.y[: options.train])
        self.fit_images = [
            (normalised(x), y)
            for x, y in zip(
                train.x[options.train :][: options.fit].split(BATCH),
                train.y[options.train :][: options.fit].split(BATCH),
                strict=True,
            )
        ]
        self.test = Images(splits.test.x[:TEST], splits.test.y[:TEST])
        self.steps = options.steps
        self.example = torch.zeros(2, 3, 32, 32)
        gated = swan.swanify(self.dense, self.example)
        self.gated = gated
        self.scores = swan.importance(
            gated,
            "fisher",
            batches=self.few(8, 64),
            loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        )

    def few(self, count: int, size: int = BATCH) -> list[tuple[Tensor, Tensor]]:
        """The same batches, augmented as in training, for scores and statistics."""
        own = batches(self.train_images, size, torch.Generator().manual_seed(77 + self.seed))
        return [batch for _, batch in zip(range(count), own, strict=False)]

    def train(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor, int], Tensor],
        *,
        steps: int | None = None,
        efforts: Sequence[nn.Parameter] = (),
    ) -> float:
        """Steps under one cosine; seconds of this process. `efforts` have a rate of their own."""
        steps = self.steps if steps is None else steps
        generator = torch.Generator().manual_seed(1000 + self.seed)
        apart = {id(own) for own in efforts}
        weights = [own for own in model.parameters() if id(own) not in apart]
        groups = [
            {"params": weights, "lr": LR, "weight_decay": WEIGHT_DECAY},
            {"params": [*efforts], "lr": EFFORT_LR},
        ]
        groups = [own for own in groups if own["params"]]
        rates = [own["lr"] for own in groups]
        optimizer = torch.optim.SGD(groups, LR, 0.9, nesterov=True)
        model.train()
        step, started = 0, time.process_time()
        while step < steps:
            for x, y in batches(self.train_images, BATCH, generator):
                if step == steps:
                    break
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
                optimizer.zero_grad()
                loss(x, y, step).backward()
                optimizer.step()
                step += 1
        return time.process_time() - started

    def distilled(
        self, model: Callable[[Tensor], Any], x: Tensor, y: Tensor, soft: Tensor
    ) -> Tensor:
        """Mostly the dense network's outputs."""
        logits = model(x)
        return 0.1 * F.cross_entropy(logits, y) + 0.9 * swan.distillation_loss(logits, soft)

    def soft(self, x: Tensor) -> Tensor:
        """The dense network's outputs."""
        with torch.no_grad():
            return self.dense(x)

    def untrained(self, per: Any) -> swan.AdaptiveModel:
        """Widths allocated by scores, with readers solved for."""
        adapted = swan.adapt(self.dense, self.example, per=per, widths=WIDTHS, scores=self.scores)
        swan.calibrate_widths(adapted, self.few(3))
        swan.compensate_widths(adapted, self.few(8, 64))
        return adapted

    def trained(
        self, per: Any, adapted: swan.AdaptiveModel | None = None
    ) -> tuple[swan.AdaptiveModel, float | None]:
        """All widths trained together, and seconds; as kept from an earlier run, if it was."""
        name = f"{self.network}_{per}_{self.steps}_{self.seed}.swan"
        kept = None if self.work is None else self.work / name
        if kept is not None and kept.exists():
            found = swan.load(kept, build(self.network))
            assert isinstance(found, swan.AdaptiveModel)  # noqa: S101 - saved below
            return found, None
        model = self.untrained(per) if adapted is None else adapted
        generator = torch.Generator().manual_seed(self.seed)

        def loss(x: Tensor, y: Tensor, step: int) -> Tensor:
            soft = self.soft(x)
            return swan.sandwich_loss(
                model,
                lambda own: self.distilled(own, x, y, soft),
                step=step,
                generator=generator,
            )

        seconds = self.train(model, loss)
        if kept is not None:
            swan.save(model, kept)
        return model, seconds

    def learnt(self, budget: float) -> dict[str, Any]:
        """The trained nested model, as many steps more under its own choices, whose efforts learn."""
        adapted, _ = self.trained("block")
        swan.calibrate_widths(adapted, self.few(3), full=True)
        swan.calibrate_widths(adapted, self.few(3))
        fit = partial(swan.fit_widths, adapted, self.fit_images, macs=budget)
        fit(statistics=self.few(3), efforts="learn")
        untrained = accuracy(adapted, self.test)
        adapted.execution = "masked"

        def loss(x: Tensor, y: Tensor, _: int) -> Tensor:
            taken = adapted.taken(x)
            own = self.distilled(lambda _: taken.output, x, y, self.soft(x))
            penalty = swan.gate_penalty(adapted, taken, macs=budget, macs_weight=MACS_WEIGHT)
            return own + penalty.to(own.dtype)

        looking = [own for block in adapted.blocks().values() for own in block.effort.parameters()]
        seconds = self.train(adapted, loss, efforts=looking)
        adapted.execution = "group"
        swan.calibrate_widths(adapted, self.few(3), among="mixed", full=True)
        stats = fit(efforts="keep")
        return {"untrained": untrained, "train_cpu_seconds": seconds} | self.told(adapted, stats)

    def told(self, adapted: swan.AdaptiveModel, stats: swan.WidthStats) -> dict[str, Any]:
        """Accuracy, cost and choices on the test images."""
        images = normalised(self.test.x)
        told = swan.width_stats(
            adapted, zip(images.split(500), self.test.y.split(500), strict=True)
        )
        dense = adapted.costs.dense
        return {
            "test": accuracy(adapted, self.test),
            "macs_share": told.mean_macs / dense,
            "p95_share": told.p95_macs / dense,
            "entropies": dict(told.entropies),
            "information": dict(told.information or {}),
            "fitted_share": stats.mean_macs / dense,
            "hardness": self.hardness(adapted),
        }

    def nested(self, per: Any, budgets: list[float], note: Callable[..., None]) -> None:
        """One model for all budgets, with a width per block or for the network."""
        adapted = self.untrained(per)
        dense = adapted.costs.dense
        for level, width in enumerate(WIDTHS):
            with adapted.holding(level):
                test = accuracy(adapted, self.test)
            macs = swan.count_macs(adapted.at(width), self.example[:1])
            note(f"untrained-{per}", width, test=test, macs_share=macs / dense)
        adapted, seconds = self.trained(per, adapted)
        swan.calibrate_widths(adapted, self.few(3), full=True)
        for budget in budgets:
            swan.calibrate_widths(adapted, self.few(3))
            stats = swan.fit_widths(adapted, self.fit_images, macs=budget, statistics=self.few(3))
            note(f"nested-{per}", budget, train_cpu_seconds=seconds, **self.told(adapted, stats))
        swan.calibrate_widths(adapted, self.few(3))
        for level, width in enumerate(WIDTHS):
            with adapted.holding(level):
                test = accuracy(adapted, self.test)
            macs = swan.count_macs(adapted.at(width), self.example[:1])
            note(f"uniform-{per}", width, test=test, macs_share=macs / dense)

    def free(self, budget: float, worth: Any = unit_fitting._worth) -> dict[str, Any]:
        """Gates in closed form, and the weights trained under them."""
        adapted = swan.adapt(self.dense, self.example, structure="free")
        swan.calibrate_widths(adapted, self.few(3))
        with patch.object(unit_fitting, "_worth", worth):
            stats = swan.fit_widths(adapted, self.fit_images, macs=budget, statistics=self.few(3))
        for block in adapted.blocks().values():
            block.effort.requires_grad_(requires_grad=False)
        untrained = accuracy(adapted, self.test)
        seconds = self.train(adapted, lambda x, y, _: self.distilled(adapted, x, y, self.soft(x)))
        swan.calibrate_widths(adapted, self.few(3), among="mixed", full=True)
        return {"untrained": untrained, "train_cpu_seconds": seconds} | self.told(adapted, stats)

    def fbs(self, budget: float) -> dict[str, Any]:
        """The most salient inner units of each block, as many for all inputs; what they give times their saliency."""
        density, macs, groups = self._density(budget)
        model = copy.deepcopy(self.dense)
        torch.manual_seed(self.seed)
        for group in groups:
            boost_(model, group, density)
        untrained = accuracy(model, self.test)
        seconds = self.train(model, lambda x, y, _: self.distilled(model, x, y, self.soft(x)))
        return {
            "test": accuracy(model, self.test),
            "untrained": untrained,
            "macs_share": macs,
            "train_cpu_seconds": seconds,
        }

    def _density(self, budget: float) -> tuple[float, float, tuple[NestedGroup, ...]]:
        """The largest share of all blocks' units within a budget, its MACs, and the groups."""
        shares = [step / 64 for step in range(1, 65)]
        costs = swan.adapt(self.dense, self.example, widths=shares, allocation="uniform")
        table = torch.stack([*costs.costs.blocks.values()]).sum(0) + costs.costs.fixed
        macs = (table / costs.costs.dense).tolist()
        place = max(i for i, share in enumerate(macs) if share <= budget)
        return shares[place], macs[place], costs.structure.groups

    def hardness(self, adapted: swan.AdaptiveModel) -> float | None:
        """Rank correlation of what a test image costs and the dense network's loss on it; None where all cost alike."""
        images = normalised(self.test.x)
        with torch.no_grad():
            losses = torch.cat(
                [
                    F.cross_entropy(self.dense(x), y, reduction="none")
                    for x, y in zip(images.split(500), self.test.y.split(500), strict=True)
                ]
            )
            macs = torch.cat([adapted.eval().taken(x).macs for x in images.split(500)])
        ranks = torch.stack([_ranks(losses), _ranks(macs.float())])
        return None if len(macs.unique()) == 1 else float(torch.corrcoef(ranks)[0, 1])

    def static(
        self, budget: float, *, compensated: bool = False, longer: int = 1
    ) -> dict[str, Any]:
        """One cut, trained on; `longer`: for so many times the steps."""
        own = self.few(8, 64) if compensated else None
        small = swan.prune_by_score(self.gated, self.scores, macs=budget, compensate=own)
        if not compensated:
            swan.calibrate(small, self.few(3))
        untrained = accuracy(small, self.test)
        seconds = self.train(
            small,
            lambda x, y, _: self.distilled(small, x, y, self.soft(x)),
            steps=longer * self.steps,
        )
        macs = swan.count_macs(small, self.example[:1])
        total = swan.count_macs(self.dense, self.example[:1])
        return {
            "test": accuracy(small, self.test),
            "untrained": untrained,
            "macs_share": macs / total,
            "train_cpu_seconds": seconds,
        }


def boost_(model: nn.Module, group: NestedGroup, density: float) -> None:
    """Hooks that let only the most salient units of a group through, multiplied; the saliencies are the block's."""
    block, count = model.get_submodule(group.block), len(group.units)
    size = next(own for own in block.modules() if isinstance(own, nn.Conv2d)).in_channels
    look = nn.Linear(size, count)
    nn.init.kaiming_normal_(look.weight)
    nn.init.ones_(look.bias)
    block.add_module(f"saliency_{group.units[0]}", look)
    kept = max(1, round(density * count))
    gates: list[Tensor] = []

    def looks(_: nn.Module, args: Any) -> None:
        saliency = look(args[0].abs().mean((2, 3))).relu()
        least = saliency.topk(kept).values[:, -1:]
        gates[:] = [saliency * (saliency >= least)]

    def lets_through(_: nn.Module, args: Any) -> Any:
        run = args[0].shape[1] // count
        return (args[0] * gates[0].repeat_interleave(run, 1)[:, :, None, None],)

    block.register_forward_pre_hook(looks)
    for reader in group.readers:
        model.get_submodule(reader).register_forward_pre_hook(lets_through)


def activation_shares(adapted: swan.AdaptiveModel, batches: list[Any]) -> dict[str, Tensor]:
    """By block: mean |activation| of each unit over its group's sum, per sample; float64 [N, units]."""
    seen: dict[tuple[str, int], list[Tensor]] = {}
    handles = []
    for name, block in adapted.blocks().items():
        assert isinstance(block, FreeBlock)  # noqa: S101 - of structure "free"
        for group in block.groups:
            own = seen.setdefault((name, group.start), [])

            def note(_: nn.Module, args: Any, own: Any = own, run: int = group.runs[0]) -> None:
                heat = args[0].double().abs().flatten(2).mean(2).unflatten(1, (-1, run)).sum(2)
                own.append(heat / heat.sum(1, keepdim=True).clamp_min(1e-12))

            reader = block.full.get_submodule(group.readers[0])
            handles.append(reader.register_forward_pre_hook(note))
    with torch.no_grad():
        for x, _ in batches:
            adapted.eval()(x)  # everything is open before gates are fitted
    for handle in handles:
        handle.remove()
    return {
        name: torch.cat([torch.cat(own) for (of, _), own in seen.items() if of == name], dim=1)
        for name in adapted.costs.blocks
    }


def _ranks(values: Tensor) -> Tensor:
    """Ranks, ties at their mean."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).float()
    return (ends - (counts - 1) / 2)[inverse]


def parse() -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.add_argument("--data", type=Path, help="folder or tar as in quality.py")
    parser.add_argument("--pretrained", type=Path, help="folder with <network>-*.th")
    parser.add_argument("--work", type=Path, default=Path("out/quality"))
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.5, 0.25])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--structures",
        nargs="+",
        choices=["nested", "learnt", "free", "ftwt", "fbs"],
        default=["nested", "learnt", "free"],
    )
    parser.add_argument(
        "--per", nargs="+", choices=["block", "network"], default=["block", "network"]
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="of training")
    options = parser.parse_args()
    # The dense network is that of quality.py's schedule "cut".
    options.base, options.train, options.fit = "cut", TRAIN, FIT
    if options.smoke:
        options.base, options.steps, options.train, options.fit = "smoke", 2, 128, 128
        options.seeds, options.budgets, options.work = [0], [0.5], options.work / "smoke"
    elif options.data is None:
        parser.error("--data is needed: no images come with this project")
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    path = output_path("adaptive_accuracy", options)
    result: dict[str, Any] = {
        "theme": "adaptive_accuracy",
        "environment": environment(),
        "rows": {},
    }
    if path is not None and path.exists():
        result = json.loads(path.read_text())
    rows = result["rows"]
    splits = synthetic(256) if options.data is None else load(options.data, 10_000)
    terminal = console()
    network = options.network
    if not options.smoke and options.steps != STEPS:
        network = f"{network}, {options.steps} steps"
    for seed in options.seeds:

        def note(method: str, budget: float, *, seed: int = seed, **facts: Any) -> None:
            key = f"{network}/{method}/{budget:g}/{seed}"
            own = {"network": network, "method": method, "budget": budget, "seed": seed}
            rows[key] = own | facts
            write(path, result)
            terminal.print(
                f"{key}: test {facts['test']:.2f} at {facts['macs_share']:.3f} of the MACs"
            )

        def missing(method: str, *, seed: int = seed) -> list[float]:
            names = {b: f"{network}/{method}/{b:g}/{seed}" for b in options.budgets}
            return [budget for budget, name in names.items() if name not in rows]

        nested = [
            per
            for per in options.per
            if "nested" in options.structures and f"{network}/uniform-{per}/1/{seed}" not in rows
        ]
        longer = ["static-longer"] if "learnt" in options.structures else []
        single = ["static", "static-compensated", *longer, *options.structures]
        wanted = {method: missing(method) for method in single if method in METHODS}
        if not nested and not any(wanted.values()):
            continue
        own = Comparison(seed, splits, options)
        note("dense", 1.0, test=accuracy(copy.deepcopy(own.dense), own.test), macs_share=1.0)
        for per in nested:
            own.nested(per, options.budgets, note)
        for method, budgets in wanted.items():
            for budget in budgets:
                note(method, budget, **METHODS[method](own, budget))
    report(path, terminal)


METHODS: dict[str, Callable[[Comparison, float], dict[str, Any]]] = {
    "static": Comparison.static,
    "static-compensated": partial(Comparison.static, compensated=True),
    "static-longer": partial(Comparison.static, compensated=True, longer=2),
    "learnt": Comparison.learnt,
    "free": Comparison.free,
    "ftwt": lambda own, budget: own.free(budget, activation_shares),
    "fbs": Comparison.fbs,
}


if __name__ == "__main__":
    main()
