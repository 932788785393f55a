"""Which channels of the first model a cut one still has."""

from collections import defaultdict

import torch
from torch import Tensor, nn

from swan_surgery.cutting.plan import PruningPlan
from swan_surgery.cutting.step import CUT
from swan_surgery.models.provenance import Provenance, provenance_of


def positions_of(provenance: Provenance | None) -> dict[tuple[str, int], Tensor]:
    """What all cuts together left of the base model's axes: (tensor, axis) -> positions, int64."""
    found: dict[tuple[str, int], Tensor] = {}
    for step in () if provenance is None else provenance.steps:
        if step.kind == CUT:
            for entry in PruningPlan.from_json(step.data["plan"]).positions:
                key, kept = (entry.tensor, entry.axis), torch.tensor(entry.kept, dtype=torch.long)
                found[key] = found[key][kept] if key in found else kept
    return found


def kept(small: nn.Module) -> dict[str, dict[int, tuple[int, ...]]]:
    """Which positions of the first model's tensors a cut model still has, however often it was cut.

    Args:
        small: what `prune` or `prune_by_score` returned, or what was cut out of that again.

    Returns:
        Parameter or buffer -> axis -> positions in the model before it was ever cut, ascending. Axes that
        stayed whole are not there: `kept(small)["conv1.weight"][0]` are the filters that stayed.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> gated = swan.swanify(net, torch.zeros(1, 3))
        >>> gated.close("0", [1, 4])
        >>> swan.kept(swan.prune(gated))["2.weight"]
        {1: (0, 2, 3, 5, 6, 7)}
    """
    found: dict[str, dict[int, tuple[int, ...]]] = defaultdict(dict)
    for (name, axis), positions in positions_of(provenance_of(small)).items():
        found[name][axis] = tuple(positions.tolist())
    return dict(found)


__all__ = ["kept", "positions_of"]
