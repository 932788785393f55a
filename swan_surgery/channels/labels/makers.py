"""Which operation of a run made a tensor, and so what a function or a module returned."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten

from swan_surgery.channels.labels.recording import Returned


class Makers:
    """The maker of every tensor of a run: the number of an operation, and of its output."""

    def __init__(self) -> None:
        # Tensors are kept, so that their identity stays their own.
        self._made: dict[int, tuple[Tensor, tuple[int, int]]] = {}

    def note(self, tensors: Sequence[Tensor], index: int) -> None:
        """Operation `index` returned these tensors."""
        for number, tensor in enumerate(tensors):
            self.note_as(tensor, (index, number))

    def note_as(self, tensor: Tensor, place: tuple[int, int]) -> None:
        """A tensor stands for this output."""
        self._made[id(tensor)] = (tensor, place)

    def note_twin(self, source: Tensor, copy: Tensor) -> None:
        """A detached or cloned tensor has the maker of its source."""
        if id(source) in self._made:
            self._made[id(copy)] = (copy, self._made[id(source)][1])

    def of(self, tensor: Tensor) -> tuple[int, int] | None:
        """The maker of a tensor; None for one that no operation made."""
        entry = self._made.get(id(tensor))
        return None if entry is None else entry[1]

    def returned(self, out: Any) -> Returned | None:
        """What was returned, in terms of operations; None where it holds anything else."""
        leaves, spec = tree_flatten(out)
        made = [self.of(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves]
        known = tuple(place for place in made if place is not None)
        return Returned(spec, known) if known and len(known) == len(made) else None
