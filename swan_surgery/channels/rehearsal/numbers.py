"""Which numbers in a module's code repeat a width, and what they become when it shrinks."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from swan_surgery.calls.arguments import Replacement
from swan_surgery.calls.functions import (
    NAMED,
    RESIZABLE,
    SCALING,
    SHAPED,
    SHARING,
)
from swan_surgery.calls.resizing import resize_
from swan_surgery.channels.labels.fields import axes_of
from swan_surgery.channels.labels.recording import Frame, OpRecord, Recording
from swan_surgery.channels.rehearsal.failures import Failure
from swan_surgery.channels.rehearsal.meanings import New, Shrinks, named_numbers, new_numbers
from swan_surgery.channels.rehearsal.scaling import Scale, Scaled
from swan_surgery.channels.solving.mapping import Trace


_BY_HEAD = 4  # the rank of [B, L, H, D]


@dataclass(frozen=True, slots=True)
class Place:
    """One number among the arguments of one call of a torch function in a module's code."""

    module: str
    function: str
    number: int
    leaf: int
    training: bool
    site: str = ""

    def write_(self, model: nn.Module, value: Replacement) -> None:
        """Replace the number on a private copy."""
        owner = model.get_submodule(self.module)
        call = (self.function, self.number)
        resize_(owner, call, self.leaf, value, training=self.training, site=self.site)


# A call in the code of a module, and where it stands.
_Site = tuple[tuple[str, str, int], str]


@dataclass(slots=True)
class Resizes:
    """Numbers that are replaced; `tried` are operations where that was attempted, and their modules.

    `recordings` are of full width, at all sizes of the inputs that were run.
    """

    recordings: Sequence[Recording]
    accepted: dict[Place, New] = field(default_factory=dict)
    tried: dict[tuple[int, int], str] = field(default_factory=dict)
    _calls: dict[int, dict[_Site, set[tuple[Any, ...]]]] = field(default_factory=dict)

    def share_all_heads(self, traces: Sequence[Trace]) -> None:
        """Let the numbers of heads of all calls follow."""
        for trace in traces:
            for op in trace.recording.ops:
                self._share_heads(op, training=trace.training)

    def _share_heads(self, op: OpRecord, *, training: bool) -> None:
        """Let the number of heads of a call follow: torch's own form of it would derive their width."""
        frame = op.frame
        if frame is None or frame.function not in SHARING:
            return
        is_by_head = bool(op.shapes) and len(op.shapes[0]) == _BY_HEAD
        fields = op.outputs[0] if is_by_head else ()
        heads = next((f.reshape(-1) for f in fields if axes_of(f) == (_BY_HEAD - 2,)), None)
        if heads is None:
            return
        # The width to check may be the same number; the form that runs then does not look at it.
        for leaf, value in enumerate(frame.leaves):
            if type(value) is int and value == len(heads):
                place = Place(*frame.call, leaf, training, frame.site)
                self.accepted.setdefault(place, heads)

    def try_on(
        self,
        op: OpRecord,
        failure: Failure,
        twins: Sequence[OpRecord],
        shrinks: Shrinks,
        scale: Scale,
        trace: Trace,
    ) -> bool:
        """Replace what did not follow at an operation; False if that cannot help, or did not.

        `twins` are the operations of the other mode, which gets the same where it made the same call.
        `shrinks` says whether any of some labels may go: other sizes (of a batch, say) stay the code's.
        `scale` says how a number that is another at other sizes of the inputs follows a width.
        """
        place, training = (trace.number, failure.index), trace.training
        frame = op.frame
        if frame is None or frame.function not in RESIZABLE or place in self.tried:
            return False
        self.tried[place] = frame.module
        if trace.is_elsewhere and not self._is_made_here(frame):
            return False  # a number of a call that is not made at the given size has no place
        if frame.function in NAMED:
            first = next(own for own in trace.recording.ops if own.frame is frame)
            new = dict(named_numbers(first, frame, shrinks))
        else:
            new = dict(new_numbers(op, frame, failure.leaves, shrinks))
        for leaf, value in new.items():
            if isinstance(value, Tensor) or value == -1 or self._is_steady(frame, leaf):
                continue
            scaled = scale(frame.leaves[leaf], failure.leaves[leaf]) if _scales(frame) else None
            if scaled is None:
                return False
            new[leaf] = scaled
        for leaf, value in new.items():
            key = Place(frame.module, frame.function, frame.number, leaf, training, frame.site)
            self.accepted[key] = value
            if any(_is_twin(frame, twin, leaf) for twin in twins):
                self.accepted.setdefault(replace(key, training=not training), value)
        return bool(new)

    def _is_made_here(self, frame: Frame) -> bool:
        """Whether the given size makes the same call."""
        return (frame.call, frame.site) in self._calls_of(self.recordings[0])

    def moves(self, op: OpRecord, failure: Failure) -> bool:
        """Whether a number that did not stay is another at other sizes of the inputs."""
        frame = op.frame
        if frame is None or len(failure.leaves) != len(frame.leaves):
            return False
        pairs = enumerate(zip(frame.leaves, failure.leaves, strict=True))
        return any(
            full != seen and not self._is_steady(frame, leaf) for leaf, (full, seen) in pairs
        )

    def _is_steady(self, frame: Frame, leaf: int) -> bool:
        """Whether a call was given the same number in all runs, at whatever size."""
        place = frame.call, frame.site
        given = (leaves for own in self.recordings for leaves in self._calls_of(own).get(place, ()))
        return all(len(own) > leaf and own[leaf] == frame.leaves[leaf] for own in given)

    def _calls_of(self, recording: Recording) -> Mapping[_Site, set[tuple[Any, ...]]]:
        """The numbers of every call of a recording, by call and place in the code."""
        found = self._calls.get(id(recording))
        if found is None:
            found = self._calls[id(recording)] = defaultdict(set)
            for frame in (op.frame for op in recording.ops if op.frame is not None):
                found[frame.call, frame.site].add(frame.leaves)
        return found

    def forget(self, module: str) -> None:
        """Drop what was learned about a module while one of its attributes was guessed wrongly."""
        self.accepted = {
            key: new
            for key, new in self.accepted.items()
            if key.module != module or key.function in SHARING  # those were no guess
        }
        self.tried = {place: own for place, own in self.tried.items() if own != module}


