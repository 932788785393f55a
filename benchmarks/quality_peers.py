"""Torch-Pruning, asked for a share of the MACs: it takes ratios of channels, so the ratio is bisected."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch_pruning as tp
from torch import Tensor, nn

import swan_surgery as swan


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
