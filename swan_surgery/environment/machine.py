"""The machine that models run on: what it is called, and when it has done its work."""

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()


def wait_for(device: torch.device) -> None:
    """Return when the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@dataclass(frozen=True, slots=True)
class Environment:
    """Where and with what the figures were measured."""

    device: str
    threads: int
    python: str
    torch: str
    swan_surgery: str


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter or buffer lies; the CPU for a model without any."""
    tensors = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def environment(device: torch.device) -> Environment:
    """Device, threads and versions in use."""
    return Environment(
        device=device_name(device),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        swan_surgery=own_version(),
    )


def own_version() -> str:
    """The installed version of this library."""
    try:
        return version("swan-surgery")
    except PackageNotFoundError:
        return "not installed"
