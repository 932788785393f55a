"""A read as rows of a linear system: [R, G, n_in] inputs, [R, G, n_out] outputs, at drawn positions."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swan_surgery.cutting.compensation.reads import Read


ROWS = 16_384  # 32 positions of 512 images
HELD_OUT = 5  # the last fifth of every batch's rows asks whether new weights are better


def solved_with(rows: int) -> int:
    """How many of a batch's rows are solved with; those behind them judge."""
    return rows - rows // HELD_OUT


@dataclass(frozen=True, slots=True)
class Positions:
    """Which rows are taken: flat numbers over batch x output positions, ascending."""

    index: Tensor
    total: int


def row_count(read: Read) -> int:
    """How many rows a read has; `output` is there."""
    assert read.output is not None  # noqa: S101 - asked of finished reads
    return read.output.numel() // read.output.shape[1]


def draw(total: int, wanted: int, generator: torch.Generator) -> Positions:
    """`wanted` of `total` rows; all where there are no more."""
    if wanted >= total:
        return Positions(torch.arange(total), total)
    index = torch.randperm(total, generator=generator)[:wanted]
    return Positions(index.sort().values, total)


def output_rows(output: Tensor, positions: Positions) -> Tensor:
    """[R, C] of [B, C, ...] at the positions."""
    index = positions.index.to(output.device)
    if output.ndim == 2:
        return output[index]
    batch, place = _parted(index, output.shape[2:].numel())
    return output.flatten(2)[batch, :, place]


def input_rows(read: Read, positions: Positions, spatial: torch.Size) -> Tensor:
    """[R, G, n_in]: what each output position is computed of, in the order of `weight_matrix`."""
    index = positions.index.to(read.input.device)
    if read.settings is None:
        return read.input[index].unsqueeze(1)
    stride, padding, dilation, transposed, _, groups = read.settings
    x, kernel = read.input, read.weight.shape[2:]
    if transposed:
        x = _stuffed(x, stride, spatial, kernel, padding, dilation)
        stride = [1] * len(kernel)
    else:
        x = F.pad(x, [p for p in reversed(padding) for _ in range(2)])
    batch, place = _parted(index, spatial.numel())
    corner = _unravelled(place, spatial)
    taps = torch.cartesian_prod(*(torch.arange(k, device=x.device) for k in kernel))
    taps = taps.reshape(-1, len(kernel))
    where = [
        corner[d][:, None] * stride[d] + taps[None, :, d] * dilation[d] for d in range(len(kernel))
    ]
    patches = x.movedim(1, -1)[(batch[:, None], *where)]  # [R, taps, C]
    rows, count, channels = patches.shape
    return patches.transpose(1, 2).reshape(rows, groups, channels // groups * count)


def weight_matrix(read: Read) -> Tensor:
    """[G, n_out, n_in] of a read's weight."""
    w = read.weight
    if read.settings is None:
        return w.t().unsqueeze(0)
    transposed, groups = read.settings[3], read.settings[5]
    if transposed:  # [in, out / G, k...] -> flipped, [G, out / G, in / G * taps]
        flipped: Tensor = w.flip(tuple(range(2, w.ndim)))
        w = flipped.reshape(groups, -1, *w.shape[1:]).transpose(1, 2)
        return w.flatten(2)
    return w.reshape(groups, w.shape[0] // groups, -1)


def write_weight_(read: Read, matrix: Tensor) -> None:
    """The inverse of `weight_matrix`, into the parameter's memory."""
    w = read.weight
    matrix = matrix.to(w.dtype)
    if read.settings is None:
        w.copy_(matrix[0].t())
        return
    transposed, groups = read.settings[3], read.settings[5]
    if transposed:
        shape = (groups, w.shape[1], w.shape[0] // groups, *w.shape[2:])
        values = matrix.reshape(shape).transpose(1, 2).flatten(0, 1)
        w.copy_(values.flip(tuple(range(2, w.ndim))))
        return
    w.copy_(matrix.reshape(w.shape))


def _parted(index: Tensor, places: int) -> tuple[Tensor, Tensor]:
    return index // places, index % places


def _unravelled(place: Tensor, shape: torch.Size) -> list[Tensor]:
    found = []
    for size in reversed(shape):
        found.append(place % size)
        place = place // size
    return found[::-1]


def _stuffed(
    x: Tensor, stride: Any, spatial: Any, kernel: Any, padding: Any, dilation: Any
) -> Tensor:
    """What a transposed convolution is a plain one of: zeros between the positions, and around."""
    for d, (s, k, p, e) in enumerate(zip(stride, kernel, padding, dilation, strict=True), start=2):
        size = (x.shape[d] - 1) * s + 1
        spread = x.new_zeros((*x.shape[:d], size, *x.shape[d + 1 :]))
        spread[(slice(None),) * d + (slice(None, None, s),)] = x
        before = e * (k - 1) - p
        after = spatial[d - 2] + e * (k - 1) - before - size
        around = [0, 0] * (x.ndim - 1 - d) + [before, after]
        x = F.pad(spread, around)
    return x
