"""Blocks that draw random numbers and leave the streams as they were."""

import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
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


@contextmanager
def pythons_kept() -> Iterator[None]:
    """The same for the random numbers of Python and numpy, which may decide a model's path."""
    own, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002 - what models may use
    try:
        yield
    finally:
        random.setstate(own)
        np.random.set_state(numpys)  # noqa: NPY002 - as above


@functools.cache
def _has_accelerator() -> bool:
    return torch.accelerator.is_available()
