"""Free memory goes back to the system where its C library can do that, and nowhere else anything happens."""

import ctypes
import sys
import threading
from pathlib import Path

import pytest

from swan_surgery.environment.memory import _trim, hand_back


MIB = 2**20


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's own")
def test_what_a_thread_has_freed_is_handed_back() -> None:
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("another C library")
    hand_back()

    def work() -> None:
        pieces = [bytearray(b"x") * 50_000 for _ in range(2000)]
        last.append(pieces.pop())  # what lies behind the others keeps them in the thread's pool

    last: list[bytearray] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    before = resident()
    hand_back()
    assert before - resident() > 50 * MIB


@pytest.mark.parametrize("lacks", ["glibc", "Linux"])
def test_elsewhere_nothing_happens(monkeypatch, lacks) -> None:
    if lacks == "glibc":
        monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    else:
        monkeypatch.setattr(sys, "platform", "darwin")
    _trim.cache_clear()
    try:
        hand_back()
        assert _trim() is None
    finally:
        _trim.cache_clear()
