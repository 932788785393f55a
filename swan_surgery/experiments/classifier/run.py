"""One run: what it works with, what its checkpoint keeps, and how a stage of it is trained and scored."""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swan_surgery.artifacts import save
from swan_surgery.experiments.classifier.batches import Images, ShuffledBatches, Taught, seed_of
from swan_surgery.experiments.classifier.checkpoint import (
    check_same_run,
    read_checkpoint,
    write_checkpoint,
)
from swan_surgery.experiments.classifier.data import Data
from swan_surgery.experiments.classifier.outcome import TOLD, TRAINING, Narrator, Row, write_log
from swan_surgery.experiments.classifier.settings import TrainSettings
from swan_surgery.experiments.classifier.steps import gates_of, loss_of, optimizer_of, score
from swan_surgery.experiments.loop import Loop, cosine
from swan_surgery.experiments.processes import Processes
from swan_surgery.gates import GatedModel
from swan_surgery.learning.objective import Objective


@dataclass(slots=True)
class Run:
    """What the stages share; each of the processes has one.

    `whole`: "macs", "params" and "units" of the dense model.
    """

    settings: TrainSettings
    data: Data
    folder: Path
    narrator: Narrator
    processes: Processes
    whole: dict[str, int] = field(default_factory=dict)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    history: list[Row] = field(default_factory=list)
    probabilities: dict[str, Tensor] = field(default_factory=dict)
    now: dict[str, Any] = field(default_factory=dict)
    before: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    @property
    def device(self) -> torch.device:
        """Of this process."""
        return self.processes.device

    @property
    def example(self) -> Tensor:
        """Inputs to map the model with, [1, C, H, W]."""
        return self.data.example().to(self.device)

    @property
    def file(self) -> Path:
        """The checkpoint."""
        return self.folder / "checkpoint.safetensors"

    def seconds(self) -> float:
        """Since the start, the parts before interruptions included."""
        return self.before + time.perf_counter() - self.started

    # --- the checkpoint ---

    def resume_(self) -> None:
        """Go on where the checkpoint was written, if there is one."""
        if not self.file.exists():
            return
        state = read_checkpoint(self.file)
        check_same_run(state["settings"], asdict(self.settings), self.folder)
        self.scores, self.history, self.now = state["scores"], state["history"], state["now"]
        self.probabilities, self.before = state["probabilities"], state["seconds"]
        self.narrator.say(f"Going on after epoch {len(self.history)} of the run in {self.folder}.")

    def keep(self) -> None:
        """Write the checkpoint and the log."""
        state = {
            "settings": asdict(self.settings),
            "scores": self.scores,
            "history": self.history,
            "probabilities": self.probabilities,
            "now": self.now,
            "seconds": self.seconds(),
        }
        if self.processes.is_first:
            write_checkpoint(self.file, state)
            write_log(self.history, self.folder / "log.csv")
        self.processes.wait()

    def store(self, model: nn.Module, name: str) -> None:
        """Save a model where all find it."""
        if self.processes.is_first:
            save(model, self.folder / name)
        self.processes.wait()

    def finish(self, stage: str, model: nn.Module) -> None:
        """Note a stage's accuracy; it will not be run again."""
        if self.note(stage, model):
            self.now = {}
            self.keep()

    def note(self, stage: str, model: nn.Module) -> bool:
        """Note a stage's accuracy, and tell it; whether it was new."""
        if is_new := stage not in self.scores:
            self.scores[stage] = self.score(model, self.data.test)
            if self.data.validation is not None:
                held_out = self.score(model, self.data.validation)
                self.scores[stage] |= {f"validation_{name}": own for name, own in held_out.items()}
        right = self.scores[stage]["accuracy"]
        self.narrator.say(f"{TOLD[stage]}: {right:.2f} % of the test images.")
        return is_new

    # --- training and testing ---

    def batches(
        self,
        stage: str,
        epoch: int,
        images: Images | None = None,
        *,
        first: int = 0,
        processes: Processes | None = None,
    ) -> ShuffledBatches:
        """An epoch's batches from a step on, whole ones unless shared out among processes."""
        return ShuffledBatches(
            images or self.data.train,
            self.settings,
            seed_of(self.settings.seed, stage, epoch),
            first=first,
            processes=processes or Processes(self.device),
        )

    def score(self, model: nn.Module, images: Images) -> dict[str, float]:
        """Accuracy in percent and mean loss."""
        return score(model, images, self.settings, self.processes)

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
        settings, images = self.settings, self.data.train
        if teacher is not None:
            teacher.eval()
            if settings.distillation and self.data.is_fixed:
                images = Taught(images, teacher, settings, self.device)
        loop = Loop(
            model,
            optimizer_of(model, settings, is_last=stage == "finetuned"),
            loss_of(settings, teacher),
            share=lambda place: cosine(place, epochs, settings.warmup),
            objective=objective,
            processes=self.processes,
        )
        span = range(epochs) if span is None else span
        done = 0
        if self.now.get("stage") == stage and "model" in self.now:
            loop.load_state_dict(self.now)
            done = max(0, loop.epoch - span.start)

        def keep() -> None:
            self.now = {"stage": stage, "cut": cut, **loop.state_dict()}
            self.keep()

        with self.narrator.epochs(TRAINING[stage], len(span)) as advance:
            for _ in range(done):
                advance(self.told())

            def after_epoch(epoch: int, loss: float) -> None:
                self.add_row(stage, epoch, epochs, loop=loop, loss=loss)
                keep()
                advance(self.told())

            def after_step(step: int) -> None:
                if settings.save_every and step % settings.save_every == 0:
                    keep()

            loop.run(
                span,
                lambda epoch, first: self.batches(
                    stage, epoch, images, first=first, processes=self.processes
                ),
                after_epoch=after_epoch,
                after_step=after_step,
            )

    def told(self) -> str:
        """The last accuracy, beside the bar."""
        return f"{self.history[-1]['accuracy']:.2f} %" if self.history else ""

    def add_row(self, stage: str, epoch: int, epochs: int, *, loop: Loop, loss: float) -> None:
        """What the log says after an epoch."""
        model = loop.model
        row: Row = {"stage": stage, "epoch": epoch + 1, "lr": loop.rate, "train_loss": loss}
        row |= self.score(model, self.data.validation or self.data.test)
        row |= gates_of(model, self.whole["macs"], self.whole["units"])
        if isinstance(model, GatedModel) and (
            epoch % max(1, epochs // 4) == 0 or epoch == epochs - 1
        ):
            self.probabilities[f"epoch {epoch + 1}"] = model.gates.probabilities().detach().cpu()
        self.history.append(row)


__all__ = ["Run"]
