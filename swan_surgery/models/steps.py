"""What was done to a model since it was given, step by step, each of which can be done again.

A step is data: its kind, the version of that data, and the data. What does it to a fresh model is
registered by the room that makes such steps (`cutting` registers "cut"), so that whoever walks them
knows none by name.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from swan_surgery.errors import ArtifactError


Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class StepMacs:
    """The MACs of a model before and after a step, at example inputs of some shapes."""

    before: int
    after: int
    input_shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One thing done to a model.

    Attributes:
        kind: what was done, as in "cut".
        version: of `data`; each kind counts its own.
        data: plain JSON, read by what is registered for the kind.
        macs: None where nobody could count them; of a step that changes none, the same before and after.
    """

    kind: str
    version: int
    data: Mapping[str, Any] = field(default_factory=dict)
    macs: StepMacs | None = None


@dataclass(frozen=True, slots=True)
class StepKind:
    """How steps of one kind are done again.

    Attributes:
        version: the newest version of the data that is understood; older ones are too.
        apply: (private or fresh model, step) -> the model after it; tensors hold any values, those of
            the file come later. Refuses data that no honest step has.
        reshape: (shapes of all tensors, step) -> shapes after it.
    """

    version: int
    apply: Callable[[nn.Module, Step], nn.Module]
    reshape: Callable[[Shapes, Step], Shapes]


_KINDS: dict[str, StepKind] = {}


def register_step(name: str, kind: StepKind) -> None:
    """Say how steps of a kind are done again; each kind once.

    Raises:
        ValueError: the kind is registered already.
    """
    if name in _KINDS:
        raise ValueError(f"steps of kind {name!r} are registered already")
    _KINDS[name] = kind


def check_steps(steps: Iterable[Step], *, written_by: str) -> None:
    """Refuse steps that this version cannot do.

    Raises:
        ArtifactError: names the step, and the version of the library that wrote it.
    """
    for step in steps:
        known = _KINDS.get(step.kind)
        if known is None or step.version > known.version:
            knows = ", ".join(
                f"{name!r} up to {own.version}" for name, own in sorted(_KINDS.items())
            )
            raise ArtifactError(
                f"a step of kind {step.kind!r}, version {step.version}, was written by swan_surgery "
                f"{written_by}; this version knows {knows}: upgrade to {written_by} or newer"
            )


def apply_step(model: nn.Module, step: Step) -> nn.Module:
    """Do a step, of a kind that `check_steps` let pass, to a fresh model."""
    return _KINDS[step.kind].apply(model, step)


def shapes_after(shapes: Shapes, steps: Iterable[Step]) -> Shapes:
    """The shapes that steps leave of a model's tensors."""
    for step in steps:
        shapes = _KINDS[step.kind].reshape(shapes, step)
    return shapes


__all__ = [
    "Shapes",
    "Step",
    "StepKind",
    "StepMacs",
    "apply_step",
    "check_steps",
    "register_step",
    "shapes_after",
]
