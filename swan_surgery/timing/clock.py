"""Modules timed in turns, in the runtime that a table is made for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn

from swan_surgery.environment.machine import wait_for
from swan_surgery.models import Inputs
from swan_surgery.timing.loop import Latency, latencies_of, seconds_in_turns
from swan_surgery.timing.runtimes import forward_pass


# Compiling takes minutes per layer.
LayerRuntime = Literal["eager", "onnxruntime"]
SHARES = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True)
class Clock:
    """Where and how often things are timed."""

    runtime: LayerRuntime
    device: torch.device
    repeats: int

    @property
    def shares(self) -> tuple[float, ...]:
        """Of a layer's width, to time it at; a bilinear cost needs two."""
        return SHARES if self.runtime == "eager" else SHARES[1::2]

    def run_of(self, module: nn.Module, calls: Sequence[Inputs]) -> Callable[[], object]:
        """A module run on each of some inputs, as a function that returns when the device is done."""
        if self.runtime == "onnxruntime":
            passes = [forward_pass(module, inputs, self.runtime) for inputs in calls]
        else:
            passes = [partial(module, *own.args, **own.kwargs) for own in map(Inputs.copied, calls)]

        def run() -> None:
            wait_for(self.device)
            for one in passes:
                one()
            wait_for(self.device)

        return run


def times(modules: Sequence[tuple[nn.Module, Sequence[Inputs]]], clock: Clock) -> list[Latency]:
    """Modules timed in turns, each called with all of its inputs."""
    runs = [clock.run_of(module, calls) for module, calls in modules]
    return latencies_of(seconds_in_turns(runs, repeats=clock.repeats))


__all__ = ["SHARES", "Clock", "LayerRuntime", "times"]
