"""The figures of a report as frozen data: names and numbers only, every number with its unit."""

from dataclasses import dataclass

from swan_surgery.timing.loop import Latency


def to_flops(macs: int) -> int:
    """FLOPs of a number of MACs: one multiply-add is one MAC and two FLOPs."""
    return 2 * macs


@dataclass(frozen=True, slots=True)
class Figures:
    """What one model costs on the example inputs.

    Attributes:
        model: name of the class.
        macs: multiply-adds of one forward pass over the example inputs, batch included.
        params: parameters, a tied one once.
        size_bytes: parameters and persistent buffers, as `state_dict` would hold them.
        peak_activation_bytes: most bytes alive at once in tensors made during a forward pass.
            Measured by watching every operation's outputs in eval mode without gradients; the
            weights, the inputs and scratch memory inside an operation are not in it.
        latencies: at the given batch, and at batch 1.
        accuracy: what `evaluate(model)` gave, in its own unit; None without an evaluator.
        uncounted_ops: operations that may multiply and add but that the MAC counter has no
            formula for, with the number of calls.
    """

    model: str
    macs: int
    params: int
    size_bytes: int
    peak_activation_bytes: int
    latencies: tuple[Latency, ...]
    accuracy: float | None
    uncounted_ops: tuple[tuple[str, int], ...]

    @property
    def flops(self) -> int:
        """Twice the MACs."""
        return to_flops(self.macs)


@dataclass(frozen=True, slots=True)
class LayerFigures:
    """Width and cost of one layer; a module that owns MACs but no channels has no widths."""

    in_channels: int | None
    out_channels: int | None
    macs: int
    params: int


@dataclass(frozen=True, slots=True)
class LayerChange:
    """One layer before and after; None where it is missing."""

    name: str
    before: LayerFigures | None
    after: LayerFigures | None
