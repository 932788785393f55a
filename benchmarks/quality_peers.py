"""Torch-Pruning, asked for a share of the MACs: it takes ratios of channels, so the ratio is bisected."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.models.provenance import provenance_of


_ROUNDS = 14


def pruner(
    model: nn.Module, importance: Any, ratio: float, *, example: Tensor, is_global: bool = False
) -> Any:
    """Torch-Pruning's pruner: the same ratio in every layer (its default), or one global ranking."""
    outputs = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 10]
    return tp.pruner.BNScalePruner(
        model,
        example,
        importance=importance,
        reg=1e-4,
        pruning_ratio=ratio,
        max_pruning_ratio=1.0,
        global_pruning=is_global,
        ignored_layers=outputs,
    )


def nearest_cut(
    model: nn.Module,
    make_pruner: Callable[[nn.Module, float], Any],
    example: Tensor,
    wanted_macs: float,
    prepare: Callable[[nn.Module], None] | None = None,
    *,
    rounds: int = _ROUNDS,
) -> nn.Module:
    """The cut of a copy of `model` whose MACs come nearest to those wanted.

    Args:
        model: the network to cut; it is not changed.
        make_pruner: from a copy and a ratio of channels.
        example: what MACs are counted on.
        wanted_macs: MACs to come near to.
        prepare: called on every copy before it is cut; leaves the gradients that a score reads.
        rounds: how often the ratio's range is halved.
    """
    low, high, best, nearest = 0.0, 1.0, None, math.inf
    for _ in range(rounds):
        middle = (low + high) / 2
        trial = copy.deepcopy(model)
        if prepare is not None:
            prepare(trial)
        make_pruner(trial, middle).step()
        trial.zero_grad()
        excess = swan.count_macs(trial, example) - wanted_macs
        if abs(excess) < nearest:
            best, nearest = trial, abs(excess)
        low, high = (middle, high) if excess > 0 else (low, middle)
    assert best is not None  # noqa: S101 - the first trial is nearer than infinity
    return best


def with_provenance(small: nn.Module, dense: nn.Module, example: Tensor) -> nn.Module:
    """A peer's cut as one of ours, so that `swan.compensate` knows which channels are left; ours as it is.

    A channel is known by its batch-norm's running mean. Weights, biases and statistics are the peer's.

    Raises:
        RuntimeError: the peer's cut is none that closing units gives.
    """
    if provenance_of(small) is not None:
        return small
    gated = swan.swanify(dense, example)
    cut = dict(small.named_modules())
    with torch.no_grad():
        for name, norm in dense.named_modules():
            if isinstance(norm, nn.BatchNorm2d):
                left = set(cut[name].running_mean.tolist())
                stays = torch.tensor([value in left for value in norm.running_mean.tolist()])
                units = torch.tensor(gated.channels.layer(_convolution(name)).out_units)
                gated.gates.logits[units[~stays & (units >= 0)]] = -5.0
    own = swan.prune(gated)
    theirs = small.state_dict()
    for name, tensor in own.state_dict().items():
        if theirs[name].shape != tensor.shape:
            raise RuntimeError(
                f"{name} is {tuple(theirs[name].shape)}, by units {tuple(tensor.shape)}"
            )
    own.load_state_dict(theirs)
    return own


def _convolution(norm: str) -> str:
    """The name of the convolution in front of a batch-norm, in the networks of `quality_networks.py`."""
    parent, _, own = norm.rpartition(".")
    before = f"conv{own.removeprefix('bn')}" if own.startswith("bn") else str(int(own) - 1)
    return f"{parent}.{before}" if parent else before
