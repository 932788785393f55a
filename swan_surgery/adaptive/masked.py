"""The reference: the whole block runs, every sample with its own mask where its readers read."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from swan_surgery.adaptive.levels import (
    LevelStatistics,
    closed_bias,
)
from swan_surgery.adaptive.own_hooks import Hook, own_hooks
from swan_surgery.adaptive.run import Levels


# Mean and variance by batch-norm.
Norms = Mapping[str, tuple[Tensor, Tensor]]


class Observer(Protocol):
    """Told what readers and batch-norms get, by the level of the samples."""

    def reads(self, reader: str, level: int, mean: Tensor, count: int | Tensor) -> None:
        """A reader got inputs with this mean, [inputs, taps], from `count` samples, or so many by input."""

    def normalises(self, norm: str, level: int, x: Tensor) -> None:
        """A batch-norm got these rows."""


@contextmanager
def masking(
    block: nn.Module,
    masks: Mapping[str, Tensor],
    statistics: Sequence[LevelStatistics],
    kinds: Levels,
    *,
    levels: Levels,
    observer: Observer | None = None,
    norms: Norms = MappingProxyType({}),
) -> Iterator[None]:
    """Inside, the block runs its samples under their masks: closed units are multiplied by zero.

    Args:
        block: at full width.
        masks: by reader, [K, inputs]: which inputs are open under each of K masks.
        statistics: of every level but the widest; where there is one, it is for all masks.
        kinds: the mask of each sample.
        levels: the level of each sample, whose statistics it takes.
        observer: then means and batch-norm statistics are those of the samples at hand, level by level
            (but for the widest), and the observer is told what they are made of.
        norms: mean and variance that batch-norms in train mode had when this run began; a second one in backward
            finds them moved.
    """
    with own_hooks() as own:
        handles = _hooked(block, masks, statistics, kinds, levels, observer, own, norms)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _hooked(
    block: nn.Module,
    masks: Mapping[str, Tensor],
    statistics: Sequence[LevelStatistics],
    kinds: Levels,
    levels: Levels,
    observer: Observer | None,
    own: Callable[[Hook], Hook],
    norms: Norms,
) -> list[RemovableHandle]:
    handles = []
    for name, is_open in masks.items():
        reader = block.get_submodule(name)
        mask = _Mask(name, reader, (is_open, kinds), (statistics, levels), observer)
        handles += [
            reader.register_forward_pre_hook(own(mask.before), with_kwargs=True),
            reader.register_forward_hook(own(mask.behind)),
        ]
    for name in statistics[0].norms:
        norm = block.get_submodule(name)
        assert isinstance(norm, _BatchNorm)  # noqa: S101 - norms_of found it
        shift = _Shift(name, norm, statistics, levels, observer, norms.get(name))
        handles.append(norm.register_forward_pre_hook(own(shift.before)))
    return handles


def rows_at(x: Tensor, levels: Levels, level: int) -> Tensor:
    """The samples at a level."""
    if isinstance(levels, Tensor) and levels.ndim:
        return x[levels == level]
    return x if int(levels) == level else x[:0]


class _Mask:
    """What a reader gets and gives, by sample: closed inputs are zero, and their mean is in the bias."""

    def __init__(
        self,
        name: str,
        reader: nn.Module,
        masks: tuple[Tensor, Levels],
        statistics: tuple[Sequence[LevelStatistics], Levels],
        observer: Observer | None,
    ) -> None:
        assert isinstance(reader.weight, Tensor)  # noqa: S101 - readers have one
        self.name, self.reader, self.observer = name, reader, observer
        self.weight = reader.weight
        self.is_open, self.kinds = masks
        self.means = [level.mean(name) for level in statistics[0]]
        self.own = [level.own(name) for level in statistics[0]]
        self.levels = statistics[1]
        self.is_conv = isinstance(reader, _ConvNd)

    def before(self, _module: nn.Module, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else kwargs["input"]
        if self.observer is not None:
            self._observe(self.observer, x)
        return (x * self._spread(self.is_open.to(x.dtype)[self.kinds], x.ndim),), {}

    def _observe(self, observer: Observer, x: Tensor) -> None:
        for level in range(len(self.means)):
            rows = rows_at(x, self.levels, level)
            if len(rows):
                self.means[level] = mean_of(self.reader, rows)
                observer.reads(self.name, level, self.means[level], len(rows))

    def behind(self, _module: nn.Module, args: Any, y: Tensor) -> Tensor:
        # At full width nothing is closed, so that any mean will do.
        means = self.means if len(self.means) == 1 else [*self.means, self.means[0]]
        table = closed_bias(self.weight, torch.stack(means), self.is_open)
        y = y + self._spread(table[self.kinds], y.ndim)
        for level, own in enumerate(self.own):
            if own is not None:
                y = self._at(level, self._read_by(*own, args[0]), y)
        return y

    def _at(self, level: int, there: Tensor, elsewhere: Tensor) -> Tensor:
        """Outputs of the samples at a level, and of the others."""
        if isinstance(self.levels, Tensor) and self.levels.ndim:
            is_there = (self.levels == level).to(there.device)
            is_there = is_there.reshape(-1, *[1] * (there.ndim - 1))
            return torch.where(is_there, there, elsewhere)
        return there if int(self.levels) == level else elsewhere

    def _read_by(self, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        """What a reader of a level's own gives of masked inputs; zero where it has no output."""
        places = [whole - own for whole, own in zip(self.weight.shape, weight.shape, strict=True)]
        ends = [end for more in reversed(places) for end in (0, more)]
        weight, bias = F.pad(weight, ends), F.pad(bias, (0, places[0]))
        if isinstance(self.reader, _ConvNd):
            found: Tensor = self.reader._conv_forward(x, weight, bias)  # noqa: SLF001 - its padding mode included
            return found
        return F.linear(x, weight, bias)

    def _spread(self, values: Tensor, ndim: int) -> Tensor:
        """[C] or [B, C] beside activations with that many axes."""
        rows = values if values.ndim == 2 else values[None]
        if self.is_conv:
            return rows.reshape(*rows.shape, *[1] * (ndim - 2))
        return rows.reshape(rows.shape[0], *[1] * (ndim - 2), rows.shape[1])


