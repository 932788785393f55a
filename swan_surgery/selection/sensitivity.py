"""How much each group of channels can lose before it is cut: the loss at several widths."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from swan_surgery.channels import PINNED
from swan_surgery.environment.notebooks import html_table
from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import InputError
from swan_surgery.gates import GatedModel, magnitudes
from swan_surgery.gates.checks import check_gated
from swan_surgery.models.batches import batches_in
from swan_surgery.models.checks import check_data
from swan_surgery.models.modes import evaluating
from swan_surgery.selection.importance import called


@dataclass(frozen=True, slots=True)
class GroupSensitivity:
    """One group of units that share a width.

    Attributes:
        layers: whose output channels hang on it, in the order of the model.
        units: how many.
        losses: at each share of the units, those with the lowest scores closed.
    """

    layers: tuple[str, ...]
    units: int
    losses: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class SensitivityTable:
    """The loss of a model with one group narrowed at a time.

    Attributes:
        shares: of a group's units that stay.
        whole: the loss with all units open.
        groups: those that hurt most first, by the loss at the smallest share.
        num_batches: that the losses are means over.
    """

    shares: tuple[float, ...]
    whole: float
    groups: tuple[GroupSensitivity, ...]
    num_batches: int

    def __str__(self) -> str:
        """A table; losses beside the whole model's."""
        table = Table(
            "group",
            "units",
            *(f"{share:.0%}" for share in self.shares),
            title=f"loss {self.whole:.4g} with everything open; with a share of one group",
        )
        for group in self.groups:
            more = f" +{len(group.layers) - 1}" if len(group.layers) > 1 else ""
            name = f"{group.layers[0]}{more}"
            table.add_row(name, str(group.units), *(f"{loss:.4g}" for loss in group.losses))
        console = Console(width=100)
        with console.capture() as text:
            console.print(table)
        return text.get().rstrip("\n")

    def _repr_html_(self) -> str:
        """The same table as a picture: the more a group hurts, the darker its cell."""
        worst = max((loss for group in self.groups for loss in group.losses), default=self.whole)
        span = max(worst - self.whole, 1e-12)
        rows, heat = [], []
        for group in self.groups:
            names = ", ".join(group.layers[:3]) + (", ..." if len(group.layers) > 3 else "")
            rows.append((names, str(group.units), *(f"{loss:.4g}" for loss in group.losses)))
            shades = (max(0.0, (loss - self.whole) / span) for loss in group.losses)
            heat.append((None, None, *shades))
        header = ("group", "units", *(f"{share:.0%} stay" for share in self.shares))
        return html_table(f"loss {self.whole:.4g} with everything open", header, rows, heat=heat)

    def to_json(self) -> str:
        """Everything, as JSON."""
        rows = [
            {"layers": own.layers, "units": own.units, "losses": own.losses} for own in self.groups
        ]
        return json.dumps({"shares": self.shares, "whole": self.whole, "groups": rows})


def sensitivity(
    gated: GatedModel,
    batches: Iterable[Any],
    *,
    loss: Callable[[nn.Module, Any], Tensor],
    shares: Sequence[float] = (0.75, 0.5, 0.25),
    scores: Tensor | None = None,
    num_batches: int | None = None,
) -> SensitivityTable:
    """The loss with one group of channels narrowed at a time: where a cut would hurt, before it is made.

    Groups are what shares one width: the output of a layer, or the trunk of a residual stage. In each, the
    units with the lowest scores close; nothing else about the model changes, and nothing is trained.
    Takes a pass over the batches per group and share.

    Args:
        gated: the gated model; gates are as they were afterwards.
        batches: what `loss` takes.
        loss: `loss(model, batch)`, a scalar.
        shares: of a group's units that stay, in (0, 1]; at least one unit does.
        scores: one per unit, as `swan.importance` gives them; by default the magnitude of their weights.
        num_batches: how many batches to use at most; all of them by default.

    Raises:
        ModelError: `gated` is not a gated model, or lies on the meta device.
        InputError: no batches, a share out of range, scores of another shape.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> gated = swan.swanify(net, torch.zeros(1, 3))
        >>> data = [(torch.randn(16, 3), torch.randint(2, (16,)))]
        >>> loss = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> found = swan.sensitivity(gated, data, loss=loss, shares=(0.5,))
        >>> found.groups[0].layers, found.groups[0].units
        (('0',), 8)
    """
    check_gated(gated)
    check_data(gated, to="measure sensitivity")
    if not shares or not all(0 < share <= 1 for share in shares):
        raise InputError(f"shares are numbers in (0, 1]; got {tuple(shares)}")
    if scores is None:
        scores = magnitudes(gated.model, gated.channels)
    if scores.shape != (gated.gates.num_units,):
        raise InputError(
            f"scores must have shape ({gated.gates.num_units},), one per unit; got {tuple(scores.shape)}"
        )
    kept = list(batches_in(batches, num_batches))
    if not kept:
        raise InputError("batches yielded no batch, so there is no loss to look at")
    scores = scores.double().cpu()
    is_open = torch.ones(len(scores), dtype=torch.bool, device=gated.gates.logits.device)
    with evaluating(gated), torch.no_grad(), streams_kept():
        whole = _loss(gated, is_open, kept, loss)
        groups = []
        for members in gated.channels.unit_groups:
            order = torch.tensor(members)[scores[list(members)].argsort(descending=True)]
            losses = []
            for share in shares:
                mask = is_open.clone()
                mask[order[max(1, round(share * len(order))) :]] = False
                losses.append(_loss(gated, mask, kept, loss))
            groups.append(GroupSensitivity(_layers(gated, members), len(members), tuple(losses)))
    least = min(range(len(shares)), key=lambda index: shares[index])
    groups.sort(key=lambda group: -group.losses[least])
    return SensitivityTable(tuple(shares), whole, tuple(groups), len(kept))


def _loss(
    gated: GatedModel,
    mask: Tensor,
    batches: Sequence[Any],
    loss: Callable[[nn.Module, Any], Tensor],
) -> float:
    with gated.gates.holding(mask):
        return sum(float(called(loss, gated, batch)) for batch in batches) / len(batches)


def _layers(gated: GatedModel, members: Sequence[int]) -> tuple[str, ...]:
    own = set(members) - {PINNED}
    return tuple(layer.name for layer in gated.channels.layers if own & set(layer.out_units))


__all__ = ["GroupSensitivity", "SensitivityTable", "sensitivity"]
