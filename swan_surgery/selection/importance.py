"""How much each unit matters: scores of its weights, or of the loss's gradient on its gate."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from swan_surgery.channels import PINNED
from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import InputError
from swan_surgery.gates import GatedModel, magnitudes
from swan_surgery.gates.checks import check_gated
from swan_surgery.models.batches import batches_in
from swan_surgery.models.checks import check_data
from swan_surgery.models.modes import evaluating


Score = Literal["magnitude", "bn_scale", "taylor", "fisher", "random"]
_NEED_DATA = ("taylor", "fisher")


def importance(
    gated: GatedModel,
    score: Score = "fisher",
    *,
    batches: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    num_batches: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Score every unit; more is more important. Nothing about the model changes.

    - `magnitude`: squared weights of all its slots, each layer's mean one (Torch-Pruning's group L2).
    - `bn_scale`: squared batch-norm scales of its channels, the mean over its batch-norms
      (network slimming, arXiv:1708.06519); its magnitude where no batch-norm follows.
    - `taylor`: mean over the batches of |dL/dg|, the loss to first order without the unit
      (arXiv:1906.10771, with the gate as the parameter).
    - `fisher`: mean over the batches of (dL/dg)^2, the loss to second order where the first
      order vanishes, as it does at a minimum (arXiv:1801.05787). Small batches estimate it better.
    - `random`: uniform in [0, 1).

    Gradients are taken in eval mode at the hard gates in force, so with frozen statistics and without
    dropout.

    Args:
        gated: the gated model.
        score: which score.
        batches: what `loss` takes; needed by `taylor` and `fisher`.
        loss: `loss(model, batch)`, a scalar; as in `lambda m, b: F.cross_entropy(m(b[0]), b[1])`.
        num_batches: how many batches to use at most; all of them by default.
        generator: draws `random`.

    Returns:
        float64 of shape (num_units,), on the model's device, not negative.

    Raises:
        ModelError: `gated` is not a gated model, or lies on the meta device.
        InputError: an unknown score, no batches or no loss where they are needed, or a loss that is
            no finite scalar.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> gated = swan.swanify(net, torch.zeros(1, 3))
        >>> batches = [(torch.randn(16, 3), torch.randint(2, (16,)))]
        >>> loss = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> scores = swan.importance(gated, "fisher", batches=batches, loss=loss)
        >>> scores.shape
        torch.Size([8])
    """
    check_gated(gated)
    check_data(gated, to="score units")
    if score not in get_args(Score):
        raise InputError(f"score must be one of {', '.join(get_args(Score))}; got {score!r}")
    if score in _NEED_DATA:
        if batches is None or loss is None:
            raise InputError(f"score={score!r} needs batches=... and loss=lambda model, batch: ...")
        return _of_gradients(gated, score, batches_in(batches, num_batches), loss)
    if score == "random":
        drawn = torch.rand(gated.gates.num_units, generator=generator, dtype=torch.float64)
        return drawn.to(gated.gates.logits.device)
    own = magnitudes(gated.model, gated.channels) if score == "magnitude" else _scales(gated)
    return own.to(gated.gates.logits.device)


def _of_gradients(
    gated: GatedModel,
    score: Score,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
) -> Tensor:
    used = 0
    with (
        evaluating(gated),
        torch.inference_mode(mode=False),
        torch.enable_grad(),
        streams_kept(),
        gated.gates.as_leaf() as gates,
    ):
        total = torch.zeros_like(gated.gates.logits, dtype=torch.float64)
        for batch in batches:
            value = called(loss, gated, batch)
            _check_loss(value)
            (own,) = torch.autograd.grad(value, gates, allow_unused=True)
            if own is not None:
                own = own.double()
                total += own.abs() if score == "taylor" else own.square()
            used += 1
    if not used:
        raise InputError("batches yielded no batch, so there is nothing to score units by")
    return total / used


def called(loss: Callable[[nn.Module, Any], Tensor], model: nn.Module, batch: Any) -> Tensor:
    """`loss(model, batch)`; where it fails as a loss of outputs and labels does, that is noted."""
    try:
        return loss(model, batch)
    except (TypeError, AttributeError) as err:
        err.add_note(
            "loss is called as loss(model, batch), as in: lambda m, b: F.cross_entropy(m(b[0]), b[1])"
        )
        raise


def _check_loss(value: Any) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        seen = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"loss(model, batch) must return a scalar tensor; got {seen}")
    if not value.requires_grad:
        raise InputError("loss(model, batch) does not depend on the model; is it under no_grad?")
    if not bool(torch.isfinite(value.detach())):
        raise InputError(
            f"loss(model, batch) is {float(value.detach())}; units cannot be scored by it"
        )


def _scales(gated: GatedModel) -> Tensor:
    """Mean squared batch-norm scale of every unit; where there is none, its magnitude."""
    norms = {
        f"{name}.weight": module.weight
        for name, module in gated.model.named_modules()
        if isinstance(module, _BatchNorm) and module.weight is not None
    }
    total = torch.zeros(gated.channels.num_units, dtype=torch.float64)
    count = torch.zeros_like(total)
    for entry in gated.channels.tensors:
        if entry.tensor in norms:
            units = torch.tensor(entry.units)
            own = norms[entry.tensor].detach().double().cpu().square()
            total.index_add_(0, units[units != PINNED], own[units != PINNED])
            count.index_add_(0, units[units != PINNED], torch.ones_like(own[units != PINNED]))
    scales = total / count.clamp(min=1)
    return torch.where(count > 0, scales, magnitudes(gated.model, gated.channels))


__all__ = ["Score", "importance"]