class _Shift:
    """A batch-norm with its own statistics normalises what is shifted as it would with a level's.

    (x - m_l) / s_l = (x' - m) / s for x' = (x - m_l) s / s_l + m, whatever else its class does.
    """

    def __init__(
        self,
        name: str,
        norm: _BatchNorm,
        statistics: Sequence[LevelStatistics],
        levels: Levels,
        observer: Observer | None,
        then: tuple[Tensor, Tensor] | None,
    ) -> None:
        assert norm.running_mean is not None  # noqa: S101 - selected by norms_of
        assert norm.running_var is not None  # noqa: S101
        self.name, self.eps, self.levels, self.observer = name, norm.eps, levels, observer
        self.mean, self.var = then or (norm.running_mean, norm.running_var)
        self.pairs = [self._whole(level) for level in statistics]

    def _whole(self, level: LevelStatistics) -> tuple[Tensor, Tensor]:
        """Mean and variance of a level; where it has no channel, as at full width."""
        own = level.norm(self.name)
        width = len(own["running_mean"])
        mean = torch.cat([own["running_mean"], self.mean[width:]])
        return mean, torch.cat([own["running_var"], self.var[width:]])

    def before(self, _module: nn.Module, args: Any) -> Any:
        x = args[0]
        if self.observer is not None:
            self._observe(self.observer, x)
        mean = torch.stack([*(mean for mean, _ in self.pairs), self.mean])
        var = torch.stack([*(var for _, var in self.pairs), self.var])
        scale = ((self.var + self.eps) / (var + self.eps)).sqrt()
        rows = [table[self.levels] for table in (mean, scale)]
        rows = [row if row.ndim == 2 else row[None] for row in rows]
        m, s = (row.reshape(*row.shape, *[1] * (x.ndim - 2)) for row in rows)
        return ((x - m) * s + self.mean.reshape(1, -1, *[1] * (x.ndim - 2)),)

    def _observe(self, observer: Observer, x: Tensor) -> None:
        for level in range(len(self.pairs)):
            rows = rows_at(x, self.levels, level)
            if len(rows):
                var, mean = torch.var_mean(rows, dim=(0, *range(2, x.ndim)), correction=0)
                self.pairs[level] = (mean, var)
                observer.normalises(self.name, level, rows)


def mean_of(reader: nn.Module, x: Tensor) -> Tensor:
    """The mean of what every tap of a reader gets from every input: [inputs, taps].

    Over samples and output positions, padding included, so that weight and mean multiply to the mean
    of the output.
    """
    x = x.detach()
    if not isinstance(reader, _ConvNd):
        return x.flatten(0, -2).mean(0)[:, None]
    kernel, stride, dilation = reader.kernel_size, reader.stride, reader.dilation
    mode = "constant" if reader.padding_mode == "zeros" else reader.padding_mode
    x = F.pad(x, reader._reversed_padding_repeated_twice, mode=mode)  # noqa: SLF001 - "same" included
    sizes = [
        (length - d * (k - 1) - 1) // s + 1
        for length, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    taps = []
    for tap in itertools.product(*map(range, kernel)):
        part = x
        for axis, (place, s, d, size) in enumerate(
            zip(tap, stride, dilation, sizes, strict=True), start=2
        ):
            index = (slice(None),) * axis
            part = part[(*index, slice(place * d, place * d + (size - 1) * s + 1, s))]
        taps.append(part.mean(dim=(0, *range(2, part.ndim))))
    return torch.stack(taps, dim=1)


__all__ = ["Observer", "masking", "mean_of"]
