"""From a model and settings to a smaller model: dense, gated, cut, fine-tuned; resumable after a kill.

Every random number follows from the seed, the stage and the epoch, and a checkpoint is written after
each epoch: a run that was killed and started again ends bitwise like one that was not (on a CPU, with
the same number of threads).
"""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swan_surgery.artifacts import load, save
from swan_surgery.calibration import calibrate, norms_of
from swan_surgery.costs.macs import count_macs
from swan_surgery.costs.params import count_params
from swan_surgery.cutting.pruning import prune
from swan_surgery.environment.locking import alone_in
from swan_surgery.experiments.classifier.checkpoint import (
    check_same_run,
    read_checkpoint,
    write_checkpoint,
)
from swan_surgery.experiments.classifier.data import Data, loader
from swan_surgery.experiments.classifier.outcome import TOLD, TRAINING, Narrator, Outcome, Row
from swan_surgery.experiments.classifier.scored import scored_stage
from swan_surgery.experiments.classifier.settings import TrainSettings
from swan_surgery.experiments.classifier.steps import (
    Step,
    check_logits,
    device_of,
    optimizer_of,
    row_of,
    score,
)
from swan_surgery.gates import GatedModel
from swan_surgery.gates.conversion import swanify
from swan_surgery.learning.objective import Objective
from swan_surgery.learning.ramps import CosineRamp
from swan_surgery.models import copy_of
from swan_surgery.selection.limits import limits_of
from swan_surgery.selection.ordering import ranking
from swan_surgery.selection.widest_mask import widest_mask


def run_experiment(
    model: nn.Module,
    settings: TrainSettings,
    data: Data,
    *,
    folder: Path,
    narrator: Narrator,
    fresh: bool = False,
) -> Outcome:
    """Train, gate, cut and fine-tune a copy of a model that classifies images.

    Args:
        model: takes [B, C, H, W] and returns logits [B, classes].
        settings: what to do.
        data: from `load_data`.
        folder: exists; holds the checkpoint, and `dense.swan` and `gated.swan` once made.
        narrator: told what happens.
        fresh: start anew, whatever the folder holds of an earlier run.

    Raises:
        InputError: outputs that are no logits; a checkpoint of other settings.
        BudgetError: the budget cannot be reached; before anything is trained.
        WritingError: another training is under way in the folder.
    """
    run = _Run(settings, data, folder, narrator, device_of(settings))
    with alone_in(folder, "training"), torch.random.fork_rng():
        if fresh:
            run.file.unlink(missing_ok=True)
        run.resume_()
        dense = copy_of(model).to(run.device)
        check_logits(dense, run.example, num_classes=data.classes)
        # Refuse what cannot work before hours are spent on the dense model.
        gated = swanify(dense, run.example, ignore=settings.ignore)
        run.check_reachable(gated)
        dense = run.dense_stage(dense)
        if settings.by_scores:
            small = scored_stage(run, dense)
        else:
            gated = run.gated_stage(dense)
            small = run.finetune_stage(gated, dense)
    return Outcome(
        dense=dense,
        small=small,
        gated=gated,
        example=run.example,
        scores=run.scores,
        macs=(count_macs(dense, run.example), count_macs(small, run.example)),
        params=(count_params(dense), count_params(small)),
        history=run.history,
        probabilities=run.probabilities,
        seconds=run.seconds(),
    )


