"""One process, or several that `accelerate launch` or `torchrun` started: who works on what, and that they agree."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from swan_surgery.environment.extras import needed_from
from swan_surgery.errors import GateError, InputError
from swan_surgery.gates import GatedModel


# What Accelerate can be configured to do to the model itself; here every process has the whole model.
_SHARDED = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "TP")


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes of a run, as one of them sees it.

    Attributes:
        device: of this process.
        rank: of this process, from 0; the first one writes files.
        count: how many there are.
        accelerator: Accelerate's, where there are several.
    """

    device: torch.device
    rank: int = 0
    count: int = 1
    accelerator: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this one writes and tells."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose backward pass averages gradients over all processes; it starts as the first one's."""
        if self.accelerator is None:
            return model
        self.accelerator.free_memory()  # what it holds of the model before
        wrapped: nn.Module = self.accelerator.prepare_model(model)
        return wrapped

    def wait(self) -> None:
        """Until all are here."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()

    def first_alone(self, block: AbstractContextManager[None]) -> AbstractContextManager[None]:
        """What the first process alone enters."""
        return block if self.is_first else nullcontext()

    def total(self, sums: Tensor) -> Tensor:
        """Sums over all processes."""
        if self.accelerator is None:
            return sums
        reduced: Tensor = self.accelerator.reduce(sums, "sum")
        return reduced

    def agree_(self, model: nn.Module) -> None:
        """Give buffers (batch-norm statistics) the values of the first process.

        Raises:
            GateError: gates that are not the same everywhere, so that each would cut another network.
        """
        if self.accelerator is None:
            return
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)
        if isinstance(model, GatedModel):
            own = model.gates.logits.detach()
            first = own.clone()
            torch.distributed.broadcast(first, 0)
            if not torch.equal(own, first):
                raise GateError(f"the gates of process {self.rank} differ from those of process 0")


def alone_on(device: str) -> Processes:
    """This process alone, whatever was started beside it.

    Args:
        device: "auto", or what torch calls it.

    Raises:
        InputError: torch knows no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return Processes(torch.device(device))
    except RuntimeError as err:
        raise InputError(f"device={device!r} is not known to torch") from err


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The processes that were started together with this one, until the end of the block.

    Args:
        device: "auto", or what torch calls it; of several processes each takes a GPU of its own under "auto"
            and "cuda".

    Raises:
        InputError: torch knows no such device; Accelerate is configured to share out the model.
        MissingExtraError: several processes without Accelerate.
    """
    own = alone_on(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield own
        return
    with needed_from("recipes"):
        make = import_module("accelerate").Accelerator
    # Precision is a setting of the run, and not of how it was launched.
    accelerator = make(cpu=own.device.type == "cpu", mixed_precision="no")
    try:
        kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
        if kind in _SHARDED:
            raise InputError(
                f"Accelerate is configured for {kind}, which shares out the model; every process needs the whole "
                f"of it here: launch with --multi_gpu, or with torchrun"
            )
        yield Processes(
            accelerator.device, accelerator.process_index, accelerator.num_processes, accelerator
        )
    finally:
        accelerator.end_training()


__all__ = ["Processes", "alone_on", "joined"]
