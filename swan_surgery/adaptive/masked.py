"""The reference: the whole block runs, every sample with its own mask where its readers read."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from swan_surgery.adaptive.levels import (
    LevelStatistics,
    Narrowing,
    closed_bias,
    norms_of,
)
from swan_surgery.adaptive.run import Levels


# (reader, what it gets) is told to whoever records means.
Recorder = Callable[[str, nn.Module, Tensor], Tensor]


@contextmanager
def masking(
    block: nn.Module,
    narrowings: Sequence[Narrowing],
    statistics: Sequence[LevelStatistics],
    levels: Levels,
    *,
    recorder: Recorder | None = None,
) -> Iterator[None]:
    """Inside, the block runs its samples at their levels: closed units are multiplied by zero.

    Args:
        block: at full width.
        narrowings: of every level but the widest.
        statistics: of the same levels.
        levels: one per sample.
        recorder: what is told what readers get, and gives its mean over the batch, which then stands in for
            the one on record; batch-norms then run as they are.
    """
    handles = []
    for name in narrowings[0].open_inputs:
        reader = block.get_submodule(name)
        own = [level.open_inputs[name] for level in narrowings]
        means = [level.mean(name) for level in statistics]
        mask = _Mask(name, reader, own, means, levels, recorder)
        handles += [
            reader.register_forward_pre_hook(mask.before, with_kwargs=True),
            reader.register_forward_hook(mask.behind),
        ]
    if recorder is None:
        for name, norm in norms_of(block).items():
            shift = _shifting(name, norm, statistics, levels)
            handles.append(norm.register_forward_pre_hook(shift))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Mask:
    """What a reader gets and gives, by sample: closed inputs are zero, and their mean is in the bias."""

    def __init__(
        self,
        name: str,
        reader: nn.Module,
        num_open: Sequence[int],
        means: Sequence[Tensor],
        levels: Levels,
        recorder: Recorder | None,
    ) -> None:
        assert isinstance(reader.weight, Tensor)  # noqa: S101
        self.name, self.reader, self.levels, self.recorder = name, reader, levels, recorder
        self.weight = reader.weight
        self.num_open = [*num_open, self.weight.shape[1]]
        self.means = [*means, means[0]]  # at full width nothing is closed
        self.is_conv = isinstance(reader, _ConvNd)

    def before(self, _module: nn.Module, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else kwargs["input"]
        if self.recorder is not None:
            mean = self.recorder(self.name, self.reader, x)
            self.means = [mean] * len(self.num_open)
        places = torch.arange(self.weight.shape[1], device=x.device)
        counts = torch.tensor(self.num_open, device=x.device)
        table = (places < counts[:, None]).to(x.dtype)
        return (x * self._spread(table[self.levels], x.ndim),), {}

    def behind(self, _module: nn.Module, _args: Any, y: Tensor) -> Tensor:
        pairs = zip(self.means, self.num_open, strict=True)
        table = torch.stack([closed_bias(self.weight, mean, count) for mean, count in pairs])
        return y + self._spread(table[self.levels], y.ndim)

    def _spread(self, values: Tensor, ndim: int) -> Tensor:
        """[C] or [B, C] beside activations with that many axes."""
        rows = values if values.ndim == 2 else values[None]
        if self.is_conv:
            return rows.reshape(*rows.shape, *[1] * (ndim - 2))
        return rows.reshape(rows.shape[0], *[1] * (ndim - 2), rows.shape[1])


def _shifting(
    name: str, norm: _BatchNorm, statistics: Sequence[LevelStatistics], levels: Levels
) -> Callable[..., Any]:
    """A batch-norm with its own statistics normalises what is shifted as it would with a level's.

    (x - m_l) / s_l = (x' - m) / s for x' = (x - m_l) s / s_l + m, whatever else its class does.
    """
    assert norm.running_mean is not None  # noqa: S101 - selected by norms_of
    assert norm.running_var is not None  # noqa: S101
    means, scales = [], []
    spread = (norm.running_var + norm.eps).sqrt()
    for level in statistics:
        own = level.norm(name)
        width = len(own["running_mean"])
        means.append(torch.cat([own["running_mean"], norm.running_mean[width:]]))
        scale = spread[:width] / (own["running_var"] + norm.eps).sqrt()
        scales.append(torch.cat([scale, torch.ones_like(spread[width:])]))
    mean = torch.stack([*means, norm.running_mean])
    scale = torch.stack([*scales, torch.ones_like(spread)])

    def hook(_module: nn.Module, args: Any) -> Any:
        x = args[0]
        rows = [table[levels] for table in (mean, scale)]
        rows = [row if row.ndim == 2 else row[None] for row in rows]
        m, s = (row.reshape(*row.shape, *[1] * (x.ndim - 2)) for row in rows)
        base = norm.running_mean
        assert base is not None  # noqa: S101
        return ((x - m) * s + base.reshape(1, -1, *[1] * (x.ndim - 2)),)

    return hook


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


__all__ = ["Recorder", "masking", "mean_of"]
