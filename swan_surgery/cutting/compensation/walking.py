"""Small model and reference side by side, one pass of all batches, stopping at every layer to mend it."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from swan_surgery.cutting.compensation.kept import Kept
from swan_surgery.cutting.compensation.layers import Call, Event, Layers, Settings, Side
from swan_surgery.cutting.compensation.lockstep import Pass
from swan_surgery.cutting.compensation.outcome import LayerCompensation
from swan_surgery.cutting.compensation.reads import Key, Read
from swan_surgery.errors import InputError


def in_lockstep(
    small: nn.Module,
    reference: nn.Module,
    calls: Sequence[Call],
    kept: Kept,
    settings: Settings,
    advance: Callable[[float], None] = lambda _: None,
) -> list[LayerCompensation]:
    """Solve for the small model's weights, in execution order; both models are in eval mode.

    `advance` is told after each layer which share of all reads is behind it.
    """
    sides = Side(small, calls[0]), Side(reference, calls[0])
    layers = Layers(sides, kept, settings)
    if layers.shared:
        # What is read more than once is solved for at its last read: others need that before.
        _walk(layers, calls, lambda share: advance(share / 2))
        layers.phase = "single"
        _walk(layers, calls, lambda share: advance((1 + share) / 2))
    else:
        _walk(layers, calls, advance)
    return layers.done


def _walk(layers: Layers, calls: Sequence[Call], advance: Callable[[float], None]) -> None:
    """One pass of all batches through both models."""
    reads = max(layers.sides[0].following.regions.total(), 1)
    met = 0
    sides, streams = layers.sides, layers.settings.streams
    here = sides[0].passes(calls, when="before", streams=streams)
    there = sides[1].passes(calls, when="after", streams=streams)
    try:
        while True:
            events = [own.next() for own in here]
            if events[0] is None:
                return
            keys = {event.key for event in events if event is not None}
            if len(keys) > 1:
                raise InputError(
                    "batches take different paths through the model (some lack an argument, or are of another size); "
                    "compensate with those of one kind; nothing was changed"
                )
            twins = [_advanced(own, events[0].key) for own in there]
            with torch.no_grad():
                layers.mend(events, twins)
            met += isinstance(events[0], Read)
            advance(met / reads)
            del events, twins
    finally:
        for own in (*here, *there):
            own.abandon()


def _advanced(own: Pass[Event], key: Key) -> Event | None:
    """The reference's event of the same key; None where it has none any more."""
    while (event := own.next()) is not None and event.key != key:
        pass
    return event
