"""Time that a run may take: asked often, never exceeded."""

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path


class OutOfTimeError(Exception):
    """The minutes are over; what was going on counts for nothing."""


@dataclass(frozen=True)
class Clock:
    """`end` is the last moment, by `time.monotonic`."""

    end: float

    @classmethod
    def of(cls, seconds: float) -> "Clock":
        """From now on."""
        return cls(time.monotonic() + seconds)

    def left(self) -> float:
        """Seconds that are left; negative when they are over."""
        return self.end - time.monotonic()

    def within(self, seconds: float) -> "Clock":
        """A clock that ends after some seconds, or with this one if that is earlier."""
        return Clock(min(self.end, time.monotonic() + seconds))

    def check(self) -> None:
        """Raise when the time is over.

        Raises:
            OutOfTimeError: it is.
        """
        if self.left() < 0:
            raise OutOfTimeError


def seconds_since_start() -> float:
    """Since this process was started, imports included; 0 where /proc does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22, counted from the name on
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)


def end_process_at(clock: Clock) -> None:
    """Leave with exit code 0 when the clock ends, whatever runs: a compiler cannot be asked to stop.

    Safe at any moment, because result files are written whole or not at all.
    """

    def wait() -> None:
        time.sleep(max(0.0, clock.left()))
        print("the minutes are over", flush=True)
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
