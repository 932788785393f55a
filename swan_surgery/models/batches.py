"""A loader's batch as a call of the model: inputs alone, with labels behind them, or by name."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def run_on_batch(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch, on the device of its parameters.

    A mapping holds keyword arguments; of a tuple or list the first element is the input.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, Mapping):
        return model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    first = batch[0] if isinstance(batch, (tuple, list)) else batch
    return model(first.to(device))
