"""Index tensors that follow the gates from device to device and are no state of the model."""

from typing import Any

import torch
from torch import Tensor


class IndexTables:
    """Integer tensors on every device they were asked for on.

    They are no buffers: an averaged copy of a model averages its buffers, and the mean of two indices
    is another index.
    """

    def __init__(self, *tables: Tensor) -> None:
        """`tables`: the tensors, on the CPU."""
        self._on: dict[torch.device, tuple[Tensor, ...]] = {torch.device("cpu"): tables}

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The tables on a device."""
        found = self._on.get(device)
        if found is None:
            tables = self._on[torch.device("cpu")]
            found = self._on[device] = tuple(table.to(device) for table in tables)
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Copies start from the CPU again."""
        cpu = torch.device("cpu")
        return {"_on": {cpu: self._on[cpu]}}
