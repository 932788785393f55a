"""Torch-Pruning, asked for a share of the MACs: it takes ratios of channels, so the ratio is bisected."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
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
    finished: Callable[[nn.Module], nn.Module] = lambda trial: trial,
    rounds: int = _ROUNDS,
) -> nn.Module:
    """The cut of a copy of `model` whose MACs come nearest to those wanted.

    Args:
        model: the network to cut; it is not changed.
        make_pruner: from a copy and a ratio of channels.
        example: what MACs are counted on.
        wanted_macs: MACs to come near to.
        prepare: called on every copy before it is cut; leaves the gradients that a score reads.
        finished: what becomes of a cut, before its MACs are counted.
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
        trial = finished(trial)
        excess = swan.count_macs(trial, example) - wanted_macs
        if abs(excess) < nearest:
            best, nearest = trial, abs(excess)
        low, high = (middle, high) if excess > 0 else (low, middle)
    assert best is not None  # noqa: S101 - the first trial is nearer than infinity
    return best


def as_units(cut: nn.Module, dense: nn.Module, example: Tensor) -> nn.Module:
    """A peer's cut of `dense` as one of ours, so that `swan.compensate` knows which channels are left.

    A channel is known by its batch-norm's running mean, or by its linear layer's bias. A unit goes where at
    least half of its channels are gone: the peer may cut a stage of a ResNet apart from the channels that its
    shortcut pads, which are one unit. So its MACs differ from the peer's.
    """
    gated = swan.swanify(dense, example)
    modules = dict(cut.named_modules())
    gone, count = (torch.zeros(gated.channels.num_units) for _ in range(2))
    for name, module in dense.named_modules():
        known: Any = None
        if isinstance(module, nn.BatchNorm2d):
            known, layer = "running_mean", _convolution(name)
        elif isinstance(module, nn.Linear) and module.bias is not None:
            known, layer = "bias", name
        if known is None:
            continue
        left = set(getattr(modules[name], known).tolist())
        units = gated.channels.layer(layer).out_units
        for value, unit in zip(getattr(module, known).tolist(), units, strict=True):
            if unit >= 0:
                count[unit] += 1
                gone[unit] += value not in left
    if not bool(count.all()):
        raise ValueError("a channel has neither a batch-norm nor a bias to be known by")
    with torch.no_grad():
        gated.gates.logits[gone >= 0.5 * count] = -5.0
    return swan.prune(gated)


def _convolution(norm: str) -> str:
    """The name of the convolution in front of a batch-norm, in the networks of `quality_networks.py`."""
    parent, _, own = norm.rpartition(".")
    before = f"conv{own.removeprefix('bn')}" if own.startswith("bn") else str(int(own) - 1)
    return f"{parent}.{before}" if parent else before
