"""Where a model has activations, as data: what runs there, on which axes, and why not, if it stays."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Axes:
    """Axes of what an activation is given.

    Attributes:
        channels: the axis along which channels lie.
        samples: the axis that grows with the batch; None where nothing does (a table of positions).
    """

    channels: int
    samples: int | None

    def of_positions(self, ndim: int) -> tuple[int, ...]:
        """All others: pixels, tokens."""
        return tuple(a for a in range(ndim) if a not in (self.channels, self.samples))


@dataclass(frozen=True, slots=True)
class Place:
    """One activation of a model.

    Attributes:
        name: of the module that is swapped, or that is put there for a call.
        owner: the module that runs it.
        function: the torch function that is called, or the class of the module.
        site: where in the code the function is called; "" for a module.
        time: which call at this place in one run of `owner`, from 1 on; 0 for a module.
        settings: of the function.
        channels: how many there are; 0 where no axis of channels is known.
        axes: None where `channels` is 0.
        why_no_axis: then in words.
    """

    name: str
    owner: str
    function: str
    site: str = ""
    time: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    channels: int = 0
    axes: Axes | None = None
    why_no_axis: str = ""

    @property
    def is_call(self) -> bool:
        """Whether it is a call of a function; else a module."""
        return self.time > 0

    @property
    def leaf(self) -> str:
        """The name within the module that holds it."""
        return self.name.rpartition(".")[2]

    @property
    def holder(self) -> str:
        """The module that holds it."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class Kept:
    """An activation that stays as it is, and why."""

    name: str
    function: str
    why: str
