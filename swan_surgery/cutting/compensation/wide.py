"""Linear layers behind a flatten that read more than a Gram matrix should hold: whole channels are mixed.

Every channel of the reference's map is solved for out of the channels that stayed, the same for all its
pixels; the reference's weights then read the channels so found.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from swan_surgery.cutting.compensation.outcome import ROUNDING, LayerCompensation
from swan_surgery.cutting.compensation.reads import Read
from swan_surgery.cutting.compensation.rows import ROWS, solved_with, weight_matrix, write_weight_
from swan_surgery.cutting.compensation.solving import Rows, solve
from swan_surgery.cutting.compensation.sums import Sums


MOST_INPUTS = 8192
TOO_WIDE = "it has too many inputs to solve for"


def pixels_of(kept: Tensor, inputs: int) -> int | None:
    """How many inputs in a row are one channel's, if whole channels stayed; None if they did not.

    Args:
        kept: positions that stayed, ascending.
        inputs: how many there were.
    """
    for pixels in range(len(kept), 1, -1):
        if inputs % pixels or len(kept) % pixels:
            continue
        blocks = kept.reshape(-1, pixels)
        starts = blocks[:, :1]
        if not bool((starts % pixels).any()) and torch.equal(
            blocks, starts + torch.arange(pixels, device=kept.device)
        ):
            return pixels
    return None


def mend_wide_(
    events: Sequence[Read], twins: Sequence[Read], kept: tuple[Tensor, Tensor], damping: float
) -> LayerCompensation:
    """Write the weight that `mixed` finds, if it is better on rows that it was not solved with."""
    first, name = events[0], events[0].key[0]
    new = mixed(events, twins, kept, damping)
    if new is None:
        return LayerCompensation(name, float("nan"), float("nan"), TOO_WIDE)
    held = Rows()
    for one, two in zip(events, twins, strict=True):
        assert two.output is not None  # noqa: S101 - stopped after it had run
        start = solved_with(len(one.input)) % len(one.input)
        held.parts.append((one.input[start:][None], two.output[start:][:, kept[0]][None]))
    centred = first.bias is not None
    before = held.error(weight_matrix(first), centred=centred)
    after = held.error(new[0][None], centred=centred)
    if before <= ROUNDING.get(first.input.dtype, 1e-6):
        return LayerCompensation(name, before, before, "nothing to mend")
    if not after < before:
        return LayerCompensation(name, before, before, "not better on held-out rows")
    write_weight_(first, new[0][None])
    if first.bias is not None:
        first.bias.copy_(new[1].to(first.bias.dtype))
    return LayerCompensation(name, before, after)


def mixed(
    events: Sequence[Read], twins: Sequence[Read], kept: tuple[Tensor, Tensor], damping: float
) -> tuple[Tensor, Tensor] | None:
    """A weight [n_out, n_in] and a bias [n_out], float64, for what the reference gave.

    Args:
        events: what the small model reads, [R, n_in] each; the last fifth of the rows is not used.
        twins: what the reference reads there, [R, N].
        kept: positions that stayed, of the outputs and of the inputs.
        damping: as for `solve`.

    Returns:
        None where channels and pixels cannot be told apart, or nothing can be solved.
    """
    outputs, inputs = kept
    total = twins[0].input.shape[1]
    pixels = pixels_of(inputs, total)
    if pixels is None or total // pixels > MOST_INPUTS:
        return None
    stayed = inputs.reshape(-1, pixels)[:, 0].cpu() // pixels
    start = torch.zeros(1, total // pixels, len(stayed), dtype=torch.float64)
    start[0, stayed, torch.arange(len(stayed))] = 1
    sums, generator = Sums(), torch.Generator().manual_seed(total)
    for one, two in zip(events, twins, strict=True):
        x, z = (
            _by_pixel(read.input[: solved_with(len(read.input))], pixels) for read in (one, two)
        )
        at = torch.randperm(len(x), generator=generator)[: -(-ROWS // len(events))]
        sums.add(x[at][None], z[at][None])
    first, twin = events[0], twins[0]
    has_bias = first.bias is not None and twin.bias is not None
    mixing = solve(sums, start.to(first.input.device), centred=has_bias, damping=damping)
    if mixing is None:
        return None
    weight = twin.weight.t()[outputs].double().unflatten(1, (-1, pixels))  # [n_out, C, P]
    new = torch.einsum("ocp,ck->okp", weight, mixing[0]).flatten(1)
    bias = torch.zeros(len(outputs), dtype=torch.float64, device=new.device)
    if has_bias:
        assert twin.bias is not None  # noqa: S101 - just asked
        mean_x, mean_z = sums.means()
        offset = mean_z[0] - mixing[0] @ mean_x[0]
        bias = twin.bias[outputs].double() + weight.sum(2) @ offset
    return new, bias


def _by_pixel(x: Tensor, pixels: int) -> Tensor:
    """[R, C * P] -> [R * P, C]; in float32 at least."""
    x = x if x.dtype in ROUNDING else x.float()
    rows: Tensor = x.unflatten(1, (-1, pixels)).transpose(1, 2).flatten(0, 1)
    return rows
