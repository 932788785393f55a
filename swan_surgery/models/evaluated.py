"""What a model computes at rest."""

from typing import Any

import torch
from torch import Tensor, nn

from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.models.inputs import Inputs
from swan_surgery.models.modes import evaluating
from swan_surgery.models.outputs import iter_tensors


def outputs_of(private: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All tensors that a private model returns in eval mode for copies of inputs; modes and random streams as before."""
    with evaluating(private), torch.no_grad(), streams_kept(0):
        result: Any = inputs.run(private)
    return list(iter_tensors(result))


__all__ = ["outputs_of"]
