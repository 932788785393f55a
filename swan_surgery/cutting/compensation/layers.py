"""A layer of the small model beside the reference's: sums over all batches, new weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from swan_surgery.cutting.compensation.kept import Kept, kept_inputs, kept_outputs
from swan_surgery.cutting.compensation.lockstep import Pass
from swan_surgery.cutting.compensation.outcome import ROUNDING, LayerCompensation
from swan_surgery.cutting.compensation.reads import Key, Memory, Norm, Read, Region, Watching
from swan_surgery.cutting.compensation.rows import (
    ROWS,
    Positions,
    draw,
    input_rows,
    output_rows,
    row_count,
    solved_with,
    weight_matrix,
    write_weight_,
)
from swan_surgery.cutting.compensation.solving import FEW, Rows, solve_held
from swan_surgery.cutting.compensation.streams import Following, Stream
from swan_surgery.cutting.compensation.sums import Sums
from swan_surgery.cutting.compensation.wide import MOST_INPUTS, TOO_WIDE, mend_wide_


MOST_RESCALED = 10.0  # of a variance: what is left of a channel is not blown up beyond that
MOST_TAPS = 16_384  # a Gram matrix of 2 GB

Call = Callable[[nn.Module], object]
Event = Read | Norm


@dataclass(frozen=True, slots=True)
class Settings:
    """How strongly weights are held; whether residual streams are mended along; which tensors may change."""

    damping: float = 0.01
    streams: bool = True
    only: frozenset[str] | None = None


@dataclass
class Side:
    """One of the two models: its memory, and what follows its reads."""

    model: nn.Module
    call: Call
    memory: Memory = field(init=False)
    following: Following = field(init=False)

    def __post_init__(self) -> None:
        self.memory = Memory.of(self.model)
        self.following = Following(self.memory)
        with torch.no_grad(), self.following:
            self.call(self.model)

    def passes(self, calls: Sequence[Call], *, when: str, streams: bool) -> list[Pass[Event]]:
        """A pass per batch, that stops `when` ("before" or "after") something is read."""
        partners = {k: s.partner for k, s in self.following.streams.items()} if streams else {}
        return [Pass(self._work(call, when, partners)) for call in calls]

    def _work(
        self, call: Call, when: str, partners: dict[Key, int]
    ) -> Callable[[Callable[[Event], None]], None]:
        def work(stop: Callable[[Event], None]) -> None:
            watch = Watching(self.memory, partners=partners, **{when: stop})
            with torch.no_grad(), watch:
                call(self.model)

        return work


class Layers:
    """Mends one event after the other."""

    def __init__(self, sides: tuple[Side, Side], kept: Kept, settings: Settings) -> None:
        self.sides, self.kept, self.settings = sides, kept, settings
        self.done: list[LayerCompensation] = []
        self.taken_up: dict[
            str, Tensor
        ] = {}  # norm of a stream's writer -> what the stream had lost on average, in the norm's input
        uses = sides[0].following.regions
        self.shared = {region: count for region, count in uses.items() if count > 1}
        self.phase = "shared" if self.shared else "single"
        self.seen: dict[Region, int] = {}
        self.kept_back: dict[
            Region, tuple[Sums, Rows]
        ] = {}  # of shared weights, until their last read

    def mend(self, events: list[Any], twins: list[Any]) -> None:
        """Solve for what all batches read here; the reference's twins have run."""
        first = events[0]
        if self.settings.only is not None and first.key[0] not in self.settings.only:
            return
        is_shared = isinstance(first, Read) and first.region in self.shared
        if is_shared != (self.phase == "shared"):
            return
        if any(twin is None for twin in twins):
            self._leave(events[0], "the reference does not read it here")
        elif isinstance(events[0], Norm):
            self._norm(events, twins)
        else:
            self._read(events, twins)

    def _leave(self, event: Event, reason: str, before: float = float("nan")) -> None:
        if isinstance(event, Read):
            self.done.append(LayerCompensation(event.key[0], before, before, reason))

    def _norm(self, events: list[Norm], twins: list[Norm]) -> None:
        """Statistics follow the change of the data's: what is unchanged stays bit for bit."""
        first = events[0]
        mean, var = _moments([event.input for event in events])
        mean_was, var_was = _moments([twin.input for twin in twins])
        kept = self.kept.axis(first.key[0], 0)
        if kept is not None:
            kept = kept.to(mean.device)
            mean_was, var_was = mean_was[kept], var_was[kept]
        lost = self.taken_up.pop(first.key[0], None)
        if lost is not None:
            mean_was = mean_was + lost  # is in it by now; its size stays as aimed at
        first.mean.add_((mean - mean_was).to(first.mean.dtype))
        if lost is None:
            # A channel that hardly varied, beside the others, says nothing of its scale.
            floor = 1e-3 * var_was.mean() + torch.finfo(torch.float64).tiny
            ratio = ((var + floor) / (var_was + floor)).clamp(1 / MOST_RESCALED, MOST_RESCALED)
            first.var.mul_(ratio.to(first.var.dtype))

    def _read(self, events: list[Read], twins: list[Read]) -> None:
        first = events[0]
        small, reference = (side.model for side in self.sides)
        kept = kept_outputs(self.kept, first, twins[0], small=small, reference=reference)
        if kept is None:
            return self._leave(first, "its outputs cannot be told from the reference's")
        counts = [row_count(twin) for twin in twins]
        if counts != [own.rows for own in events]:
            return self._leave(first, "its rows are not the reference's")
        if _width(first) > (MOST_INPUTS if first.settings is None else MOST_TAPS):
            return self._wide(events, twins, kept)
        old = weight_matrix(first).double()
        sums, held, lost = self._rows(events, twins, kept, old.shape)
        if first.region in self.shared:
            seen = self.seen.get(first.region, 0) + 1
            self.seen[first.region] = seen
            if seen < self.shared[first.region]:
                self.kept_back[first.region] = sums, held
                return None
        centred = first.bias is not None or first.key in self.sides[0].following.norms
        before = held.error(old, centred=centred)
        if before <= ROUNDING.get(first.input.dtype, 1e-6):
            return self._leave(first, "nothing to mend", before)
        damping = self.settings.damping
        new, after = solve_held(sums, old, held, centred=centred, damping=damping)
        if new is None or not after < before:
            new = old
            self._leave(first, "not better on held-out rows", before)
        else:
            write_weight_(first, new)
            self.done.append(LayerCompensation(first.key[0], before, after))
        norm = self.sides[0].following.norms.get(first.key)
        if (
            norm is not None
            and self.settings.streams
            and first.key in self.sides[0].following.streams
        ):
            self.taken_up[norm] = lost
        if first.bias is not None:
            x, y = sums.means()
            bias = y - (new @ x[:, :, None])[..., 0]
            first.bias.copy_(bias.flatten().to(first.bias.dtype))
        return None

    def _wide(self, events: list[Read], twins: list[Read], kept: Tensor) -> None:
        """Too many inputs for a Gram matrix: behind a flatten, channels are mixed."""
        first = events[0]
        inputs = kept_inputs(self.kept, first, self.sides[0].model)
        if inputs is not None and first.region not in self.shared:
            outputs, inputs = (own.to(first.weight.device) for own in (kept, inputs))
            self.done.append(mend_wide_(events, twins, (outputs, inputs), self.settings.damping))
        else:
            self._leave(first, TOO_WIDE)

    def _rows(
        self, events: list[Read], twins: list[Read], kept: Tensor, shape: torch.Size
    ) -> tuple[Sums, Rows, Tensor]:
        """What the batches say about a weight of shape [G, n_out, n_in]; the last rows are held out.

        And the mean [n_out] of what its stream has lost, which the weight shall take up.
        """
        wanted = max(ROWS, FEW * shape[2])
        sums, held = self.kept_back.pop(events[0].region, (Sums(), Rows()))
        generator = torch.Generator().manual_seed(len(self.done))
        lost, count = torch.zeros(len(kept), dtype=torch.float64, device=events[0].weight.device), 0
        for one, two in zip(events, twins, strict=True):
            assert two.output is not None  # noqa: S101 - stopped after it had run
            at = draw(row_count(two), -(-wanted // len(events)), generator)
            x = input_rows(one, at, two.output.shape[2:]).transpose(0, 1)
            y, more = self._wanted(one, two, at, kept)
            if more is not None:
                y = y + more
                lost += more.sum(0, dtype=torch.float64)
            count += len(y)
            y = y.unflatten(1, (shape[0], -1)).transpose(0, 1)
            if x.dtype not in ROUNDING:
                x, y = x.float(), y.float()
            cut = solved_with(x.shape[1])
            sums.add(x[:, :cut], y[:, :cut])
            start = cut if cut < x.shape[1] else 0  # a single row is its own judge
            held.parts.append((x[:, start:].clone(), y[:, start:].clone()))  # views would keep all
        return sums, held, lost / max(count, 1)

    def _wanted(
        self, one: Read, two: Read, at: Positions, kept: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """What the read shall give: what the reference's gave [R, n_out], and what its stream has lost by now."""
        assert two.output is not None  # noqa: S101 - stopped after it had run
        kept = kept.to(two.output.device)
        y = output_rows(two.output, at)[:, kept]
        here, there = (side.following.streams.get(one.key) for side in self.sides)
        if here is None or there is None or one.partner is None or two.partner is None:
            return y, None
        scale = self._scale(here)
        was = output_rows(there.chain.undone(two.partner), at)
        now = output_rows(here.chain.undone(one.partner), at)
        if scale is None or was.shape[1] <= int(kept.max()) or now.shape != y.shape:
            return y, None
        square = scale.square()
        return y, (was[:, kept] - now) * (scale / (square + 1e-4 * square.mean() + 1e-30))

    def _scale(self, stream: Stream) -> Tensor | None:
        """By what a change of the read's output arrives in the stream, per channel."""
        if stream.chain.norm is None:
            return torch.ones(())
        norm: Any = self.sides[0].model.get_submodule(stream.chain.norm.rpartition(".")[0])
        if getattr(norm, "running_var", None) is None or not hasattr(norm, "eps"):
            return None
        scale: Tensor = (norm.running_var + norm.eps).rsqrt()
        return scale if norm.weight is None else scale * norm.weight


def _width(read: Read) -> int:
    """How many inputs one output is computed of."""
    weight = read.weight
    if read.settings is None:
        return weight.shape[0]
    transposed, groups = read.settings[3], read.settings[5]
    channels = weight.shape[0] // groups if transposed else weight.shape[1]
    return channels * weight.shape[2:].numel()


def _moments(inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of inputs [B, C, ...]; sums over batches in float64."""
    counts, means, variances = [], [], []
    for x in inputs:
        own = x if x.dtype in ROUNDING else x.float()
        var, mean = torch.var_mean(own, dim=[0, *range(2, x.ndim)], correction=0)
        counts.append(x.numel() // x.shape[1])
        means.append(mean.double())
        variances.append(var.double())
    count = torch.tensor(counts, dtype=torch.float64, device=inputs[0].device)[:, None]
    by_batch = torch.stack(means)
    mean = (count * by_batch).sum(0) / count.sum()
    spread = torch.stack(variances) + (by_batch - mean).square()
    return mean, (count * spread).sum(0) / count.sum()
