"""What inputs take: shares of widths, MACs, and whether masks vary with the input at all."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swan_surgery.adaptive.adaptive_model import AdaptiveModel, Taken
from swan_surgery.adaptive.checks import check_adaptive, checked
from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import InputError
from swan_surgery.models.batches import run_on_batch
from swan_surgery.models.modes import evaluating


# Below this entropy, in bits, of the widths of every block, masks do not vary enough to pay for looking.
_HARDLY = 0.1


@dataclass(frozen=True)
class WidthStats:
    """Widths that the samples of a loader take.

    Attributes:
        samples: how many.
        shares: by block, the part of the samples at each width, ascending widths. Of free units the part
            of the samples for which each is open; of blocks of neurons, of the tokens.
        macs: float64 (samples,): MACs of every sample.
        dense_macs: of the given model.
        milliseconds: wall-clock time per sample, by batch: [batches].
        entropies: by block, bits of entropy of the width over the samples. Of free units the mean over units;
            of blocks of neurons over the tokens.
        information: by block, bits of mutual information of the width and the label; None without labels, and of
            tokens. Of
            free units the mean over units.
        usual: by block, the width that most samples take. Of free units a mask: what is open for most.
        per_unit: whether units are free.
    """

    samples: int
    shares: Mapping[str, tuple[float, ...]]
    macs: Tensor
    dense_macs: int
    milliseconds: Tensor
    entropies: Mapping[str, float]
    information: Mapping[str, float] | None
    usual: Mapping[str, Any]
    per_unit: bool = False

    @property
    def mean_macs(self) -> float:
        """Mean over samples."""
        return float(self.macs.mean())

    @property
    def p95_macs(self) -> float:
        """95 % of the samples cost at most this."""
        return float(self.macs.quantile(0.95))

    @property
    def entropy(self) -> float:
        """Of the block that varies most, in bits."""
        return max(self.entropies.values())

    def to_json(self) -> dict[str, Any]:
        """Plain data: figures, no samples."""
        return {
            "samples": self.samples,
            "mean_macs": self.mean_macs,
            "p95_macs": self.p95_macs,
            "dense_macs": self.dense_macs,
            "mean_ms": float(self.milliseconds.mean()),
            "p95_ms": float(self.milliseconds.quantile(0.95)),
            "shares": {name: list(own) for name, own in self.shares.items()},
            "entropies": dict(self.entropies),
            "information": None if self.information is None else dict(self.information),
        }

    def __str__(self) -> str:
        head = (
            f"{self.samples} samples: MACs mean {self.mean_macs:,.0f} "
            f"({self.mean_macs / self.dense_macs:.3f} of the given model), p95 {self.p95_macs:,.0f}; "
            f"ms per sample mean {float(self.milliseconds.mean()):.3f}, "
            f"p95 {float(self.milliseconds.quantile(0.95)):.3f}"
        )
        lines = [head]
        for name, own in self.shares.items():
            known = (
                ""
                if self.information is None
                else f", {self.information[name]:.2f} about the label"
            )
            parts = (
                f"{sum(own) / len(own):.2f} of {len(own)} units open, each for {min(own):.2f} to {max(own):.2f}"
                if self.per_unit
                else " ".join(f"{share:.2f}" for share in own)
            )
            lines.append(
                f"{name or '(the model)'}: {parts}; {self.entropies[name]:.2f} bits{known}"
            )
        return "\n".join(lines)


def width_stats(
    adapted: AdaptiveModel, loader: Iterable[Any], *, num_batches: int | None = None
) -> WidthStats:
    """Which widths the samples of a loader take, and what they cost.

    Args:
        adapted: an adaptive model, or what `compact` made of it; run in eval mode.
        loader: batches as `calibrate` takes them. Where a batch is (inputs, labels) with one whole
            number per sample, what widths know about labels is told as well.
        num_batches: how many batches to use at most; all of them by default.

    Raises:
        ModelError: not an adaptive model.
        InputError: the loader yields no batch, or one without samples.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> adapted = swan.adapt(net, torch.zeros(2, 3))
        >>> swan.width_stats(adapted, [torch.randn(16, 3)]).shares[""]  # nothing was fitted yet
        (0.0, 0.0, 0.0, 1.0)
    """
    check_adaptive(adapted, to="tell the widths of", compact=True)
    levels, macs, times, labels = [], [], [], []
    with torch.no_grad(), streams_kept(), evaluating(adapted):
        for batch in checked(loader, num_batches):
            start = time.perf_counter()
            taken = taken_by(adapted, batch)
            times.append((time.perf_counter() - start) * 1e3 / len(taken.macs))
            levels.append(taken.levels)
            macs.append(taken.macs)
            labels.append(_labels(batch, len(taken.macs)))
    if not levels:
        raise InputError("the loader yielded no batch, so there are no widths to tell")
    joined = torch.cat(levels)
    known = [own for own in labels if own is not None]
    by_token = adapted.structure.kind == "blocks"
    truth = torch.cat(known) if len(known) == len(labels) and not by_token else None
    shares, entropies, information, usual = {}, {}, {}, {}
    names, counts = list(adapted.costs.blocks), adapted.choices.kinds()
    for name, own in zip(names, joined.split([len(counts[n]) for n in names], 1), strict=True):
        kinds = [
            adapted.choices.counted(column, count)
            for column, count in zip(own.T, counts[name], strict=True)
        ]
        shares[name] = adapted.choices.shares([kind / len(own) for kind in kinds])
        entropies[name] = _mean([_entropy(kind) for kind in kinds])
        usual[name] = adapted.choices.usual(name, kinds)
        if truth is not None:
            columns = zip(own.long().T, counts[name], strict=True)
            information[name] = _mean([_information(c, truth, n) for c, n in columns])
    return WidthStats(
        len(joined),
        shares,
        torch.cat(macs).double(),
        adapted.costs.dense,
        torch.tensor(times, dtype=torch.float64),
        entropies,
        None if truth is None else information,
        usual,
        per_unit=adapted.structure.kind != "nested",
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def hardly_varies(stats: WidthStats) -> bool:
    """Whether samples take the same widths, all but a few."""
    return stats.entropy < _HARDLY


def _labels(batch: Any, count: int) -> Tensor | None:
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        return None
    label = batch[1]
    if not isinstance(label, Tensor) or label.is_floating_point() or label.shape != (count,):
        return None
    return label.cpu().long()


def _entropy(counts: Tensor) -> float:
    share = counts.flatten() / counts.sum()
    return abs(float((share * share.clamp(min=1e-300).log2()).sum()))


def _information(levels: Tensor, labels: Tensor, count: int) -> float:
    """Bits of mutual information, H(levels) + H(labels) - H(both)."""
    labels = labels.unique(return_inverse=True)[1]
    both = torch.bincount(labels * count + levels, minlength=(int(labels.max()) + 1) * count)
    table = both.double().reshape(-1, count)
    return _entropy(table.sum(0)) + _entropy(table.sum(1)) - _entropy(table)


def taken_by(adapted: AdaptiveModel, batch: Any) -> Taken:
    """What the samples of a batch take."""
    found: Taken = run_on_batch(_Teller(adapted), batch)
    return found


class _Teller(nn.Module):
    """Runs a batch, and says what it takes."""

    def __init__(self, adapted: AdaptiveModel) -> None:
        super().__init__()
        self.adapted = adapted

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.adapted.taken(*args, **kwargs)


__all__ = ["WidthStats", "hardly_varies", "taken_by", "width_stats"]
