"""A feed-forward layer whose tokens run blocks of neurons of their own, on views of its weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from swan_surgery.adaptive.block import with_tensors
from swan_surgery.adaptive.free_block import FreeBlock
from swan_surgery.adaptive.graphs import is_exporting, rows_where
from swan_surgery.adaptive.levels import mean_outputs
from swan_surgery.adaptive.masked import Observer
from swan_surgery.adaptive.matrices import is_turned, matrix_of
from swan_surgery.adaptive.own_hooks import own_hooks
from swan_surgery.adaptive.rows import Rows
from swan_surgery.adaptive.run import Levels
from swan_surgery.adaptive.unit_gates import UnitGates
from swan_surgery.adaptive.units import GroupUnits, Shells


# What an open token weighs in the means of closed ones.
_HARDLY = 1e-6


class TokenBlock(FreeBlock):
    """A feed-forward layer of the given model with a gate per block of neurons and token.

    Attributes:
        effort: the gates: a linear reading of the token itself.
        sizes: neurons in each block; they lie side by side.
        views: blocks of neurons that lie side by side as modules of views, made when they are first needed, once
            `compact` has said so; `means`: what the mean of each block adds.
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
    ) -> None:
        super().__init__(name, full, shells, [group], effort=effort, rows=rows, channels_last=True)
        self.sizes = tuple(sizes)
        _lay_by_input_(full.get_submodule(self.reader))
        self.views: dict[tuple[int, int], nn.Module] | None = None
        self.means: Tensor | None = None

    @property
    def reader(self) -> str:
        """The layer that sums over all neurons, as named inside the module."""
        return self.groups[0].readers[0]

    def features(self, call: Any) -> Tensor:
        """The tokens: [tokens, features]."""
        return self.rows.first(call).detach().flatten(0, -2)

    def _logits(self, call: Any) -> Tensor:
        """Of the gates, token by token: [B, ..., blocks]."""
        shape = self.rows.first(call).shape[:-1]
        logits: Tensor = self.effort(self.features(call))
        return logits.reshape(*shape, -1)

    @staticmethod
    def is_by_sample(choice: Levels) -> bool:
        """Masks have a row per token, or one per sample, or are one for all."""
        return isinstance(choice, Tensor) and choice.ndim > 1

    def is_masked(self, execution: str | None) -> bool:
        """Always, but in groups in eval mode: while training, gates need all neurons."""
        return execution != "group" or self.training

    def keys(self, choice: Levels) -> Any:
        """One mask as bytes; masks of tokens as they are."""
        assert isinstance(choice, Tensor)  # noqa: S101 - masks are
        if choice.ndim > 1:
            return choice
        return bytes(choice.detach().to(torch.uint8).tolist())

    def at(self, key: Any, args: Any, kwargs: Any) -> Any:
        """Under one mask for all, or every token under its own."""
        if isinstance(key, Tensor):
            return self._by_token(key, (args, kwargs))
        if all(key):
            return self.full(*args, **kwargs)
        return super().at(self._of_units(key), args, kwargs)

    def parts(self, key: bytes) -> dict[str, Tensor]:
        """Slices of the weights under a mask of blocks, or of units."""
        return super().parts(self._of_units(key))

    def _of_units(self, key: bytes) -> bytes:
        if len(key) != len(self.sizes):
            return key
        return b"".join(bytes([own]) * size for own, size in zip(key, self.sizes, strict=True))

    def _by_token(self, masks: Tensor, call: Any) -> Any:
        """Each block of neurons runs the tokens that have it open; what they give is summed."""
        x = self.rows.first(call)
        tokens = x.flatten(0, -2)
        is_open = self.by_token(masks, x)
        means = self.mean_of_blocks()
        out = (~is_open).to(means.dtype) @ means
        bias = self.full.get_submodule(self.reader).bias
        if isinstance(bias, Tensor):
            out = out + bias
        places = is_open.T.contiguous()
        if is_exporting():
            for block in range(len(self.sizes)):
                own = rows_where(places[block])
                given = self._part(slice(block, block + 1), tokens.index_select(0, own), call)
                out = out.index_add(0, own, given)
            return out.reshape(*x.shape[:-1], -1)
        counts = places.sum(1).tolist()
        kind = out.dtype
        for part in runs_of([count == len(tokens) for count in counts]):
            given = self._part(part, tokens, call)
            out, kind = out + given, given.dtype
        for block, count in enumerate(counts):
            if 0 < count < len(tokens):
                (own,) = places[block].nonzero(as_tuple=True)
                given = self._part(slice(block, block + 1), tokens.index_select(0, own), call)
                out, kind = out.index_add_(0, own, given.to(out.dtype)), given.dtype
        return out.to(kind).reshape(*x.shape[:-1], -1)  # autocast: as the layer itself gives it

    def by_token(self, masks: Tensor, x: Tensor) -> Tensor:
        """What tokens [B, ..., features] have open, bool [tokens, blocks]: of masks of tokens, samples, or all."""
        return self._rows_of(masks, x).bool()

    def _rows_of(self, masks: Tensor, x: Tensor) -> Tensor:
        masks = masks.to(x.device)
        if masks.ndim == 2:
            masks = masks.reshape(len(masks), *[1] * (x.ndim - 2), -1)
        return masks.expand(*x.shape[:-1], -1).reshape(-1, masks.shape[-1])

    def _part(self, part: slice, tokens: Tensor, call: Any) -> Tensor:
        """What blocks of neurons side by side give, without the bias of the reader."""
        leaves, shape = self.rows.leaves(call)
        leaves[self.rows.positions[0]] = tokens
        args, kwargs = tree_unflatten(leaves, shape)
        shell = self.shells.of((sum(self.sizes[part]),))
        if self.views is None or self.training:
            own: Tensor = self.run_shell(shell, self.tensors(part), args, kwargs)
            return own
        key = part.start, part.stop
        if key not in self.views:
            self.views[key] = with_tensors(self.dressed(shell), self.tensors(part))
        found: Tensor = self.views[key](*args, **kwargs)
        return found

    def tensors(self, part: slice) -> dict[str, Tensor]:
        """Parameters of blocks of neurons by name: views of the weights; the reader adds no bias."""
        start, size = sum(self.sizes[: part.start]), sum(self.sizes[part])
        found = self.all_parts()
        for own in self.groups[0].axes:
            found[own.tensor] = found[own.tensor].narrow(own.axis, start, size)
        weight, bias = (
            f"{self.reader}.{own}" if self.reader else own for own in ("weight", "bias")
        )
        outputs = len(matrix_of(self.full.get_submodule(self.reader)))
        found[bias] = found[weight].new_zeros(outputs)
        return found

    def bind(self) -> None:
        """Compute once what means give, and keep the modules of views, for weights and means that stay."""
        super().bind()
        self.means, self.views = self._means(), {}

    def mean_of_blocks(self) -> Tensor:
        """What each block of neurons adds on average, [blocks, outputs]; as bound, where it is."""
        return self._means() if self.means is None else self.means

    def _means(self, mean: Tensor | None = None) -> Tensor:
        """What each block of neurons adds on average: [blocks, outputs]."""
        weight = matrix_of(self.full.get_submodule(self.reader))
        by_unit = self._mean_outputs(self.reader) if mean is None else mean_outputs(weight, mean)
        return torch.stack([own.sum(1) for own in by_unit.split(self.sizes, dim=1)])

    def distances(self, inner: Tensor) -> tuple[Tensor, Tensor]:
        """How far what each block of neurons gives lies from its mean, and what all give together.

        Args:
            inner: what the reader gets: [tokens, neurons].

        Returns:
            norms [tokens, blocks], and the sum of the differences [tokens, outputs].
        """
        weight = matrix_of(self.full.get_submodule(self.reader))
        means, total, norms = self._means(), inner.new_zeros(len(inner), len(weight)), []
        parts = (inner.split(self.sizes, 1), weight.split(self.sizes, 1), means)
        for given, own_weight, mean in zip(*parts, strict=True):
            own = given @ own_weight.T - mean
            norms.append(torch.linalg.vector_norm(own, dim=1))
            total += own
        return torch.stack(norms, 1), total

    @contextmanager
    def masked(self, choice: Levels, observer: Observer | None) -> Iterator[None]:
        """The reader gets every token under its own mask, and gives the mean of what is closed."""
        assert isinstance(choice, Tensor)  # noqa: S101 - masks are
        reader = self.full.get_submodule(self.reader)
        seen: list[Tensor] = []

        def spread(x: Tensor) -> Tensor:
            if choice.ndim == 1:
                return choice.to(x.device).expand(*x.shape[:-1], -1)
            return self._rows_of(choice, x).reshape(*x.shape[:-1], -1)

        def before(_module: nn.Module, args: Any, kwargs: Any) -> Any:
            x = args[0] if args else kwargs["input"]
            sizes = torch.tensor(self.sizes, device=x.device)
            is_open = spread(x).to(x.dtype).repeat_interleave(sizes, dim=-1)
            if observer is not None:
                mean, count = _mean_of_closed(x.detach(), is_open.detach())
                seen.append(mean)
                observer.reads(self.reader, 0, mean, count)
            return (x * is_open,), {}

        def behind(_module: nn.Module, _args: Any, y: Tensor) -> Tensor:
            means = self._means(seen.pop() if seen else None)
            return y + (1 - spread(y).to(y.dtype)) @ means

        with own_hooks() as own:
            handles = [
                reader.register_forward_pre_hook(own(before), with_kwargs=True),
                reader.register_forward_hook(own(behind)),
            ]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"{len(self.sizes)} blocks of {min(self.sizes)} to {max(self.sizes)} neurons"


def _mean_of_closed(x: Tensor, is_open: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of every neuron over the tokens that close it, and their number: [neurons, 1] each.

    Those that gates close are no sample of all tokens: read the mean of all, what they have in common would
    add up along a stream. Of a neuron that no token closes, the mean of all.
    """
    weight = (1 - is_open + _HARDLY).expand_as(x).flatten(0, -2).double()
    count = weight.sum(0)[:, None]
    mean = (weight * x.flatten(0, -2)).sum(0)[:, None] / count
    return mean.to(x.dtype), count


def runs_of(chosen: Sequence[bool]) -> Iterator[slice]:
    """Where neighbours are chosen."""
    start = 0
    for is_chosen, group in groupby(chosen):
        stop = start + len(list(group))
        if is_chosen:
            yield slice(start, stop)
        start = stop


def _lay_by_input_(reader: Any) -> None:
    """Let what belongs to one neuron lie side by side: a block of them is then one piece of memory."""
    if is_turned(reader):
        return
    with torch.no_grad():
        reader.weight.data = reader.weight.data.t().contiguous().t()


__all__ = ["TokenBlock", "runs_of"]
