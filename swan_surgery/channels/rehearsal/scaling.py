"""Numbers in a module's code that scale with the inputs as well as with a width: `C * H * W`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from swan_surgery.calls.arguments import Factor, same_number
from swan_surgery.channels.labels.fields import axes_of
from swan_surgery.channels.solving.mapping import Trace


_POWERS = (1, 0.5, 2, -1, -0.5, -2)


@dataclass(frozen=True, slots=True)
class Scaled:
    """What the code computes, times a power of the share of these labels that are gone.

    So `C * H * W` stays what it was at every size of an image.
    """

    labels: Tensor
    power: float

    def factor(self, remaining: int) -> Factor:
        """The factor where so many labels remain."""
        return Factor((self.labels.numel() / max(remaining, 1)) ** self.power)


Shrinks = Callable[[Tensor], bool]
Scale = Callable[[float, float], Scaled | None]


def scale_at(trace: Trace, index: int, shrinks: Shrinks, remains: Tensor) -> Scale:
    """How a number in front of an operation may depend on the widths that its module met so far."""

    def scaled(full: float, seen: float) -> Scaled | None:
        module = trace.recording.ops[index].module
        known: set[bytes] = set()
        for op in reversed(trace.recording.ops[: index + 1]):
            for field in (f for own in (*op.inputs, *op.outputs) for f in own):
                labels = field.reshape(-1)
                if op.module != module or len(axes_of(field)) != 1 or not shrinks(labels):
                    continue
                if (key := labels.numpy().tobytes()) not in known:
                    known.add(key)
                    if (found := _power(full, seen, labels, remains)) is not None:
                        return found
        return None

    return scaled


def _power(full: float, seen: float, labels: Tensor, remains: Tensor) -> Scaled | None:
    """The power of a width by which a number shrank with it; None if there is no such power."""
    left = int(torch.count_nonzero(remains[labels.clamp(min=0)]))
    if left in (0, labels.numel()):
        return None
    found = (Scaled(labels, power) for power in _POWERS)
    return next((new for new in found if same_number(new.factor(left).times(seen), full)), None)
