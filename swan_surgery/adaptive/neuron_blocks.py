"""Blocks of neurons: the inner units of a feed-forward layer, put together by what they read."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from swan_surgery.adaptive.candidates import NestedGroup
from swan_surgery.adaptive.matrices import matrix_of


_ROUNDS = 10


def even_sizes(units: int, block_size: int) -> tuple[int, ...]:
    """Sizes of as many blocks as are nearest to `block_size`; no two differ by more than one."""
    count = max(1, round(units / block_size))
    least, more = divmod(units, count)
    return (least + 1,) * more + (least,) * (count - more)


def balanced_clusters(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """k-means with clusters of given sizes: the cluster of each row, int64 (N,).

    As "MoEfication" (Zhang et al., 2022) splits feed-forward layers, by the directions of their neurons. Rows
    choose in the order of how much they would lose by their second choice, and a full cluster takes no more.

    Args:
        rows: [N, F].
        sizes: of the clusters; they sum to N.
    """
    rows = nn.functional.normalize(rows.double(), dim=1)
    count = len(sizes)
    centres = rows[torch.linspace(0, len(rows) - 1, count).round().long()]
    found = torch.zeros(len(rows), dtype=torch.int64)
    for _ in range(_ROUNDS):
        before, found = found, _assigned(rows @ centres.T, sizes)
        if torch.equal(before, found):
            break
        sums = torch.zeros_like(centres).index_add_(0, found, rows)
        centres = nn.functional.normalize(sums, dim=1)
    return found


def _assigned(likeness: Tensor, sizes: Sequence[int]) -> Tensor:
    """Every row to the most alike cluster that is not full yet."""
    left = list(sizes)
    choices = likeness.argsort(dim=1, descending=True, stable=True)
    ordered = likeness.gather(1, choices)
    margin = ordered[:, 0] - ordered[:, min(1, len(sizes) - 1)]
    preferred = choices.tolist()
    found = torch.zeros(len(likeness), dtype=torch.int64)
    for row in margin.argsort(descending=True, stable=True).tolist():
        cluster = next(own for own in preferred[row] if left[own])
        left[cluster] -= 1
        found[row] = cluster
    return found


def cluster_scores(
    model: nn.Module, groups: Sequence[NestedGroup], num_units: int, block_size: int
) -> Tensor:
    """Scores by whose descending order the units of a block of neurons lie side by side: [num_units]."""
    scores = torch.zeros(num_units, dtype=torch.float64)
    for group in groups:
        # By what units read; of gated linear units both of its layers.
        layers = dict.fromkeys(own.tensor.rpartition(".")[0] for own in group.axes)
        writers = [model.get_submodule(name) for name in layers if name not in group.readers]
        rows = [matrix_of(layer).detach().cpu() for layer in writers]
        clusters = balanced_clusters(torch.cat(rows, 1), even_sizes(len(group.units), block_size))
        scores[list(group.units)] = -clusters.double()
    return scores


def sizes_by_block(groups: Sequence[NestedGroup], block_size: int) -> Mapping[str, tuple[int, ...]]:
    """Neurons in each block of every feed-forward layer."""
    return {group.block: even_sizes(len(group.units), block_size) for group in groups}


__all__ = [
    "balanced_clusters",
    "cluster_scores",
    "even_sizes",
    "sizes_by_block",
]
