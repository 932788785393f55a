"""Blocks that draw random numbers and leave torch's streams as they were."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def streams_kept(seed: int | None = None) -> Iterator[None]:
    """Put torch's random streams back after the block; with a `seed` they start there in it.

    `torch.random.fork_rng` and `torch.manual_seed`, but where there is no accelerator its streams are
    left alone: each call opens NVML, formats the stack for three kinds of device, and keeps it.
    """
    if _has_accelerator():
        with torch.random.fork_rng():
            if seed is not None:
                torch.manual_seed(seed)
            yield
        return
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        yield


@functools.cache
def _has_accelerator() -> bool:
    return torch.accelerator.is_available()