@dataclass(slots=True)
class _Run:
    """One run: what it works with, and what its checkpoint keeps."""

    settings: TrainSettings
    data: Data
    folder: Path
    narrator: Narrator
    device: torch.device
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    history: list[Row] = field(default_factory=list)
    probabilities: dict[str, Tensor] = field(default_factory=dict)
    now: dict[str, Any] = field(default_factory=dict)
    before: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    @property
    def example(self) -> Tensor:
        return self.data.example().to(self.device)

    @property
    def file(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.started

    # --- the checkpoint ---

    def resume_(self) -> None:
        if not self.file.exists():
            return
        state = read_checkpoint(self.file)
        check_same_run(state["settings"], asdict(self.settings), self.folder)
        self.scores, self.history, self.now = state["scores"], state["history"], state["now"]
        self.probabilities, self.before = state["probabilities"], state["seconds"]
        self.narrator.say(f"Going on after epoch {len(self.history)} of the run in {self.folder}.")

    def keep(self) -> None:
        state = {
            "settings": asdict(self.settings),
            "scores": self.scores,
            "history": self.history,
            "probabilities": self.probabilities,
            "now": self.now,
            "seconds": self.seconds(),
        }
        write_checkpoint(self.file, state)

    def finish(self, stage: str, model: nn.Module) -> None:
        """Note a stage's accuracy; it will not be run again."""
        if self.note(stage, model):
            self.now = {}
            self.keep()

    def note(self, stage: str, model: nn.Module) -> bool:
        """Note a stage's accuracy, and tell it; whether it was new."""
        if is_new := stage not in self.scores:
            self.scores[stage] = score(model, self.data, self.settings)
        right = self.scores[stage]["accuracy"]
        self.narrator.say(f"{TOLD[stage]}: {right:.2f} % of the test images.")
        return is_new

    # --- the stages ---

    def dense_stage(self, model: nn.Module) -> nn.Module:
        file = self.folder / "dense.swan"
        if "dense" in self.scores:
            model = load(file, model).to(self.device)
        else:
            self.train("dense", model, self.settings.dense_epochs)
            save(model, file)
        self.finish("dense", model)
        return model

    def gated_stage(self, dense: nn.Module) -> GatedModel:
        file = self.folder / "gated.swan"
        if "gated" in self.scores:
            gated = load(file, dense).to(self.device)
            assert isinstance(gated, GatedModel)  # noqa: S101 - that is what was saved
        else:
            gated = swanify(dense, self.example, ignore=self.settings.ignore)
            objective = self.objective_of(gated)
            self.train(
                "gated", gated, self.settings.gate_epochs, teacher=dense, objective=objective
            )
            objective(self.settings.gate_epochs)  # the last step moved weights, and perhaps gates
            self.calibrate(gated)
            save(gated, file)
        self.finish("gated", gated)
        return gated

    def objective_of(self, gated: GatedModel) -> Objective:
        settings = self.settings
        gated.gates.min_width = settings.min_width
        return Objective(
            gated,
            **self.settings.budgets,
            learning=settings.learning,  # type: ignore[arg-type]  # checked by the settings
            ramp=CosineRamp(length=settings.ramp * settings.gate_epochs),
            freeze_after=(1 - settings.freeze) * settings.gate_epochs,
        )

    def finetune_stage(self, gated: GatedModel, dense: nn.Module) -> nn.Module:
        file = self.folder / "pruned.swan"
        if "finetuned" in self.scores:
            small = load(file, dense).to(self.device)
        else:
            small = self.cut(gated)
            self.train("finetuned", small, self.settings.finetune_epochs, teacher=dense)
            save(small.eval(), file)
        self.finish("finetuned", small)
        return small

    def check_reachable(self, gated: GatedModel) -> None:
        """The budgets, by gates alone and with rounded widths."""
        self.objective_of(gated)
        limits = limits_of(gated, **self.settings.budgets)
        widest_mask(gated, ranking(gated), limits, round_to=self.settings.round_to)

    def cut(self, gated: GatedModel) -> nn.Module:
        settings = self.settings
        if settings.round_to == 1:
            small = prune(gated)
        else:
            small = prune(gated, round_to=settings.round_to, **self.settings.budgets)
            self.calibrate(small)
        self.finish("pruned", small)
        return small

    def calibrate(self, model: nn.Module) -> None:
        if self.settings.calibration and norms_of(model):
            batches = self.batches("calibration", 0)
            calibrate(model, (x.to(self.device) for x, _ in batches), self.settings.calibration)

    # --- training and testing ---

    def batches(self, stage: str, epoch: int) -> Any:
        """The epoch's batches; all randomness starts from seed, stage and epoch."""
        number = [*TRAINING, "calibration"].index(stage)
        seed = (self.settings.seed * 16 + number) * 100_003 + epoch
        torch.manual_seed(seed)
        return loader(self.data.train, self.settings, torch.Generator().manual_seed(seed))

    def train(
        self,
        stage: str,
        model: nn.Module,
        epochs: int,
        *,
        teacher: nn.Module | None = None,
        objective: Objective | None = None,
        span: range | None = None,
        cut: int = 0,
    ) -> None:
        """Train in place, from where the checkpoint is; `span` of the epochs after one of several cuts."""
        optimizer = optimizer_of(model, self.settings, is_last=stage == "finetuned")
        parts: dict[str, Any] = {"model": model, "optimizer": optimizer}
        if objective is not None:
            parts["objective"] = objective
        span = range(epochs) if span is None else span
        first = span.start
        if self.now.get("stage") == stage and "model" in self.now:
            first = self.now["epoch"]
            for name, part in parts.items():
                part.load_state_dict(self.now[name])
        step = Step(model, optimizer, self.settings, teacher)
        with self.narrator.epochs(TRAINING[stage], len(span)) as advance:
            for epoch in span:
                if epoch >= first:
                    self.one_epoch(stage, epoch, epochs, step=step, objective=objective)
                    states = {name: part.state_dict() for name, part in parts.items()}
                    self.now = {"stage": stage, "cut": cut, "epoch": epoch + 1, **states}
                    self.keep()
                advance(f"{self.history[-1]['accuracy']:.2f} %" if self.history else "")

    def one_epoch(
        self, stage: str, epoch: int, epochs: int, *, step: Step, objective: Objective | None
    ) -> None:
        batches = self.batches(stage, epoch)
        step.model.train()
        number = len(batches)
        losses, rate = [], 0.0
        for index, (x, y) in enumerate(batches):
            place = epoch + index / number
            rate = step.set_rate(place, epochs)
            penalty = None if objective is None else objective(place)
            losses.append(step(x.to(self.device), y.to(self.device), penalty))
        row = row_of(step.model, self.data, self.settings, self.example)
        row = {"stage": stage, "epoch": epoch + 1, "lr": rate, **row}
        row["train_loss"] = float(torch.stack(losses).mean())
        if isinstance(step.model, GatedModel) and (
            epoch % max(1, epochs // 4) == 0 or epoch == epochs - 1
        ):
            p = step.model.gates.probabilities().detach().cpu()
            self.probabilities[f"epoch {epoch + 1}"] = p
        self.history.append(row)
