"""The one timing loop: functions in turns, so that what else the machine does hits them alike."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from swan_surgery.costs.latency_table import NOISY
from swan_surgery.environment.machine import device_of, wait_for
from swan_surgery.models import Inputs


_WARM_UP = 3
_MIN_REPEATS = 3
_MAX_REPEATS = 200
_SECONDS_PER_MODEL = 2.0


@dataclass(frozen=True, slots=True)
class Latency:
    """Wall time of one forward pass: the median and the quartiles of `repeats` timed passes."""

    batch: int
    median_ms: float
    lower_quartile_ms: float
    upper_quartile_ms: float
    repeats: int

    @property
    def spread_ms(self) -> float:
        """The interquartile range."""
        return self.upper_quartile_ms - self.lower_quartile_ms

    @property
    def is_noisy(self) -> bool:
        """Whether the quartiles are more than a fifth of the median apart."""
        return self.spread_ms > NOISY * self.median_ms


def seconds_in_turns(
    passes: Sequence[Callable[[], object]],
    *,
    repeats: int = _MAX_REPEATS,
    seconds: float | None = None,
) -> list[list[float]]:
    """Wall seconds of each call of each function, after three calls that are not counted.

    Args:
        passes: functions that return when the device has done their work (`timed_pass`).
        repeats: rounds; in each of them every function runs once.
        seconds: no round starts after so many, but for the first three.
    """
    samples: list[list[float]] = [[] for _ in passes]
    with torch.no_grad():
        for run in passes:
            for _ in range(_WARM_UP):
                run()
        deadline = None if seconds is None else time.perf_counter() + seconds
        for done in range(repeats):
            if deadline and done >= _MIN_REPEATS and time.perf_counter() > deadline:
                break
            for own, run in zip(samples, passes, strict=True):
                start = time.perf_counter()
                run()
                own.append(time.perf_counter() - start)
    return samples


def latencies_in_turns(
    passes: Sequence[Callable[[], object]],
    batch: int,
    *,
    seconds_each: float = _SECONDS_PER_MODEL,
) -> list[Latency]:
    """Median and quartiles of functions timed in turns.

    Up to 200 rounds while the time lasts, and never fewer than 3; 30 take 2 s where a pass takes
    70 ms. Each latency says how many.
    """
    return latencies_of(seconds_in_turns(passes, seconds=seconds_each * len(passes)), batch)


def latencies_of(samples: Sequence[Sequence[float]], batch: int = 1) -> list[Latency]:
    """Median and quartiles of wall seconds."""
    found = []
    for own in samples:
        lower, median, upper = (float(q) * 1e3 for q in np.percentile(own, (25, 50, 75)))
        found.append(Latency(batch, median, lower, upper, len(own)))
    return found


def paired_latencies(
    runs: Sequence[tuple[nn.Module, Inputs]],
    batch: int,
    *,
    seconds_per_model: float = _SECONDS_PER_MODEL,
) -> list[Latency]:
    """Time models in turns; see `latencies_in_turns`."""
    return latencies_in_turns(
        [timed_pass(model, inputs, device_of(model)) for model, inputs in runs],
        batch,
        seconds_each=seconds_per_model,
    )


def timed_pass(
    forward: Callable[..., Any], inputs: Inputs, device: torch.device
) -> Callable[[], None]:
    """One forward pass, done when the device is: what `latencies_in_turns` takes."""
    own = inputs.copied()

    def run() -> None:
        wait_for(device)
        forward(*own.args, **own.kwargs)
        wait_for(device)

    return run
