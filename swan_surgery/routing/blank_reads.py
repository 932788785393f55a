"""What a run makes of blank tensors: which of its results depend on their values, and where its code reads them.

A rest that runs a model's code anew gets blanks for all that was computed in front of the switch. That its outputs come
out right on some inputs says little: a padding mask is the same for all inputs without padding. So what is computed
from blanks is followed, operation by operation.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


# Their results have the shapes of what they are given, and none of the values.
_SHAPES = {
    "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like",
    "new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided",
}  # fmt: skip
_READS = {"_local_scalar_dense", "is_nonzero", "equal"}
# The shapes of their results depend on values.
_DYNAMIC = {"nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim"}
# Read by Python itself, past the dispatcher.
_TAKEN_OUT = (Tensor.tolist, Tensor.numpy, Tensor.__array__)


class BlankReads:
    """Follows blanks through one run.

    Attributes:
        reads: how often code read a blank's value as a Python number before anything crossed.
        late: names of blanks whose values are read where it cannot be told what for: behind the switch, or as lists.
    """

    def __init__(self, flip: int | None = None) -> None:
        """`flip`: the read that is told another value."""
        self.reads, self.flip = 0, flip
        self.late: set[str] = set()
        self.has_crossed: Callable[[], bool] = lambda: False
        # By storage, which is kept so that no other takes its place.
        self._of: dict[int, tuple[Any, frozenset[str]]] = {}

    def mark(self, tensor: Tensor, names: frozenset[str]) -> None:
        """A tensor comes from blanks of these names."""
        storage = tensor.untyped_storage()
        self._of[storage._cdata] = (storage, names | self.names(tensor))  # noqa: SLF001 - as torch tells storages apart

    def names(self, *values: Any) -> frozenset[str]:
        """Of the blanks that values were computed from."""
        found: frozenset[str] = frozenset()
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                found |= self._of.get(leaf.untyped_storage()._cdata, (None, frozenset()))[1]  # noqa: SLF001
        return found

    def read(self, value: Any, names: frozenset[str]) -> Any:
        """What the code is told that reads a value."""
        if self.has_crossed():
            self.late |= names
            return value
        self.reads += 1
        if self.reads - 1 != self.flip:
            return value
        if isinstance(value, bool):
            return not value
        return type(value)(value + 1) if value == value else type(value)(1)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Inside, all operations are followed."""
        with _Functions(self), _Operations(self):
            yield


class _Operations(TorchDispatchMode):
    def __init__(self, reads: BlankReads) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self._blanks = reads

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        own = kwargs or {}
        names = self._blanks.names(args, own)
        found = op(*args, **own)
        name = str(op.overloadpacket).removeprefix("aten.")
        if not names or name in _SHAPES:
            return found
        if name in _READS:
            return self._blanks.read(found, names)
        if name in _DYNAMIC and self._blanks.has_crossed():
            self._blanks.late |= names
        written = [
            args[place]
            for place, argument in enumerate(op._schema.arguments[: len(args)])  # noqa: SLF001 - where torch says what is written
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        for leaf in tree_leaves((found, written)):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                self._blanks.mark(leaf, names)
        return found


class _Functions(TorchFunctionMode):
    def __init__(self, reads: BlankReads) -> None:
        super().__init__()
        self._blanks = reads

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _TAKEN_OUT:
            self._blanks.late |= self._blanks.names(args)
        return func(*args, **(kwargs or {}))


__all__ = ["BlankReads"]
