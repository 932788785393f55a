"""One clear error where a framework is missing."""

from collections.abc import Iterator
from contextlib import contextmanager

from swan_surgery.errors import MissingExtraError


@contextmanager
def needed_from(extra: str) -> Iterator[None]:
    """Import what an optional extra installs, inside the block.

    Raises:
        MissingExtraError: says what to install.
    """
    try:
        yield
    except ImportError as err:
        raise MissingExtraError(
            f"{err.name or err} is not installed; pip install 'swan-surgery[{extra}]'"
        ) from err
