"""What is shown while a command works."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.console import Console


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """A spinner on stderr, so that stdout holds the result alone."""
    with Console(stderr=True).status(text), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def on_threads(count: int | None) -> Iterator[None]:
    """So many threads of torch; None: as many as now."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
