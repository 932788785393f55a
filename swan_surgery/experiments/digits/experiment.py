"""One seed of the demo: four ways to spend the same epochs, all from the same dense network."""

import copy
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swan_surgery.calibration import calibrate
from swan_surgery.channels import ChannelMap
from swan_surgery.costs.macs import count_macs, hard_macs
from swan_surgery.cutting.plan import PruningPlan, make_plan
from swan_surgery.cutting.pruning import prune, prune_by_score
from swan_surgery.experiments.digits.data import Digits, shuffled_batches
from swan_surgery.experiments.digits.network import DigitsNet
from swan_surgery.experiments.digits.scores import accuracy
from swan_surgery.experiments.digits.settings import DemoSettings
from swan_surgery.experiments.loop import Loop, cosine
from swan_surgery.gates import GatedModel
from swan_surgery.gates.conversion import swanify
from swan_surgery.learning.objective import Objective
from swan_surgery.learning.parameter_groups import parameter_groups
from swan_surgery.learning.ramps import CosineRamp
from swan_surgery.selection.importance import importance
from swan_surgery.selection.limits import limits_of
from swan_surgery.selection.ordering import ranking
from swan_surgery.selection.widest_mask import widest_mask


# What is compared, in the order of the table.
METHODS = {
    "dense_start": "dense, where all start",
    "dense": "dense, trained on",
    "one_shot_cut": "one-shot, just cut",
    "one_shot": "one-shot, fine-tuned",
    "swan_hard": "SWAN gates, before the cut",
    "swan_cut": "SWAN, just cut",
    "swan": "SWAN, fine-tuned",
}


