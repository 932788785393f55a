"""What is shown while a command works."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """A spinner on stderr, so that stdout holds the result alone."""
    with Console(stderr=True).status(text), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
