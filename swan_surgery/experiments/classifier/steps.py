"""What is minimised, by what, and how a model is scored."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swan_surgery.costs.macs import hard_macs
from swan_surgery.errors import InputError, ModelError
from swan_surgery.experiments.classifier.batches import Images, in_order
from swan_surgery.experiments.classifier.outcome import Row
from swan_surgery.experiments.classifier.settings import TrainSettings
from swan_surgery.experiments.loop import Loss
from swan_surgery.experiments.processes import Processes
from swan_surgery.gates import GatedModel
from swan_surgery.learning.distillation import distillation_loss
from swan_surgery.learning.parameter_groups import parameter_groups


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
    """AdamW or SGD, with peak learning rates.

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
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr)


def loss_of(settings: TrainSettings, teacher: nn.Module | None) -> Loss:
    """Cross entropy with labels, and with `distillation` a teacher's outputs, where the batch brings none."""

    def loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        device = next(model.parameters()).device
        x, y, *outputs = (own.to(device, non_blocking=True) for own in batch)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            logits = _precise(model(x))
        own = F.cross_entropy(logits, y, label_smoothing=settings.label_smoothing)
        if teacher is None or not settings.distillation:
            return own
        if not outputs:
            with torch.no_grad():
                outputs = [teacher(x)]
        follow = distillation_loss(logits, outputs[0], temperature=settings.temperature)
        return (1 - settings.distillation) * own + settings.distillation * follow

    return loss


def _precise(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


@torch.no_grad()
def score(
    model: nn.Module, images: Images, settings: TrainSettings, processes: Processes | None = None
) -> dict[str, float]:
    """Accuracy in percent and mean loss on images, in eval mode: hard gates."""
    model.eval()
    device = next(model.parameters()).device
    sums = torch.zeros(3, dtype=torch.float64)
    shared = Processes(device) if processes is None else processes
    for x, y in in_order(images, settings, shared):
        logits, labels = model(x.to(device)), y.to(device)
        loss = F.cross_entropy(_precise(logits), labels, reduction="sum")
        right = (logits.argmax(1) == labels).sum()
        sums += torch.tensor([float(loss), int(right), len(labels)])
    loss, right, count = shared.total(sums.to(device)).tolist()
    return {"accuracy": 100 * right / count, "loss": loss / count}


def gates_of(model: nn.Module, macs: int, num_units: int) -> Row:
    """What the log says of gates: shares of a dense model with so many MACs and units."""
    if not isinstance(model, GatedModel):
        return {}
    return {
        "hard_macs_share": hard_macs(model) / macs,
        "open_share": int(model.gates.open_mask().sum()) / num_units,
    }