class Narrator(Protocol):
    """Hears what happens; the CLI prints it, the benchmark does not."""

    def say(self, text: str) -> None:
        """One sentence, before or after a step."""

    def epochs(self, text: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """A step of `total` epochs; the function inside is called after each."""


@dataclass(frozen=True, slots=True)
class SeedResult:
    """Accuracies in percent and MACs per method of `METHODS`.

    Attributes:
        seed: of the weights, the order of the batches and the shifts; the split never changes.
        validation: accuracy per method; the one to choose settings by.
        test: accuracy per method.
        macs: MACs per image and method.
        widths: output channels per convolution: dense, one-shot, SWAN.
        seconds: wall time of the whole seed.
    """

    seed: int
    validation: dict[str, float]
    test: dict[str, float]
    macs: dict[str, int]
    widths: dict[str, tuple[int, int, int]]
    seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class Networks:
    """What a seed leaves behind: the longest trained dense network, the pruned one, and the plan.

    `probabilities` are those of the gates at a few moments of their training, by name.
    """

    dense: nn.Module
    pruned: nn.Module
    plan: PruningPlan
    channels: ChannelMap
    probabilities: Mapping[str, Tensor]


def run_seed(
    seed: int, settings: DemoSettings, digits: Digits, narrator: Narrator
) -> tuple[SeedResult, Networks]:
    """Train, gate, cut and compare. The global random state is as before afterwards."""
    started = time.perf_counter()
    bench = _Bench(settings, digits, narrator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        start = DigitsNet(settings.width)
        narrator.say(
            f"Seed {seed}: a residual network of {bench.macs_of(start) / 1e6:.2f} MMACs per image, "
            f"{len(digits.train):,} images to train, {len(digits.validation)} to choose settings, "
            f"{len(digits.test)} to report."
        )
        bench.train(start, "Training the dense network", settings.dense_epochs, seed)
        bench.record("dense_start", start)
        dense = copy.deepcopy(start)
        bench.train(dense, "Training it on", settings.later_epochs, seed)
        bench.record("dense", dense)
        gated = swanify(start, digits.train.x[:1])
        one_shot = prune_by_score(gated, importance(gated, "magnitude"), macs=settings.macs)
        bench.calibrate(one_shot, seed)
        bench.record("one_shot_cut", one_shot)
        bench.train(one_shot, "Fine-tuning a one-shot magnitude cut", settings.later_epochs, seed)
        bench.record("one_shot", one_shot)
        networks = _swan(gated, dense, bench=bench, seed=seed)
    result = SeedResult(
        seed=seed,
        validation=bench.validation,
        test=bench.test,
        macs=bench.macs,
        widths={
            name: (wide, once, learned)
            for (name, wide), once, learned in zip(
                _widths(dense).items(),
                _widths(one_shot).values(),
                _widths(networks.pruned).values(),
                strict=True,
            )
        },
        seconds=time.perf_counter() - started,
    )
    return result, networks


def _swan(gated: GatedModel, dense: nn.Module, *, bench: "_Bench", seed: int) -> Networks:
    """The library's flow: joint training, calibrate, prune, fine-tune."""
    settings = bench.settings
    ramp = CosineRamp(length=settings.ramp * settings.joint_epochs)
    objective = Objective(gated, macs=settings.macs, ramp=ramp)
    gated.gates.mode = "ste"
    bench.narrator.say(
        f"Gates go in: {gated.gates.num_units} switches for "
        f"{gated.channels.num_gated_channels} channels (coupled channels share one)."
    )
    probabilities = {"start": gated.gates.probabilities().detach().clone()}

    def note(epoch: int) -> None:
        if epoch % max(1, settings.joint_epochs // 4) == 0:
            probabilities[f"epoch {epoch}"] = gated.gates.probabilities().detach().clone()

    bench.train(
        gated,
        f"Training weights and gates, to {100 * settings.macs:g} % MACs",
        settings.joint_epochs,
        seed,
        schedule_epochs=settings.later_epochs,
        objective=objective,
        after_epoch=note,
    )
    # The last optimizer step moved the logits: meet the budget once more before calibrating.
    objective(settings.joint_epochs)
    bench.calibrate(gated, seed)
    bench.record("swan_hard", gated, macs=hard_macs(gated))
    limits = limits_of(gated, macs=settings.macs)
    plan = make_plan(gated.channels, widest_mask(gated, ranking(gated), limits))
    pruned = prune(gated, macs=settings.macs)
    bench.record("swan_cut", pruned)
    bench.train(
        pruned,
        "Fine-tuning the smaller network",
        settings.finetune_epochs,
        seed + 1,
        start=settings.joint_epochs,
        schedule_epochs=settings.later_epochs,
    )
    bench.record("swan", pruned)
    return Networks(dense, pruned, plan, gated.channels, probabilities)


def _widths(model: nn.Module) -> dict[str, int]:
    named = model.named_modules()
    return {name: conv.out_channels for name, conv in named if isinstance(conv, nn.Conv2d)}


class _Bench:
    """Trains by the demo's settings and notes accuracy and MACs."""

    def __init__(self, settings: DemoSettings, digits: Digits, narrator: Narrator) -> None:
        self.settings, self.digits, self.narrator = settings, digits, narrator
        self.validation: dict[str, float] = {}
        self.test: dict[str, float] = {}
        self.macs: dict[str, int] = {}

    def macs_of(self, model: nn.Module) -> int:
        """Per image."""
        return count_macs(model, self.digits.train.x[:1])

    def train(
        self,
        model: nn.Module,
        text: str,
        epochs: int,
        seed: int,
        *,
        start: int = 0,
        schedule_epochs: int | None = None,
        objective: Objective | None = None,
        after_epoch: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Train in place; the same seed draws the same batches for every method."""
        settings = self.settings
        generator = torch.Generator().manual_seed(seed)
        length = schedule_epochs or epochs
        loop = Loop(
            model,
            self._optimizer(model),
            lambda own, batch: F.cross_entropy(own(batch[0]), batch[1]),
            share=lambda place: cosine(start + place, length),
            objective=objective,
        )
        with self.narrator.epochs(text, epochs) as advance:

            def on_epoch(epoch: int, _loss: float) -> None:
                after_epoch(epoch + 1)
                advance()

            loop.run(
                range(epochs),
                lambda _epoch, _first: shuffled_batches(
                    self.digits.train, settings.batch, generator
                ),
                after_epoch=on_epoch,
            )

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        settings = self.settings
        lr, decay = settings.lr, settings.weight_decay
        if isinstance(model, GatedModel):
            groups = parameter_groups(model, lr=lr, gate_lr=settings.gate_lr, weight_decay=decay)
            return torch.optim.AdamW(groups)
        return torch.optim.AdamW(model.parameters(), lr, weight_decay=decay)

    def calibrate(self, model: nn.Module, seed: int) -> None:
        """Batch-norm statistics of one epoch of training images, shifts included."""
        generator = torch.Generator().manual_seed(seed)
        calibrate(model, shuffled_batches(self.digits.train, self.settings.batch, generator))

    def record(self, method: str, model: nn.Module, macs: int | None = None) -> None:
        """Note accuracy and MACs of a method."""
        self.validation[method] = accuracy(model, self.digits.validation)
        self.test[method] = accuracy(model, self.digits.test)
        self.macs[method] = self.macs_of(model) if macs is None else macs
