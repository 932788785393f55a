"""Changes of settings that all threads of a process share, for blocks that may overlap.

The context managers of torch and Python put back what they met. Where two threads are inside at once, the
later one met what the earlier one had changed, and if it leaves last, it leaves that behind for good: a server
that gates a model in each of two threads would run without fused attention from then on.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import RLock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


class ProcessWide:
    """A change that the first block of all threads makes, and the last one undoes.

    Args:
        change: makes the change where it is entered, and undoes it where it is left, in any thread.

    >>> silent = ProcessWide(warnings_ignored)
    >>> with silent.held():
    ...     warnings.warn("nobody hears this")
    """

    def __init__(self, change: Callable[[], AbstractContextManager[object]]) -> None:
        self._change = change
        self._lock = RLock()
        self._holders = 0
        self._made: AbstractContextManager[object]

    @contextmanager
    def held(self) -> Iterator[None]:
        """The change is made inside the block, whoever else is inside."""
        with self._lock:
            if self._holders == 0:
                made = self._change()
                made.__enter__()
                self._made = made
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if self._holders == 0:
                    self._made.__exit__(None, None, None)


@contextmanager
def fast_path_off() -> Iterator[None]:
    """Multi-head attention and encoder layers call the operations that they consist of."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def warnings_ignored() -> Iterator[None]:
    """No warning is heard."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


_FAST_PATH = ProcessWide(fast_path_off)
_PRODUCTS = ProcessWide(lambda: sdpa_kernel(SDPBackend.MATH))
_WARNINGS = ProcessWide(warnings_ignored)


def without_fast_path() -> AbstractContextManager[None]:
    """Multi-head attention hides no product inside the block."""
    return _FAST_PATH.held()


def attention_in_products() -> AbstractContextManager[None]:
    """`scaled_dot_product_attention` multiplies, scales and sums inside the block; there is no kernel for all of it."""
    return _PRODUCTS.held()


def without_warnings() -> AbstractContextManager[None]:
    """No warning inside the block; where Python keeps filters per thread, in this one alone."""
    if getattr(sys.flags, "context_aware_warnings", False):
        return warnings_ignored()
    return _WARNINGS.held()
