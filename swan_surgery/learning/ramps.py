"""When a penalty sets in: the delayed cosine ramp of the paper."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import cos, pi

from swan_surgery.errors import InputError


@dataclass(frozen=True, slots=True)
class CosineRamp:
    """The delayed cosine ramp of Eq. 14: 0 until `delay`, 1 from `delay + length` on (epochs).

    Example:
        >>> ramp = CosineRamp(delay=2, length=4)
        >>> [round(ramp(t), 3) for t in (0, 2, 4, 6, 9)]
        [0.0, 0.0, 0.5, 1.0, 1.0]
    """

    delay: float = 0.0
    length: float = 0.0

    def __post_init__(self) -> None:
        """Refuse negative times."""
        if self.delay < 0 or self.length < 0:
            raise InputError(f"delay and length must not be negative; got {self}")

    def __call__(self, epoch: float) -> float:
        """The factor at a (fractional) epoch, in [0, 1]."""
        if epoch <= self.delay:
            return 0.0
        if self.length == 0:
            return 1.0
        return 0.5 * (1 - cos(pi * min(1.0, (epoch - self.delay) / self.length)))


def in_full(epoch: float) -> float:  # noqa: ARG001 - a ramp like any other
    """The factor of a term without a ramp: 1, from the first step on."""
    return 1.0


def ramps_of(
    terms: Sequence[str], ramp: CosineRamp | Mapping[str, CosineRamp] | None
) -> dict[str, Callable[[float], float]]:
    """One ramp per term, from one for all, a mapping, or nothing (in full from the start).

    Raises:
        InputError: the mapping names something that is no term.
    """
    if ramp is None or isinstance(ramp, CosineRamp):
        return dict.fromkeys(terms, ramp or in_full)
    unknown = sorted(set(ramp) - set(terms))
    if unknown:
        raise InputError(f"ramp has no term {unknown[0]!r}; terms are {', '.join(terms)}")
    return {name: ramp.get(name, in_full) for name in terms}
