"""What becomes of a read's output: the batch-norm behind it, and what it is added to (found by one dry run)."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from swan_surgery.cutting.compensation.reads import Key, Memory, Read, Region, Watching


aten = torch.ops.aten
Undo = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Chain:
    """The way of a read's output so far.

    Attributes:
        key: the read.
        number: of the operation that read.
        norm: the name of the running mean of the batch-norm it went through.
        undo: what brings a tensor of the way's shape back to the shape of the read's output.
    """

    key: Key
    number: int
    norm: str | None = None
    undo: tuple[Undo, ...] = ()

    def undone(self, x: Tensor) -> Tensor:
        """In the shape of the read's output; values stay."""
        for step in reversed(self.undo):
            x = step(x)
        return x


@dataclass(frozen=True, slots=True)
class Stream:
    """A read whose output, after `chain`, is added to what operation `partner` gave before it."""

    chain: Chain
    partner: int


class Following(Watching):
    """Runs a model once and finds, for every read, its batch-norm and its stream."""

    def __init__(self, memory: Memory) -> None:
        super().__init__(memory, after=self._remember)
        self.made: Any = WeakTensorKeyDictionary()  # tensor -> number of the operation
        self.chains: Any = WeakTensorKeyDictionary()  # tensor -> Chain
        self.norms: dict[Key, str] = {}
        self.streams: dict[Key, Stream] = {}
        self.regions: Counter[Region] = Counter()

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        number = self.number
        known = [self.chains.get(a) for a in args[:2] if isinstance(a, Tensor)]
        out = super().__torch_dispatch__(op, types, args, kwargs)
        first = out[0] if isinstance(out, (tuple, list)) and out else out
        if not isinstance(first, Tensor):
            return out
        if any(chain is not None for chain in known):
            self._follow(op, args, kwargs or {}, first)
        self.made[first] = number
        return out

    def _remember(self, found: object) -> None:
        if isinstance(found, Read):
            assert found.output is not None  # noqa: S101 - it has run
            self.regions[found.region] += 1
            self.chains[found.output] = Chain(found.key, self.number)

    def _follow(self, op: Any, args: Any, kwargs: dict[str, Any], out: Tensor) -> None:
        packet = op.overloadpacket
        if packet in (aten.add, aten.add_) and isinstance(args[1], Tensor):
            if kwargs.get("alpha", 1) == 1 and args[0].shape == args[1].shape == out.shape:
                self._meet(args[0], args[1])
                self._meet(args[1], args[0])
            self.chains.pop(out, None)
            return
        chain = self.chains.get(args[0]) if isinstance(args[0], Tensor) else None
        if chain is None or out is args[0]:
            self.chains.pop(out, None)  # written over
            return
        moved = _moved(chain, packet, args, self.memory)
        if moved is not None:
            self.chains[out] = moved
            if moved.norm is not None:
                self.norms[moved.key] = moved.norm

    def _meet(self, one: Tensor, two: Tensor) -> None:
        chain = self.chains.get(one)
        number = self.made.get(two)
        if chain is not None and number is not None and number < chain.number:
            self.streams[chain.key] = Stream(chain, number)


def _moved(chain: Chain, packet: Any, args: Any, memory: Memory) -> Chain | None:
    shape = args[0].shape
    if packet in (aten.view, aten._unsafe_view, aten.reshape, aten.unsqueeze, aten.squeeze):  # noqa: SLF001
        return replace(chain, undo=(*chain.undo, lambda x: x.reshape(shape)))
    if packet is aten.transpose:
        one, two = args[1:3]
        return replace(chain, undo=(*chain.undo, lambda x: x.transpose(one, two)))
    if packet is aten.permute:
        order = [d % len(shape) for d in args[1]]
        back = [order.index(i) for i in range(len(shape))]
        return replace(chain, undo=(*chain.undo, lambda x: x.permute(back)))
    if packet in (aten.clone, aten.detach, aten.alias):
        return chain
    if "batch_norm" in str(packet) and chain.norm is None:
        name = next((n for n in map(memory.buffer, args[3:5]) if n is not None), None)
        return None if name is None else replace(chain, norm=name)
    return None
