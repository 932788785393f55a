"""What every training framework's callback does: before an optimizer step, and when training ends."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from swan_surgery.calibration import calibrate, norms_of
from swan_surgery.cutting.pruning import prune
from swan_surgery.errors import ModelError
from swan_surgery.learning.objective import Objective
from swan_surgery.routing.masking import cut_mask
from swan_surgery.routing.routed_model import RoutedModel
from swan_surgery.routing.rows import arguments_of
from swan_surgery.selection.ordering import ranking
from swan_surgery.selection.widest_mask import widest_mask


# How far a logit lies from the threshold at least where a budget moves it over.
_MARGIN = 1e-3


def check_inside(objective: Objective, trained: nn.Module) -> None:
    """Refuse to train a model that the objective does not drive.

    Raises:
        ModelError: the objective's gated model is no part of `trained`.
    """
    if not any(module is objective.gated for module in trained.modules()):
        raise ModelError(
            f"the objective's gated model is no part of {type(trained).__name__}, which is trained; "
            f"put it in before: module.net = swan.swanify(module.net, example_inputs)"
        )


def add_penalty(objective: Objective, epoch: float) -> None:
    """Call the objective and add its gradient to that of the logits.

    After the backward pass, between it and the optimizer's step: the gradient is the same on all
    ranks, so that it must not go through the reduction of DDP once more.
    """
    logits = objective.gated.gates.logits
    with torch.enable_grad():
        penalty = objective(epoch)
    (own,) = torch.autograd.grad(penalty, logits)
    if logits.grad is None:
        logits.grad = own
    else:
        logits.grad.add_(own)


def finish(
    objective: Objective,
    loader: Iterable[Any] | None,
    *,
    inputs_of: Callable[[Any], Any] | None,
    num_batches: int | None,
    trained: nn.Module | None = None,
) -> nn.Module:
    """Meet the budgets in full, calibrate batch-norm under hard gates, cut.

    The gated model is left at the gates that were cut to, calibrated.

    Args:
        objective: whose gated model is finished.
        loader: the training batches; only used where there are batch-norm statistics.
        inputs_of: what `calibrate` takes, from a batch; of a routed model by default the batch without labels.
        num_batches: how many to use at most.
        trained: the model with the gated one inside, where that may be the mask of a routed model.

    Returns:
        The pruned model; it computes what the gated one now does in eval mode. A routed model, if the gates are its mask.
    """
    gated = objective.gated
    owners = (own for own in (trained or gated).modules() if isinstance(own, RoutedModel))
    routed = next((own for own in owners if own.body is gated), None)
    if routed is not None and inputs_of is None:
        inputs_of = partial(_without_labels, routed)
    _meet_budgets_(objective)
    norms = norms_of(gated)
    if norms and loader is not None:
        batches = loader if inputs_of is None else map(inputs_of, loader)
        calibrate(gated, batches, num_batches)
        _share_(norms)
    return prune(gated) if routed is None else cut_mask(routed)


def _without_labels(routed: RoutedModel, batch: Any) -> Any:
    args, kwargs = arguments_of(batch, routed.device)
    return kwargs or args


def _meet_budgets_(objective: Objective) -> None:
    """Move gates over the threshold where the last optimizer step, or a short ramp, left too many."""
    gates = objective.gated.gates
    if all(limit.allows(gates.open_mask()) for limit in objective.limits):
        return
    mask = widest_mask(objective.gated, ranking(objective.gated), objective.limits)
    with torch.no_grad():
        z = gates.logits
        z.copy_(torch.where(mask, z.clamp(min=_MARGIN), z.clamp(max=-_MARGIN)))
    gates.threshold = 0.5


def _share_(norms: Iterable[_BatchNorm]) -> None:
    """Every rank calibrated on its own part of the data; that of rank 0 counts for all."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for norm in norms:
        for statistic in (norm.running_mean, norm.running_var):
            if statistic is not None:
                torch.distributed.broadcast(statistic, src=0)
