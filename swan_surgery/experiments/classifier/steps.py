"""One step of training and one pass over the test images."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swan_surgery.costs.macs import count_macs, hard_macs
from swan_surgery.errors import InputError, ModelError
from swan_surgery.experiments.classifier.data import Data, loader
from swan_surgery.experiments.classifier.outcome import Row
from swan_surgery.experiments.classifier.settings import TrainSettings
from swan_surgery.gates import GatedModel
from swan_surgery.learning.distillation import distillation_loss
from swan_surgery.learning.parameter_groups import parameter_groups


def device_of(settings: TrainSettings) -> torch.device:
    """The device that settings ask for.

    Raises:
        InputError: torch knows no such device.
    """
    if settings.device != "auto":
        try:
            return torch.device(settings.device)
        except RuntimeError as err:
            raise InputError(f"device={settings.device!r} is not known to torch") from err
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_logits(model: nn.Module, example: Tensor, *, num_classes: int) -> None:
    """Refuse what is no classifier of these images.

    Raises:
        InputError: it cannot be run on them, or has too few outputs.
        ModelError: it returns something else than logits [B, classes].
    """
    try:
        with torch.no_grad():
            logits = model.eval()(example)
    except Exception as err:
        told = str(err).splitlines()[0] if str(err) else ""
        raise InputError(
            f"the model cannot be run on images {tuple(example.shape)}: {type(err).__name__}: "
            f"{told}; set size, or take data that fits"
        ) from err
    if not (isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == 1):
        seen = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"`train` is for classifiers, which return logits [B, classes]; this one returns {seen}. "
            f"Train it with swan.swanify and swan.Objective in a loop of your own"
        )
    if logits.shape[1] < num_classes:
        raise InputError(f"the model has {logits.shape[1]} outputs, the data {num_classes} classes")


def optimizer_of(
    model: nn.Module, settings: TrainSettings, *, is_last: bool = False
) -> torch.optim.Optimizer:
    """AdamW or SGD; each group keeps its peak learning rate as `peak`.

    Args:
        model: gated or plain.
        settings: of the experiment.
        is_last: whether `finetune_lr` counts.
    """
    lr = (settings.finetune_lr if is_last else 0.0) or settings.lr
    groups: Any = [{"params": list(model.parameters()), "weight_decay": settings.weight_decay}]
    if isinstance(model, GatedModel):
        decay = settings.weight_decay
        groups = parameter_groups(model, lr=lr, gate_lr=settings.gate_lr, weight_decay=decay)
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr, momentum=0.9, nesterov=True)
    else:
        optimizer = torch.optim.AdamW(groups, lr)
    for group in optimizer.param_groups:
        group["peak"] = group["lr"]
    return optimizer


class Step:
    """Forward, backward, update; called with a batch, returns the loss without the penalty."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: TrainSettings,
        teacher: nn.Module | None,
    ) -> None:
        self.model = model
        self._optimizer, self._settings = optimizer, settings
        self._teacher = teacher.eval() if teacher is not None and settings.distillation else None

    def set_rate(self, place: float, epochs: int) -> float:
        """Set the learning rates at a place in a stage, in epochs; returns that of the weights."""
        warm = min(1.0, (place + 1e-3) / self._settings.warmup) if self._settings.warmup else 1.0
        factor = warm * 0.5 * (1 + math.cos(math.pi * place / max(epochs, 1)))
        for group in self._optimizer.param_groups:
            group["lr"] = factor * group["peak"]
        return float(self._optimizer.param_groups[0]["lr"])

    def __call__(self, x: Tensor, y: Tensor, penalty: Tensor | None) -> Tensor:
        """One update on images [B, C, H, W] and labels [B]."""
        settings = self._settings
        with torch.autocast(x.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            logits = self.model(x)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=settings.label_smoothing)
        if self._teacher is not None:
            with torch.no_grad():
                wanted = self._teacher(x)
            follow = distillation_loss(logits.float(), wanted, temperature=settings.temperature)
            loss = (1 - settings.distillation) * loss + settings.distillation * follow
        total = loss if penalty is None else loss + penalty
        self._optimizer.zero_grad()
        total.backward()
        self._optimizer.step()
        return loss.detach()


@torch.no_grad()
def score(model: nn.Module, data: Data, settings: TrainSettings) -> dict[str, float]:
    """Accuracy in percent and mean loss on the test images, in eval mode: hard gates."""
    model.eval()
    device = next(model.parameters()).device
    loss, right, count = 0.0, 0, 0
    for x, y in loader(data.test, settings, None):
        logits, labels = model(x.to(device)), y.to(device)
        loss += float(F.cross_entropy(logits.float(), labels, reduction="sum"))
        right += int((logits.argmax(1) == labels).sum())
        count += len(labels)
    return {"accuracy": 100 * right / count, "loss": loss / count}


def row_of(model: nn.Module, data: Data, settings: TrainSettings, example: Tensor) -> Row:
    """What the log says of a model after an epoch: test accuracy and loss, and of gates what is open."""
    row: Row = {**score(model, data, settings)}
    if isinstance(model, GatedModel):
        row["hard_macs_share"] = hard_macs(model) / count_macs(model, example)
        row["open_share"] = float(model.gates.open_mask().double().mean())
    return row
