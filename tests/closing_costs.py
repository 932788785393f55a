"""Law 3 on a gated model: expected MACs at 0/1 gates are those that two counters find after the cut."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import swan_surgery as swan
from swan_surgery.gates import GatedModel
from tests.closing import close_random_


def assert_cost_is_exact(
    gated: GatedModel, *, seeds: tuple[int, ...] = (0, 1), torch_counts: bool = True
) -> None:
    """At random closings; `torch_counts`: torch's own counter knows all that multiplies here."""
    inputs = gated.own_inputs()
    for seed in seeds:
        close_random_(gated, 0.5, seed)
        small = swan.prune(gated)
        macs = swan.hard_macs(gated)
        assert swan.count_macs(small, gated.example_inputs) == macs
        assert swan.count_params(small) == sum(p.numel() for p in small.parameters())
        assert macs < swan.count_macs(gated, gated.example_inputs)
        if torch_counts:
            assert torch_macs(small, inputs) == macs


def torch_macs(model: nn.Module, inputs) -> float:
    """Torch counts two FLOPs per MAC."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs.args, **inputs.kwargs)
    return counter.get_total_flops() / 2
