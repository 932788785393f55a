"""How far the light branch is from the full one, per sample, and the losses of a switch layer (Eq. 2 to 5)."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from swan_surgery.errors import InputError, SwanWarning


# (light output, full output) -> one number >= 0 per sample, shape [B].
Discrepancy = Callable[[Any, Any], Tensor]
DiscrepancyName = Literal["kl", "l1", "l2"]

_MOMENTUM = 0.02


def kl(light: Any, full: Any) -> Tensor:
    """Kullback-Leibler divergence KL(full || light) in nats, for logits with classes on axis 1; the mean over positions."""
    one, two = _first(light), _first(full)
    ours, theirs = F.log_softmax(one, 1), F.log_softmax(two, 1)
    never = theirs == float("-inf")  # a class that is masked out: 0 * log 0 is 0
    own = theirs.exp() * (theirs - ours).masked_fill(never, 0)
    return own.sum(1).flatten(1).mean(1) if own.ndim > 2 else own.sum(1)


def l1(light: Any, full: Any) -> Tensor:
    """Mean absolute difference of all outputs."""
    return _mean(light, full, torch.abs)


def l2(light: Any, full: Any) -> Tensor:
    """Mean squared difference of all outputs."""
    return _mean(light, full, torch.square)


DISCREPANCIES: Mapping[str, Discrepancy] = {"kl": kl, "l1": l1, "l2": l2}


def discrepancy_of(given: DiscrepancyName | Discrepancy | None, full: Any) -> Discrepancy:
    """By name, as given, or by what the model returns: class scores [B, C] are compared by KL, all else by L2.

    Raises:
        InputError: an unknown name.
    """
    if given is None:
        first = _first(full)
        is_alone = len(_floating(full)) == 1
        return kl if is_alone and first.ndim == 2 and first.shape[1] > 1 else l2
    if callable(given):
        return given
    if given not in DISCREPANCIES:
        raise InputError(
            f"discrepancy must be one of {', '.join(DISCREPANCIES)} or a function of (light, full); got {given!r}"
        )
    return DISCREPANCIES[given]


def per_sample(values: Any, batch: int, what: str) -> Tensor:
    """Check a function of the user's.

    Raises:
        InputError: not one number per sample.
    """
    if not isinstance(values, Tensor) or values.shape != (batch,):
        seen = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InputError(f"{what} must return one number per sample, shape [{batch}]; got {seen}")
    found: Tensor = values
    return found


def positives_of(labels: Any, positive: Callable[[Any], Tensor] | None) -> Tensor:
    """Omega of labels, bool [B]: which inputs must not be stopped.

    Raises:
        InputError: no labels, or nothing that tells them apart.
    """
    if labels is None or positive is None:
        raise InputError(
            "gated compression learns from labels which inputs are negative: pass positive=lambda labels: ... to "
            "swan.add_switch, and batches of (inputs, labels)"
        )
    found: Any = positive(labels)
    if not isinstance(found, Tensor) or found.numel() != len(labels):
        seen = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(
            f"positive= must return a tensor of one flag per label, {len(labels)}; got {seen}"
        )
    return found.bool().reshape(-1)


def switch_loss(switch: Any, predicted: Tensor, actual: Tensor) -> Tensor:
    """Eq. 3: the switch regresses the discrepancy (no gradient flows into the branches), in log(1 + d / scale)."""
    actual = actual.detach().to(predicted.dtype)
    scale = switch.scale
    found = F.mse_loss(torch.log1p(predicted / scale), torch.log1p(actual / scale))
    if switch.training:
        # A new tensor, because the old one is needed backward.
        weight = (1 / (switch.seen + 1)).clamp(min=_MOMENTUM).to(scale)
        switch.scale = scale.lerp(actual.mean().to(scale).clamp(min=1e-12), weight)
        switch.seen = switch.seen + 1
    return found


def _mean(light: Any, full: Any, function: Callable[[Tensor], Tensor]) -> Tensor:
    pairs = [*zip(_floating(light), _floating(full), strict=True)]
    if not pairs:
        raise InputError(
            "the model returns no floating-point numbers, so outputs have no distance: pass discrepancy=lambda light, "
            "full: ..., one number per sample"
        )
    return torch.stack([function(a - b).reshape(len(a), -1).mean(1) for a, b in pairs]).mean(0)


def _floating(output: Any) -> list[Tensor]:
    leaves = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
    return [leaf for leaf in leaves if leaf.is_floating_point()]


def name_unsynchronised() -> None:
    """Warn where several processes train and each keeps its gradients: DistributedDataParallel averages in its forward only."""
    if (
        torch.is_grad_enabled()
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size() > 1
    ):
        warnings.warn(
            f"{dist.get_world_size()} processes run, and this loss goes around DistributedDataParallel: no process sees "
            f"the others' gradients. Wrap the parts and hand them in: ddp = DistributedDataParallel(routed.body); "
            f"routed.loss(batch, run=ddp)",
            SwanWarning,
            stacklevel=3,
        )


def _first(output: Any) -> Tensor:
    first: Tensor = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
    return first


__all__ = [
    "DISCREPANCIES",
    "Discrepancy",
    "DiscrepancyName",
    "discrepancy_of",
    "name_unsynchronised",
    "per_sample",
    "positives_of",
    "switch_loss",
]
