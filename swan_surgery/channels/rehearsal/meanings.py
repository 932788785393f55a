"""What the numbers among a call's arguments mean, and so what they become."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from swan_surgery.calls.functions import INFERRING, PARTING, SCALING, SHAPED
from swan_surgery.channels.labels.fields import axes_of
from swan_surgery.channels.labels.recording import Frame, OpRecord
from swan_surgery.channels.rehearsal.scaling import Scaled


# What a number becomes: the count of these labels that remain, always the same, or scaled.
New = Tensor | float | Scaled
Shrinks = Callable[[Tensor], bool]


def new_numbers(
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


def named_numbers(op: OpRecord, frame: Frame, shrinks: Shrinks) -> Mapping[int, New]:
    """Leaf -> new number of a call whose axes are named: lengths, behind the places that they have.

    `op`: the first operation of the call, which splits the axes.
    """
    full = frame.leaves
    own = [leaf for leaf, value in enumerate(full) if type(value) is int]
    half = len(own) // 2
    pairs = zip((int(full[place] or 0) for place in own[:half]), own[half:], strict=True)
    leaf_of = {axis: leaf for axis, leaf in pairs if axis >= 0}  # new axes lie nowhere yet
    sizes = op.shapes[0]
    fits = all(axis < len(sizes) and sizes[axis] == full[leaf] for axis, leaf in leaf_of.items())
    return _sizes(op, leaf_of, full, {}, shrinks) if fits else {}


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


__all__ = ["New", "Shrinks", "named_numbers", "new_numbers"]
