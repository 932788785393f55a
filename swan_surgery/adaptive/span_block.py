"""A feed-forward layer whose tokens choose in passing: in its linear layers, wherever these stand in a module."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from swan_surgery.adaptive.graphs import is_exporting, rows_where
from swan_surgery.adaptive.matrices import matrix_of
from swan_surgery.adaptive.own_hooks import own_hooks
from swan_surgery.adaptive.rows import Rows
from swan_surgery.adaptive.run import Levels, Run, running
from swan_surgery.adaptive.token_block import TokenBlock, runs_of
from swan_surgery.adaptive.unit_gates import UnitGates
from swan_surgery.adaptive.units import GroupUnits, Shells
from swan_surgery.errors import PathError


class SpanBlock(TokenBlock):
    """The module around the layer runs as it is; only what its neurons are written and read by chooses.

    What lies between runs on the neurons that tokens have open and on no others, side by side in one row: it must
    take each by itself, which `adapt` tries out.

    Attributes:
        writers: the linear layers that write the neurons, as named inside the module; all get the same tokens.
        is_flat: whether they get all tokens of one sample after the other, [tokens, features], as OPT's do.
        samples: of the last run.
        runs: how many are under way, in all threads.
    """

    def __init__(
        self,
        name: str,
        full: nn.Module,
        shells: Shells,
        group: GroupUnits,
        sizes: Sequence[int],
        *,
        effort: UnitGates,
        rows: Rows,
        writers: Sequence[str],
        is_flat: bool,
    ) -> None:
        super().__init__(name, full, shells, group, sizes, effort=effort, rows=rows)
        self.writers = tuple(writers)
        self.is_flat = is_flat
        self.samples: int | None = None
        self.runs = 0
        self._before: dict[Any, Any] = {}

    @property
    def entry(self) -> nn.Module:
        """The layer whose inputs are looked at."""
        return self.full.get_submodule(self.writers[0])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own forward, every token as it chooses."""
        with ExitStack() as stack:
            passing = _Passing(self, running(), stack)
            own = stack.enter_context(own_hooks())
            for name in self.writers:
                # A hook also keeps nn.TransformerEncoderLayer from a kernel that calls none of its layers.
                writer = self.full.get_submodule(name)
                hook = writer.register_forward_pre_hook(own(passing.look), with_kwargs=True)
                stack.callback(hook.remove)
            if not passing.is_masked:
                stack.enter_context(self._in_pieces(passing))
            return self.full(*args, **kwargs)

    @contextmanager
    def _in_pieces(self, passing: "_Passing") -> Iterator[None]:
        """Inside, the writers and the reader run pieces: in each thread those of the run that it makes."""
        token = _PASSING.set({**_PASSING.get(), id(self): passing})
        with _INSTALLING:
            if not self.runs:
                self._before = {layer: vars(layer).get("forward") for layer, _ in self._layers()}
                for layer, kind in self._layers():
                    layer.forward = partial(kind, self, layer)
            self.runs += 1
        try:
            yield
        finally:
            with _INSTALLING:
                self.runs -= 1
                if not self.runs:
                    for layer, before in self._before.items():
                        del layer.forward
                        if before is not None:  # somebody else's, as Accelerate puts there
                            layer.forward = before
                    self._before = {}
            _PASSING.reset(token)

    def _layers(self) -> list[tuple[Any, Callable[..., Tensor]]]:
        writers = [(self.full.get_submodule(name), _write) for name in self.writers]
        return [*writers, (self.full.get_submodule(self.reader), _read)]

    def by_sample(self, run: Run | None, call: Any) -> Any:
        """The call with the tokens of each sample on an axis of their own."""
        if not self.is_flat:
            return call
        leaves, shape = self.rows.leaves(call)
        tokens = leaves[self.rows.positions[0]]
        if run is not None:  # in backward, where there is none, as many as there were
            self.samples = run.samples
        known = self.samples
        samples = len(tokens) if not known or len(tokens) % known else known
        leaves[self.rows.positions[0]] = tokens.unflatten(0, (samples, -1))
        return tree_unflatten(leaves, shape)

    def _rows_of(self, masks: Tensor, x: Tensor) -> Tensor:
        if self.is_flat and masks.ndim > 1:
            masks = masks.flatten(0, -2)
            masks = masks.repeat_interleave(len(x) // len(masks), dim=0)
        return super()._rows_of(masks, x)

    def pieces(self, is_open: Tensor) -> list["_Piece"]:
        """Blocks of neurons and the tokens that run them; neighbours that all tokens run are one piece.

        Args:
            is_open: bool [tokens, blocks].
        """
        starts = [0]
        for size in self.sizes:
            starts.append(starts[-1] + size)
        places = is_open.T.contiguous()
        if is_exporting():
            open_at = [rows_where(own) for own in places.unbind()]
            parts = zip(starts, self.sizes, open_at, strict=False)
            return [_Piece(start, size, own, own.shape[0]) for start, size, own in parts]
        counts = places.sum(1).tolist()
        found = [
            _Piece(starts[part.start], starts[part.stop] - starts[part.start], None, len(is_open))
            for part in runs_of([count == len(is_open) for count in counts])
        ]
        tokens = places.nonzero()[:, 1].split(counts)
        for block, count in enumerate(counts):
            if 0 < count < len(is_open):
                found.append(_Piece(starts[block], self.sizes[block], tokens[block], count))
        return found


@dataclass(frozen=True, slots=True)
class _Piece:
    """Neurons `start` to `start + size`, of all tokens or of those at `tokens`."""

    start: int
    size: int
    tokens: Tensor | None
    count: int

    def of(self, rows: Tensor) -> Tensor:
        return rows if self.tokens is None else rows.index_select(0, self.tokens)


@dataclass
class _Passing:
    """One run of the module: the choice is made when the first of the writers is called."""

    block: SpanBlock
    run: Run | None
    stack: ExitStack
    choice: Levels | None = None
    closed: Tensor | None = None
    shape: tuple[int, ...] = ()
    pieces: list[_Piece] = field(default_factory=list)

    @property
    def is_masked(self) -> bool:
        execution = self.block.last_execution if self.run is None else self.run.execution
        return self.block.is_masked(execution)

    def look(self, _writer: nn.Module, args: Any, kwargs: Any) -> None:
        """Before a writer runs."""
        if self.choice is not None:
            return
        if self.block.rows.first((args, kwargs)).is_nested:
            raise PathError(
                f"block {self.block.name!r} gets a nested tensor, which nn.TransformerEncoder makes of padded batches "
                f"where no gradients are wanted, and whose tokens cannot be told apart: set use_nested_tensor = False "
                f"on the encoder (enable_nested_tensor=False where it is made)"
            )
        call = self.block.by_sample(self.run, (args, kwargs))
        self.choice = choice = self.block.chosen(self.run, call)
        if self.is_masked:
            seen = self.run is not None and self.run.execution == "observe"
            observer = self.block.observer if seen else None
            self.stack.enter_context(self.block.masked(choice, observer))
            return
        assert isinstance(choice, Tensor)  # noqa: S101 - masks are
        x = self.block.rows.first((args, kwargs))
        is_open = self.block.by_token(choice, x)
        if choice.ndim > 1 or not bool(is_open.all()):  # masks of tokens cost what they are said to
            self.closed, self.pieces = ~is_open, self.block.pieces(is_open)
            self.shape = tuple(x.shape[:-1])

    def write(self, writer: Any, x: Tensor) -> Tensor:
        """All pieces side by side, in one row."""
        matrix, tokens = matrix_of(writer), x.flatten(0, -2)
        parts = []
        for piece in self.pieces:
            weight = matrix.narrow(0, piece.start, piece.size)
            bias = writer.bias
            bias = None if bias is None else bias.narrow(0, piece.start, piece.size)
            parts.append(F.linear(piece.of(tokens), weight, bias).flatten())
        return torch.cat(parts)

    def read(self, reader: Any, x: Tensor) -> Tensor:
        """What they sum up to, and the mean of what is closed."""
        assert self.closed is not None  # noqa: S101 - there are pieces
        if x.shape != (sum(piece.count * piece.size for piece in self.pieces),):
            raise PathError(
                f"what lies between {self.block.writers[0]!r} and {self.block.reader!r} of block {self.block.name!r} "
                f"does not take each neuron by itself, as it did on the example inputs: it gives the shape "
                f'{tuple(x.shape)}; run it with execution="masked"'
            )
        means, matrix = self.block.mean_of_blocks(), matrix_of(reader)
        out = self.closed.to(means.dtype) @ means
        if reader.bias is not None:
            out = out + reader.bias
        parts = x.split([piece.count * piece.size for piece in self.pieces])
        kind = out.dtype
        for piece, part in zip(self.pieces, parts, strict=True):
            weight = matrix.narrow(1, piece.start, piece.size)
            given = F.linear(part.reshape(piece.count, piece.size), weight)
            kind = given.dtype
            if piece.tokens is None:
                out = out + given
            else:
                out = out.index_add_(0, piece.tokens, given.to(out.dtype))
        return out.to(kind).reshape(*self.shape, -1)


def _write(block: SpanBlock, writer: Any, input: Tensor) -> Tensor:  # noqa: A002 - as nn.Linear calls it
    passing = _PASSING.get().get(id(block))
    if passing is None or passing.closed is None:
        return F.linear(input, matrix_of(writer), writer.bias)
    return passing.write(writer, input)


def _read(block: SpanBlock, reader: Any, input: Tensor) -> Tensor:  # noqa: A002
    passing = _PASSING.get().get(id(block))
    if passing is None or passing.closed is None:
        return F.linear(input, matrix_of(reader), reader.bias)
    return passing.read(reader, input)


# The runs that this thread makes, by block.
_PASSING: ContextVar[dict[int, _Passing]] = ContextVar("swan_passing", default={})  # noqa: B039 - never changed
_INSTALLING = Lock()


__all__ = ["SpanBlock"]
