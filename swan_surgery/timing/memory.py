"""Memory of a forward pass: the most bytes alive at once in what it makes."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from swan_surgery.models import Inputs


class _Watch(TorchDispatchMode):
    """Adds up the storages that operations make, and takes each off when it is freed."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch does not annotate it
        # By identity: torch hands out the same Python object for a storage as long as it lives.
        self._seen = WeakIdKeyDictionary(ref_type=weakref.ref)
        for tensor in known:
            self._seen[tensor.untyped_storage()] = True
        self._alive = 0
        self.peak: int = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._take_in(leaf.untyped_storage())
        self.peak = max(self.peak, self._alive)
        return result

    def _take_in(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen[storage] = True
        size = storage.nbytes()
        self._alive += size
        weakref.finalize(storage, self._release, size).atexit = False

    def _release(self, size: int) -> None:
        self._alive -= size


def peak_activation_bytes(model: nn.Module, inputs: Inputs) -> int:
    """Most bytes alive at once in tensors that one forward pass makes; see `Figures`."""
    leaves = tree_leaves((inputs.args, dict(inputs.kwargs)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    watch = _Watch([*model.parameters(), *model.buffers(), *tensors])
    with torch.no_grad(), watch:
        model(*inputs.args, **inputs.kwargs)
    return watch.peak
