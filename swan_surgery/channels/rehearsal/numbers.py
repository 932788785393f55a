"""Which numbers in a module's code repeat a width, and what they become when it shrinks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from swan_surgery.calls.functions import INFERRING, PARTING, RESIZABLE, SCALING, SHAPED, SHARING
from swan_surgery.calls.resizing import resize_
from swan_surgery.channels.labels.fields import axes_of
from swan_surgery.channels.labels.recording import Frame, OpRecord
from swan_surgery.channels.rehearsal.failures import Failure


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

    def write_(self, model: nn.Module, value: float) -> None:
        """Replace the number on a private copy."""
        owner = model.get_submodule(self.module)
        call = (self.function, self.number)
        resize_(owner, call, self.leaf, value, training=self.training, site=self.site)


# What a number becomes: the count of these labels that remain, or always the same.
New = Tensor | float
Shrinks = Callable[[Tensor], bool]


@dataclass(slots=True)
class Resizes:
    """Numbers that are replaced; `tried` are operations where that was attempted, and their modules."""

    accepted: dict[Place, New] = field(default_factory=dict)
    tried: dict[tuple[bool, int], str] = field(default_factory=dict)

    def share_heads(self, op: OpRecord, *, training: bool) -> None:
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
        *,
        training: bool,
    ) -> bool:
        """Replace what did not follow at an operation; False if that cannot help, or did not.

        `twins` are the operations of the other mode, which gets the same where it made the same call.
        `shrinks` says whether any of some labels may go: other sizes (of a batch, say) stay the code's.
        """
        place = (training, failure.index)
        frame = op.frame
        if frame is None or frame.function not in RESIZABLE or place in self.tried:
            return False
        self.tried[place] = frame.module
        new = _numbers(op, frame, failure.leaves, shrinks)
        for leaf, value in new.items():
            key = Place(frame.module, frame.function, frame.number, leaf, training, frame.site)
            self.accepted[key] = value
            if any(_is_twin(frame, twin, leaf) for twin in twins):
                self.accepted.setdefault(replace(key, training=not training), value)
        return bool(new)

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


def _is_twin(frame: Frame, twin: OpRecord, leaf: int) -> bool:
    other = twin.frame
    return (
        other is not None
        and frame.is_same_call(other)
        and other.site == frame.site
        and len(other.leaves) == len(frame.leaves)
        and other.leaves[leaf] == frame.leaves[leaf]
    )


def _numbers(
    op: OpRecord, frame: Frame, seen: tuple[float | None, ...], shrinks: Shrinks
) -> Mapping[int, New]:
    """Leaf -> new number, by what the function's numbers mean.

    `seen` are the numbers that the narrower model's own code computed.
    """
    full = frame.leaves
    if len(seen) != len(full):
        return {}
    own = [leaf for leaf, value in enumerate(full) if type(value) is int]
    changed = {leaf: full[leaf] for leaf in range(len(full)) if seen[leaf] != full[leaf]}
    if frame.function in SCALING:
        return changed
    if frame.function in SHAPED:
        if len(own) != len(op.shapes[0]):
            return {}
        sizes = _sizes(op, dict(enumerate(own)), full, changed, shrinks)
        return _inferred(sizes, full, batch=own[0]) if frame.function in INFERRING else sizes
    if frame.function in PARTING:
        parts = own[1:]
        first = int(full[own[0]] or 0) % (len(op.shapes[0]) - len(parts) + 1)
        return _sizes(op, {first + i: leaf for i, leaf in enumerate(parts)}, full, changed, shrinks)
    return _lengths(op, own, full, shrinks)


def _sizes(
    op: OpRecord,
    leaf_of: Mapping[int, int],
    full: tuple[float | None, ...],
    changed: Mapping[int, float],
    shrinks: Shrinks,
) -> dict[int, New]:
    """Every number is the size of one axis of the result."""
    vectors = {
        axes_of(f)[0]: f.reshape(-1)
        for f in op.outputs[0]
        if len(axes_of(f)) == 1 and shrinks(f.reshape(-1))
    }
    new: dict[int, New] = {}
    for axis, leaf in leaf_of.items():
        if full[leaf] == -1:
            continue
        if axis in vectors:
            new[leaf] = vectors[axis]
        elif leaf in changed:
            new[leaf] = changed[leaf]
    return new


def _inferred(
    sizes: dict[int, New], full: tuple[float | None, ...], *, batch: int
) -> Mapping[int, New]:
    """One size that would be fixed had better be inferred: it may be another tomorrow.

    That is the size of a batch, as a rule; or it is that of an axis which holds heads times the batch
    (the first one, whose leaf is `batch`), or channels times pixels.
    """
    if -1 in full:
        # Heads times the batch would have to be a number of this batch.
        return {} if isinstance(sizes.get(batch), Tensor) else sizes
    fixed = [leaf for leaf, new in sizes.items() if not isinstance(new, Tensor)]
    products = [
        leaf
        for leaf, new in sizes.items()
        if isinstance(new, Tensor) and len(torch.unique(new)) < len(new)
    ]
    if isinstance(sizes.get(batch), Tensor):
        fixed = [batch]
    candidates = fixed or products
    if len(candidates) == 1:
        sizes[candidates[0]] = -1
    return sizes


def _lengths(
    op: OpRecord, own: list[int], full: tuple[float | None, ...], shrinks: Shrinks
) -> Mapping[int, New]:
    """The numbers of a split: one length for all pieces, or one for each; the axis comes last."""
    fits = [a for a, size in enumerate(op.shapes[0]) if size == full[own[0]]]
    if not fits:
        return {}
    labelled = {axes_of(f)[0] for f in op.outputs[0] if len(axes_of(f)) == 1}
    axis = next((a for a in fits if a in labelled), fits[0])
    vectors = []
    for fields in op.outputs:
        vector = next((f.reshape(-1) for f in fields if axes_of(f) == (axis,)), None)
        vectors.append(None if vector is None or not shrinks(vector) else vector)
    sizes = [shape[axis] for shape in op.shapes]
    if [full[leaf] for leaf in own[: len(sizes)]] == sizes and len(own) >= len(sizes) > 1:
        return {leaf: v for leaf, v in zip(own, vectors, strict=False) if v is not None}
    return {} if vectors[0] is None else {own[0]: vectors[0]}


def resize_all_(model: nn.Module, resizes: Mapping[Place, New], stays: Tensor) -> None:
    """Replace numbers on a private copy; `stays[label]` says which labels remain."""
    for place, new in resizes.items():
        value = (
            int(torch.count_nonzero(stays[new.clamp(min=0)])) if isinstance(new, Tensor) else new
        )
        place.write_(model, value)
