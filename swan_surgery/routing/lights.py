"""The light branch: the library's own cut of what runs behind a switch."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from swan_surgery.cutting.pruning import prune_by_score
from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import NoGateableChannelsError
from swan_surgery.gates.conversion import swanify
from swan_surgery.models import Inputs, copy_of
from swan_surgery.routing.splitting import Split
from swan_surgery.selection.importance import importance


def cut_light(
    split: Split, crossing: Tensor, share: float, batches: Sequence[Inputs] | None
) -> nn.Module:
    """The rest, cut to a share of its MACs: by magnitude, or with data by Fisher scores, and compensated."""
    if share == 1:
        return _trainable_(copy_of(split.rest))
    try:
        gated = swanify(split.rest, crossing)
    except NoGateableChannelsError as err:
        raise NoGateableChannelsError(
            f"what runs behind the switch cannot be cut to a light branch: switch earlier, or pass light= a module of "
            f"your own, or light=1. {err}"
        ) from err
    if not batches:
        light = prune_by_score(gated, importance(gated, "magnitude"), macs=share)
        return _trainable_(light)
    tensors = [batch.args[0] for batch in batches]
    with streams_kept(0):
        # Small batches estimate squared gradients better (`importance`).
        small = [part for tensor in tensors for part in tensor.split(16)]
        scores = importance(gated, "fisher", batches=small, loss=_own_loss)
    return _trainable_(prune_by_score(gated, scores, macs=share, compensate=tensors))


def _trainable_(light: nn.Module) -> nn.Module:
    """A light branch is there to be trained, whether or not the model that it was cut from is frozen as a whole."""
    own = [p for p in light.parameters() if p.is_floating_point()]
    if not any(parameter.requires_grad for parameter in own):
        for parameter in own:
            parameter.requires_grad = True
    return light


def _own_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """A loss whose squared gradients are the Fisher information of the model's own outputs: needs no labels."""
    terms = []
    for output in tree_leaves(model(batch)):
        if not isinstance(output, Tensor) or not output.is_floating_point():
            continue
        if output.ndim == 2 and output.shape[1] > 1:
            drawn = torch.distributions.Categorical(logits=output.detach().float()).sample()
            terms.append(nn.functional.cross_entropy(output, drawn))
        else:
            terms.append((output * torch.randn_like(output)).reshape(len(output), -1).sum(1).mean())
    return torch.stack(terms).sum()


__all__ = ["cut_light"]