def is_explained_by_attributes(op: OpRecord, failure: Failure) -> bool:
    """Whether a number that stayed as it was is all that is wrong with a call."""
    frame = op.frame
    if frame is None or frame.function not in SHAPED or len(failure.leaves) != len(frame.leaves):
        return True
    vectors = {axes_of(f)[0] for f in op.outputs[0] if len(axes_of(f)) == 1}
    if 0 in vectors:
        return (
            True  # heads in the batch: the number is a multiple of one that an attribute may hold
        )
    own = [leaf for leaf, value in enumerate(frame.leaves) if type(value) is int]
    if len(own) != len(op.shapes[0]):
        return True
    stayed = [failure.leaves[leaf] == frame.leaves[leaf] for leaf in own]
    return any(stayed[axis] for axis in vectors) and all(
        same for axis, same in enumerate(stayed) if axis not in vectors
    )


def _scales(frame: Frame) -> bool:
    return frame.function in SCALING


def _is_twin(frame: Frame, twin: OpRecord, leaf: int) -> bool:
    other = twin.frame
    return (
        other is not None
        and frame.is_same_call(other)
        and other.site == frame.site
        and len(other.leaves) == len(frame.leaves)
        and other.leaves[leaf] == frame.leaves[leaf]
    )


def resize_all_(model: nn.Module, resizes: Mapping[Place, New], stays: Tensor) -> None:
    """Replace numbers on a private copy; `stays[label]` says which labels remain."""
    for place, new in resizes.items():
        if isinstance(new, (Tensor, Scaled)):
            labels = new if isinstance(new, Tensor) else new.labels
            remaining = int(torch.count_nonzero(stays[labels.clamp(min=0)]))
            place.write_(model, remaining if isinstance(new, Tensor) else new.factor(remaining))
        else:
            place.write_(model, new)
