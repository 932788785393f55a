"""What `calibrate_switch` found, and what it rests on."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Certificate:
    """How the thresholds of a routed model were set.

    Attributes:
        target: "harm", "share" or "macs": what was asked for; only "harm" comes with a guarantee.
        asked: its value.
        confidence: with what probability, over the draw of the samples, the harm is at most as asked; 0 without a
            guarantee.
        decide: how each switch decides.
        thresholds: an input whose score is at most this leaves.
        samples: how many were looked at.
        harmed: the sum of their losses at each switch; a count where losses are 0 or 1.
        bound: upper bound of the harm in all, at the confidence; 1 without a guarantee.
        shares: of the inputs that leave at each switch, and that take the full way.
        macs: mean MACs of one input, over those of the given model.
        data: SHA-256 of the samples, labels included.
        model: SHA-256 of the weights; after further training the certificate is of another model.
    """

    target: str
    asked: float
    confidence: float
    decide: tuple[str, ...]
    thresholds: tuple[float, ...]
    samples: int
    harmed: tuple[float, ...]
    bound: float
    shares: tuple[float, ...]
    macs: float
    data: str
    model: str

    def is_of(self, decide: Sequence[str], thresholds: Sequence[float]) -> bool:
        """Whether switches that decide in these ways, at these thresholds, are those that were looked at."""
        return (self.decide, self.thresholds) == (tuple(decide), tuple(thresholds))

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Certificate":
        """What `to_json` gave, with lists for tuples."""
        own: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
        }
        return cls(**own)

    def __str__(self) -> str:
        shares = ", ".join(f"{share:.1%}" for share in self.shares[:-1])
        head = f"{shares} of {self.samples:,} samples leave early ({'/'.join(self.decide)}), {self.macs:.1%} of the MACs"
        if self.target != "harm":
            return f"{head}; asked for {self.target}={self.asked:g}, no guarantee"
        return (
            f"{head}; harm <= {self.asked:g} with confidence {self.confidence:g} (seen: {sum(self.harmed):g} of "
            f"{self.samples:,}, upper bound {self.bound:.4f})"
        )
