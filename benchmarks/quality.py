"""Accuracy at equal cost: gates that learn against one-shot pruning, Torch-Pruning and thin networks.

    python benchmarks/quality.py --data cifar10-jpeg.tar.gz --pretrained cifar_resnets
    python benchmarks/quality.py --data ... --methods ours tp-l2 --budgets 0.25 --seeds 0 1 2
    python benchmarks/quality.py --data ... --schedule cut --methods score-fisher score-fisher-compensated
    python benchmarks/quality.py --data ... --tune --budgets 0.25    # learning rates, by validation accuracy

Every method starts from the same dense network (adapted to the images, the same for all methods of a
seed) and gets the same number of epochs, batches, augmentation and learning-rate schedule afterwards;
what it prunes to costs the same MACs, as nearly as it can hit them (the table says so). The peak
learning rate is chosen for every method alike among `RATES`, and beyond them while the best lies on
the edge, by validation accuracy of seed 0 (where a case was not tuned, as in the nearest that was:
`chosen_rate`). Rows that are in the result file
already are not measured again, so a killed run goes on where it stopped. Each network has its own file.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from _measure import (
    RESULTS,
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
from quality_candidates import CANDIDATES, READINGS
from quality_correlated import correlated
from quality_data import Images, Splits, batches, load, normalised, synthetic
from quality_networks import build, load_pretrained_
from quality_peers import as_units, nearest_cut, pruner
from quality_tuning import TUNINGS, Tuning
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.compressing.own_outputs import Sensitivity
from swan_surgery.environment.machine import device_name


RATES = (0.01, 0.02, 0.04, 0.08)
COMPENSATED_RATES = (0.01, 0.02, 0.04)  # what was solved for wants smaller steps
TUNED_AT = 0.25
COMPENSATED = "-compensated"
CORRELATED = "-correlated"
# Cuts of a staged method at each budget: about one per halving, also where `swan.stages` makes one.
STAGES = {0.5: 2, 0.39: 2, 0.25: 2, 0.1: 3, 0.05: 4}
METHODS = (
    "dense",
    "ours",
    "ours-additive",
    "ours-gradient",
    "hard-concrete",
    "annealed",
    "normalised",
    "paper",
    "score-fisher",
    "score-fisher-additive",
    "score-magnitude",
    "score-magnitude-additive",
    "score-fisher-compensated",
    "score-fisher-correlated-compensated",
    "score-self",
    "score-self-compensated",
    *(f"score-fisher-compensated+{tuning}" for tuning in TUNINGS if tuning),
    "staged-fisher",
    "staged-fisher-compensated",
    "staged-fisher-correlated-compensated",
    "ours-compensated",
    "cut-then-ours",
    "tp-l2-compensated",
    "tp-taylor-compensated",
    "random-compensated",
    "tp-l2",
    "tp-taylor",
    "tp-bn-sparse",
    "tp-l2-global",
    "tp-taylor-global",
    "tp-bn-sparse-global",
    "random",
    "random-per-cost",
    "thin",
)


@dataclass(frozen=True)
class Schedule:
    """How long and with what; the same for every method.

    Attributes:
        num_train: training images.
        adapt_epochs: of the pretrained (or new) network on these images, before anything is compared.
        epochs: what every method gets after that.
        batch: images per step.
        joint: share of `epochs` in which gates learn, where they do; the rest is fine-tuning.
        ramp: share of the joint part over which the budget falls.
        weight_decay: of the weights.
        adapt_lr: peak learning rate of the adaptation.
        precision: of forward and backward passes in training ("bf16": autocast; weights, gates and
            optimizer stay in float32). Accuracies are measured in float32.
    """

    num_train: int
    adapt_epochs: int
    epochs: int
    batch: int = 128
    joint: float = 0.35
    ramp: float = 0.6
    weight_decay: float = 1e-4
    adapt_lr: float = 0.02
    precision: str = "bf16"


SCHEDULES = {
    # What is left right after the cut, without any training; one rate is as good as another.
    "cut": Schedule(num_train=10_000, adapt_epochs=2, epochs=0, precision="fp32"),
    "smoke": Schedule(num_train=256, adapt_epochs=1, epochs=2, batch=32, precision="fp32"),
    "short": Schedule(num_train=10_000, adapt_epochs=2, epochs=3),
    # The short one for processors without bfloat16.
    "brief": Schedule(num_train=10_000, adapt_epochs=2, epochs=3, precision="fp32"),
    "longer": Schedule(num_train=20_000, adapt_epochs=2, epochs=6),
    "medium": Schedule(num_train=50_000, adapt_epochs=2, epochs=10),
    "long": Schedule(num_train=50_000, adapt_epochs=10, epochs=50),
    # Networks that come without weights for these images: the adaptation is their training.
    "new": Schedule(num_train=10_000, adapt_epochs=10, epochs=3, adapt_lr=0.05),
    # The same for processors without bfloat16, and what is left right after the cut.
    "new-brief": Schedule(
        num_train=10_000, adapt_epochs=10, epochs=3, adapt_lr=0.05, precision="fp32"
    ),
    "new-cut": Schedule(
        num_train=10_000, adapt_epochs=10, epochs=0, adapt_lr=0.05, precision="fp32"
    ),
}


@dataclass(frozen=True)
class Row:
    """What one run is."""

    network: str
    schedule: str
    method: str
    budget: float
    distil: bool
    seed: int
    lr: float

    def key(self) -> str:
        """Names the run in the result file."""
        kind = "distilled" if self.distil else "plain"
        return f"{self.network}/{self.schedule}/{self.method}/{self.budget:g}/{kind}/{self.seed}/{self.lr:g}"


class Run:
    """One method from the dense network to its last epoch."""

    def __init__(
        self, row: Row, dense: nn.Module, splits: Splits, tick: Callable[[], None]
    ) -> None:
        self.row, self.splits, self.tick = row, splits, tick
        self.schedule = SCHEDULES[row.schedule]
        self.dense = dense
        self.teacher = copy.deepcopy(dense).eval() if row.distil else None
        self.device = splits.train.x.device
        self.example = torch.zeros(1, 3, 32, 32, device=self.device)
        self.generator = torch.Generator().manual_seed(1000 + row.seed)
        self.steps = self.schedule.epochs * (self.schedule.num_train // self.schedule.batch)
        self.total = swan.count_macs(dense, self.example)
        self.facts: dict[str, Any] = {}
        self.method, _, self.tuning = row.method.partition("+")

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross entropy, or mostly distillation from the dense network."""
        x, y = batch
        with autocast(self.schedule, x.device):
            logits = model(x)
            with torch.no_grad():
                soft = None if self.teacher is None else self.teacher(x)
        loss = F.cross_entropy(logits.float(), y)
        if soft is None:
            return loss
        return 0.1 * loss + 0.9 * swan.distillation_loss(logits.float(), soft.float())

    def train(
        self,
        model: nn.Module,
        first: int,
        last: int,
        *,
        groups: list[dict[str, Any]] | None = None,
        objective: swan.Objective | None = None,
        each: Callable[[nn.Module], None] | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        """Steps `first` to `last` of the one cosine that all methods share."""
        lr = self.row.lr
        groups = groups or [
            {
                "params": [*model.parameters(), *(tuning.parameters() if tuning else ())],
                "lr": lr,
                "weight_decay": self.schedule.weight_decay,
            }
        ]
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
        peaks = [group["lr"] for group in optimizer.param_groups]
        model.train()
        step = first
        while step < last:
            for batch in batches(self.splits.train, self.schedule.batch, self.generator):
                if step == last:
                    break
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * step / self.steps))
                loss = (
                    self.loss(model, batch)
                    if tuning is None
                    else tuning.loss(self.loss, model, batch)
                )
                if objective is not None:
                    loss = loss + objective(step)
                optimizer.zero_grad()
                loss.backward()
                if each is not None:
                    each(model)
                optimizer.step()
                if tuning is not None:
                    tuning.after_step()
                step += 1
                self.tick()

    def few_batches(self, count: int, size: int = 64) -> list[tuple[Tensor, Tensor]]:
        """For scores; the same for every method of a seed."""
        own = batches(self.splits.train, size, torch.Generator().manual_seed(77 + self.row.seed))
        return [batch for _, batch in zip(range(count), own, strict=False)]

    def mend(self, small: nn.Module, reference: nn.Module) -> None:
        """Calibrate or compensate, by the name of the method."""
        if self.method.endswith(COMPENSATED):
            done = swan.compensate(small, reference, self.few_batches(8, self.schedule.batch))
            self.facts["compensation_seconds"] = round(
                self.facts.get("compensation_seconds", 0.0) + done.seconds, 1
            )
        else:
            swan.calibrate(small, [x for x, _ in self.few_batches(20, self.schedule.batch)])

    def finish(self, small: nn.Module, first: int, reference: nn.Module | None = None) -> None:
        """Calibrate or compensate, note the cut, fine-tune from step `first`, note the end."""
        self.facts["bare_test"] = accuracy(small, self.splits.test)
        self.mend(small, reference or self.dense)
        self.facts["macs_share"] = swan.count_macs(small, self.example) / self.total
        self.facts["params"] = swan.count_params(small)
        self.facts["widths"] = [m.out_channels for m in small.modules() if isinstance(m, nn.Conv2d)]
        self.facts["cut_test"] = accuracy(small, self.splits.test)
        self.facts["cut_validation"] = accuracy(small, self.splits.validation)
        self.facts["test"], self.facts["validation"] = (
            self.facts["cut_test"],
            self.facts["cut_validation"],
        )
        if first < self.steps:
            tuning = TUNINGS[self.tuning](small, self.dense, self.example)
            self.train(small, first, self.steps, tuning=tuning)
            tuning.finish_()
            self.facts["test"] = accuracy(small, self.splits.test)
            self.facts["validation"] = accuracy(small, self.splits.validation)

    def gated(self) -> swan.GatedModel:
        """The dense network with gates."""
        return swan.swanify(self.dense, self.example)

    def halfway(self) -> swan.GatedModel:
        """Gates in what one compensated cut to the square root of the budget left."""
        gated = self.gated()
        scores = self.scores(gated, "fisher", self.dense)
        small = swan.prune_by_score(gated, scores, macs=self.row.budget**0.5)
        done = swan.compensate(small, self.dense, self.few_batches(8, self.schedule.batch))
        self.facts["compensation_seconds"] = round(done.seconds, 1)
        return swan.swanify(small, self.example)

    def learn_gates(
        self, candidate: str | None = None, *, is_cut: bool = False, **options: Any
    ) -> None:
        """Weights and gates together, then the cut and fine-tuning; `is_cut`: after a first cut."""
        joint = round(self.schedule.joint * self.steps)
        gated = self.halfway() if is_cut else self.gated()
        ramp = swan.CosineRamp(length=self.schedule.ramp * joint)
        objective = swan.Objective(gated, macs=self.row.budget, of="original", ramp=ramp, **options)
        groups = swan.parameter_groups(
            gated, lr=self.row.lr, gate_lr=0.2, weight_decay=self.schedule.weight_decay
        )
        start = gated.gates.probabilities().detach().argsort()
        each = None if candidate is None else CANDIDATES[candidate](gated, joint)
        reading = READINGS.get(candidate or "", gated.train().gates.reading)
        with gated.gates.reading_as(reading, training=True):
            self.train(gated, 0, joint, groups=groups, objective=objective, each=each)
        objective(joint)
        now = gated.gates.open_mask()
        closed = int((~now).sum())
        self.facts["hard_macs_share"] = swan.hard_macs(gated) / self.total
        # Of the units closed in the end: how many the starting order would have closed too.
        self.facts["closed_as_at_start"] = (
            float((~now)[start[:closed]].double().mean()) if closed else 1.0
        )
        self.finish(swan.prune(gated, macs=self.row.budget, of="original"), joint)

    def scores(self, gated: swan.GatedModel, score: str, model: nn.Module) -> Tensor:
        """One of our scores, of few batches; "self": by the outputs instead of the labels.

        "-correlated": which channels of a layer go is chosen anew, by what its reader loses.
        """
        if score.endswith(CORRELATED):
            plain = self.scores(gated, score.removesuffix(CORRELATED), model)
            few = self.few_batches(8, self.schedule.batch)
            return correlated(gated, model, plain, few, self.row.seed)
        own = score == "self"
        return swan.importance(
            gated,
            "fisher" if own else score,
            batches=self.few_batches(40),
            loss=Sensitivity() if own else self.labelled,
            generator=torch.Generator().manual_seed(self.row.seed),
        )

    @staticmethod
    def labelled(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross entropy, as scores see it."""
        return F.cross_entropy(model(batch[0]), batch[1])

    def in_stages(self, score: str) -> None:
        """Several cuts, each scored and mended anew, with training in between."""
        plan = swan.stages(self.row.budget, steps=self.steps, number=STAGES[self.row.budget])
        model = self.dense
        for index, stage in enumerate(plan):
            gated = swan.swanify(model, self.example)
            scores = self.scores(gated, score, model)
            small = swan.prune_by_score(gated, scores, macs=stage.share, of="original")
            if index == len(plan) - 1:
                self.finish(small, stage.step, model)
            else:
                self.mend(small, model)
                self.train(small, stage.step, plan[index + 1].step)
            model = small

    def by_score(self, score: str, *, per_cost: bool = True) -> None:
        """One-shot by one of our scores; "-additive": without diminishing returns."""
        diminishing, score = not score.endswith("-additive"), score.removesuffix("-additive")
        gated = self.gated()
        scores = self.scores(gated, score, self.dense)
        self.finish(
            swan.prune_by_score(
                gated, scores, macs=self.row.budget, per_cost=per_cost, diminishing=diminishing
            ),
            0,
        )

    def by_torch_pruning(self, importance: Any) -> None:
        """Torch-Pruning; the ratio that comes nearest to the budget is bisected."""
        model, first = copy.deepcopy(self.dense), 0
        if "sparse" in self.row.method:
            sparse = self.pruner(model, importance, 0.5)
            sparse.update_regularizer()
            first = round(self.schedule.joint * self.steps)
            self.train(model, 0, first, each=sparse.regularize)

        def prepare(trial: nn.Module) -> None:
            if isinstance(importance, tp.importance.GroupTaylorImportance):
                for batch in self.few_batches(10, self.schedule.batch):
                    F.cross_entropy(trial.eval()(batch[0]), batch[1]).backward()

        found = nearest_cut(
            model,
            lambda trial, ratio: self.pruner(trial, importance, ratio),
            self.example,
            self.row.budget * self.total,
            prepare,
            finished=self.finished,
        )
        self.finish(found, first)

    def finished(self, cut: nn.Module) -> nn.Module:
        """A peer's cut; in terms of our units where it is to be compensated."""
        is_ours = self.method.endswith(COMPENSATED)
        return as_units(cut, self.dense, self.example) if is_ours else cut

    def pruner(self, model: nn.Module, importance: Any, ratio: float) -> Any:
        """Torch-Pruning's pruner: the same ratio in every layer (its default), or one global ranking."""
        return pruner(
            model,
            importance,
            ratio,
            example=self.example,
            is_global=self.row.method.endswith("-global"),
        )

    def thin(self) -> nn.Module:
        """The uniformly narrower network whose MACs come nearest to the budget, not trained."""
        wanted = self.row.budget * self.total
        shares = [self.row.budget * (0.8 + 0.02 * step) for step in range(21)]
        macs = [
            swan.count_macs(build(self.row.network, share).to(self.device), self.example)
            for share in shares
        ]
        best = min(range(len(shares)), key=lambda i: abs(macs[i] - wanted))
        torch.manual_seed(self.row.seed)
        model = build(self.row.network, shares[best])
        return model.to(self.device, memory_format=torch.channels_last)

    def go(self) -> dict[str, Any]:
        """Do what the row says."""
        started = time.process_time()
        torch.manual_seed(self.row.seed)
        method = self.method.removesuffix(COMPENSATED)
        peers = {
            "tp-l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
            "tp-taylor": tp.importance.GroupTaylorImportance,
            "tp-bn-sparse": tp.importance.BNScaleImportance,
        }
        learners: dict[str, dict[str, Any]] = {
            "ours": {},
            "ours-additive": {"diminishing": False},
            "ours-gradient": {"learning": "gradient"},
            "cut-then-ours": {"is_cut": True},
            "paper": {"preset": "paper"},
            **{name: {"candidate": name, "learning": "gradient"} for name in CANDIDATES},
        }
        if (peer := method.removesuffix("-global")) in peers:
            self.by_torch_pruning(peers[peer]())
        elif method in learners:
            self.learn_gates(**learners[method])
        elif method == "dense":
            self.finish(copy.deepcopy(self.dense), 0)
        elif method.startswith("staged-"):
            self.in_stages(method.removeprefix("staged-"))
        elif method == "thin":
            self.finish(self.thin(), 0)
        elif method == "random":  # every unit as likely as any other: layers shrink alike
            self.by_score("random-additive", per_cost=False)
        elif method == "random-per-cost":
            self.by_score("random-additive")
        else:
            self.by_score(method.removeprefix("score-"))
        return {
            **asdict(self.row),
            **self.facts,
            "cpu_seconds": round(time.process_time() - started, 1),
            "device": device_name(self.device),
            "date": datetime.now(UTC).date().isoformat(),
            "source": source_hash(),
            "commit": commit(),
        }


def autocast(schedule: Schedule, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=schedule.precision == "bf16")


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Percent right, in eval mode."""
    model.eval()
    right = 0
    for start in range(0, len(images), 500):
        logits = model(normalised(images.x[start : start + 500]))
        right += int((logits.argmax(1) == images.y[start : start + 500]).sum())
    return 100 * right / len(images)


def dense_network(row: Row, splits: Splits, options: argparse.Namespace) -> nn.Module:
    """The network that every method of a seed starts from; made once and kept in `--work`."""
    schedule = SCHEDULES[row.schedule]
    device = splits.train.x.device
    torch.manual_seed(row.seed)
    model = build(row.network).to(device, memory_format=torch.channels_last)
    path = options.work / f"{row.network}_{row.schedule}_{row.seed}.safetensors"
    if path.exists():
        load_model(model, path)
        return model
    if options.pretrained is not None:
        load_pretrained_(model, row.network, options.pretrained)
    optimizer = torch.optim.SGD(
        model.parameters(),
        schedule.adapt_lr,
        0.9,
        weight_decay=schedule.weight_decay,
        nesterov=True,
    )
    generator = torch.Generator().manual_seed(row.seed)
    steps = schedule.adapt_epochs * (schedule.num_train // schedule.batch)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(schedule.adapt_epochs):
        for x, y in batches(splits.train, schedule.batch, generator):
            optimizer.zero_grad()
            with autocast(schedule, device):
                logits = model(x)
            F.cross_entropy(logits.float(), y).backward()
            optimizer.step()
            decay.step()
    options.work.mkdir(parents=True, exist_ok=True)
    save_model(model, str(path))
    return model


def rates_of(method: str) -> tuple[float, ...]:
    """The grid that a method's learning rate is looked for in, to begin with."""
    return COMPENSATED_RATES if COMPENSATED in method else RATES


def chosen_rate(rows: dict[str, Any], wanted: Row) -> float:
    """The learning rate with the best validation accuracy of seed 0: of the nearest runs that were tuned.

    Where this network was not tuned for this schedule: of the short one, or of ResNet-20; then, where
    not with distillation, without; where not at this budget, at a quarter of the MACs.
    """
    if SCHEDULES[wanted.schedule].epochs == 0:
        return RATES[0]
    places = ((wanted.network, wanted.schedule), (wanted.network, "short"), ("resnet20", "short"))
    dense = wanted.method == "dense"
    budgets = (1.0,) if dense else (wanted.budget, TUNED_AT)
    for place, distil, budget in product(places, (wanted.distil, False), budgets):
        network, schedule = place
        case = replace(
            wanted, network=network, schedule=schedule, distil=distil, budget=budget, seed=0
        )
        found = tried_rates(rows, case)
        if set(rates_of(wanted.method)) <= found.keys():
            return float(max(found, key=lambda lr: found[lr]))
    grid = rates_of(wanted.method)
    return grid[len(grid) // 2]


def tried_rates(rows: dict[str, Any], wanted: Row) -> dict[float, float]:
    """Learning rate to validation accuracy of the runs that differ from `wanted` in the rate alone."""
    names = [field.name for field in fields(Row) if field.name != "lr"]
    return {
        row["lr"]: row["validation"]
        for row in rows.values()
        if all(row[name] == getattr(wanted, name) for name in names)
    }


def rates_to_try(rows: dict[str, Any], wanted: Row) -> tuple[float, ...]:
    """The grid; once it is done, one step beyond the edge that the best rate lies on, if it does."""
    found = tried_rates(rows, wanted)
    grid = rates_of(wanted.method)
    if not set(grid) <= found.keys():
        return grid
    best = max(found, key=lambda lr: found[lr])
    if best == max(found):
        return (2 * best,)
    return (best / 2,) if best == min(found) else ()


def wanted(options: argparse.Namespace, rows: dict[str, Any]) -> list[Row]:
    """The runs asked for that are not in the file yet, cheap comparisons first."""
    tuned: dict[str, Any] = {}
    for file in sorted(RESULTS.glob("*_quality.json")):
        tuned |= json.loads(file.read_text())["rows"]
    tuned |= rows  # what this run's own file says counts before older files
    found = []
    seeds = [0] if options.tune else options.seeds
    for seed in seeds:
        for budget in options.budgets:
            for distil, method in product(options.distil, options.methods):
                share = 1.0 if method == "dense" else budget
                row = Row(options.network, options.schedule, method, share, distil, seed, RATES[0])
                chosen = (options.lr or chosen_rate(tuned, row),)
                for lr in rates_to_try(rows, row) if options.tune else chosen:
                    own = replace(row, lr=lr)
                    if own.key() not in rows and own not in found:
                        found.append(own)
    return found


def parse() -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.add_argument(
        "--data", type=Path, help="folder or tar with train/<class>/* and test/<class>/*"
    )
    parser.add_argument(
        "--pretrained", type=Path, help="folder with <network>-*.th; else from scratch"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("out/quality"), help="keeps dense networks"
    )
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--schedule", choices=sorted(SCHEDULES), default="short")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.25, 0.5, 0.1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--distil", nargs="+", type=lambda text: text == "yes", default=[False], metavar="yes|no"
    )
    parser.add_argument("--lr", type=float, help="peak rate of all (default: as it was tuned)")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU (default: 1)")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="all learning rates, seed 0; goes on beyond the best if that is on the edge",
    )
    options = parser.parse_args()
    if options.smoke:
        options.schedule, options.seeds, options.budgets = "smoke", [0], [0.5]
        options.work = options.work / "smoke"
        options.methods = options.methods or ["ours", "score-fisher", "tp-l2"]
    elif options.data is None:
        parser.error("--data is needed: no images come with this project")
    options.methods = options.methods or list(METHODS)
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    terminal = console()
    theme = "quality" if options.network == "resnet20" else f"{options.network}_quality"
    if SCHEDULES[options.schedule].epochs == 0:
        theme = "compensation"
    path = output_path(theme, options)
    result: dict[str, Any] = {"theme": "quality", "environment": environment(), "rows": {}}
    if path is not None and path.exists():
        result = json.loads(path.read_text())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = SCHEDULES[options.schedule].num_train
    splits = (synthetic(count) if options.data is None else load(options.data, count)).to(device)
    rows = result["rows"]
    result["schedules"] = {name: asdict(schedule) for name, schedule in SCHEDULES.items()}
    with progress_bar(terminal) as bar:
        everything = bar.add_task("runs", total=0)
        while todo := wanted(options, rows):
            row, done = todo[0], bar.tasks[everything].completed
            bar.update(everything, total=done + len(todo))
            run = Run(row, dense_network(row, splits, options), splits, lambda: None)
            task = bar.add_task(row.key(), total=run.steps)
            run.tick = lambda task=task: bar.advance(task)
            rows[row.key()] = facts = run.go()
            write(path, result)
            bar.remove_task(task)
            bar.console.print(
                f"{row.key()}: {facts['macs_share']:.4f} of MACs, after the cut "
                f"{facts['cut_test']:.2f}, end {facts['test']:.2f} (validation {facts['validation']:.2f})"
            )
            bar.advance(everything)
    report(path, terminal)


if __name__ == "__main__":
    main()
