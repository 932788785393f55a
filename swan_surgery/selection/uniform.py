"""Widths that are the same in all layers of one role, as a configuration of numbers can say them."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import gcd
from typing import Any

import torch
from torch import Tensor

from swan_surgery.channels import PINNED
from swan_surgery.errors import InputError
from swan_surgery.gates import GatedModel
from swan_surgery.models.configurations import (
    changed,
    configuration_of,
    head_widths,
    is_valid,
    numbers_of,
    widths_said,
)
from swan_surgery.selection.limits import Limit
from swan_surgery.selection.widest_mask import round_widths, widest_mask


@dataclass(frozen=True, slots=True)
class Role:
    """Groups of units that keep the same share of their width.

    Attributes:
        groups: the units of each group.
        steps: how many units of each group come and go at a time.
        size: how many such steps each group has.
        numbers: of the configuration, by dotted name, that say this width; all scale alike.
    """

    groups: tuple[tuple[int, ...], ...]
    steps: tuple[int, ...]
    size: int
    numbers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Uniform:
    """The roles of a model's widths.

    Attributes:
        gated: the gated model.
        roles: every group is in one.
        config: the base model's configuration, with the width of its heads; None where it has none.
        heads: the width of heads, where the configuration did not say it.
    """

    gated: GatedModel
    roles: tuple[Role, ...]
    config: Any = None
    heads: Mapping[str, int] = field(default_factory=dict)

    def values(self, mask: Tensor) -> dict[str, int]:
        """What the configuration's numbers become."""
        found = dict(self.heads)
        old = {} if self.config is None else dict(numbers_of(self.config))
        for role in self.roles:
            found |= {n: old[n] * self._kept(role, mask) // role.size for n in role.numbers}
        return found

    def widest(
        self,
        order: Tensor,
        limits: Sequence[Limit],
        *,
        least: Tensor,
        allowed: Tensor,
        round_to: int = 1,
    ) -> Tensor:
        """As `widest_mask`, in widths that are the same over layers and that the configuration takes.

        Raises:
            BudgetError: even the narrowest layers cost more.
            InputError: no widths below these make a configuration.
        """
        order, least = self._together(order), least.cpu()
        place = torch.empty(len(order), dtype=torch.int64)
        place[order] = torch.arange(len(order))
        allowed = self._allowed(allowed.cpu(), place)

        def widen(mask: Tensor) -> Tensor:
            rounded = round_widths(self.gated, mask.cpu(), round_to, order)
            return self._widened(rounded, place).to(mask.device)

        device = self.gated.gates.logits.device
        search = partial(widest_mask, self.gated, limits=limits, widen=widen)
        mask = search(order, least=least.to(device), allowed=allowed).cpu()
        for _ in self.roles:  # one that comes in large steps blocks the others no longer
            mask = self._valid(mask, place)
            free = allowed & ~mask & self._growing(mask, place, limits)
            if not bool(free.any()):
                break
            mask = search(order, least=mask.to(device), allowed=free | mask).cpu()
        return self._valid(mask, place).to(device)

    def _kept(self, role: Role, mask: Tensor) -> int:
        return max(
            -(-int(mask[list(group)].sum()) // step)
            for group, step in zip(role.groups, role.steps, strict=True)
        )

    def _widened(self, mask: Tensor, place: Tensor) -> Tensor:
        result = mask.clone()
        for role in self.roles:
            _set_(result, role, self._kept(role, mask), place)
        return result

    def _together(self, order: Tensor) -> Tensor:
        """Units that come and go at a time stand beside each other, by their mean place."""
        place = torch.empty(len(order), dtype=torch.float64)
        place[order.cpu()] = torch.arange(len(order), dtype=torch.float64)
        mean = place.clone()
        for role in self.roles:
            ranked = [torch.tensor(g)[place[list(g)].argsort()] for g in role.groups]
            for index in range(role.size):
                bundle = torch.cat(
                    [
                        own[index * step : (index + 1) * step]
                        for own, step in zip(ranked, role.steps, strict=True)
                    ]
                )
                mean[bundle] = place[bundle].mean()
        return mean.argsort(stable=True)

    def _allowed(self, allowed: Tensor, place: Tensor) -> Tensor:
        result = allowed.clone()
        for role in self.roles:
            most = min(
                int(allowed[list(group)].sum()) // step
                for group, step in zip(role.groups, role.steps, strict=True)
            )
            _set_(result, role, max(1, most), place)
        return result

    def _accepts(self, mask: Tensor) -> bool:
        if self.config is None:
            return True
        return is_valid(self.gated.model, changed(self.config, self.values(mask)))

    def _valid(self, mask: Tensor, place: Tensor) -> Tensor:
        """Narrower in one role, by as little as the configuration asks for."""
        if self._accepts(mask):
            return mask
        for role in sorted(self.roles, key=lambda role: -role.size):
            for kept in range(self._kept(role, mask) - 1, 0, -1):
                narrower = mask.clone()
                _set_(narrower, role, kept, place)
                if self._accepts(narrower):
                    return narrower
        raise InputError(
            f"no widths of {type(self.gated.model).__name__} at or below those of the budget make a "
            f"configuration that its class takes; cut without uniform=True"
        )

    def _growing(self, mask: Tensor, place: Tensor, limits: Sequence[Limit]) -> Tensor:
        """Units of the roles that may grow by a step: within the limits, and the configuration's."""
        free = torch.zeros_like(mask)
        for role in self.roles:
            wider = mask.clone()
            _set_(wider, role, min(role.size, self._kept(role, mask) + 1), place)
            on_device = wider.to(self.gated.device)
            if all(limit.allows(on_device) for limit in limits) and self._accepts(wider):
                free[[unit for group in role.groups for unit in group]] = True
        return free


def _set_(mask: Tensor, role: Role, kept: int, place: Tensor) -> None:
    """Let every group of a role keep its first `kept` steps, in order of `place`."""
    for group, step in zip(role.groups, role.steps, strict=True):
        units = torch.tensor(group)
        best = units[place[units].argsort()]
        mask[best[: kept * step]] = True
        mask[best[kept * step :]] = False


def uniform_of(gated: GatedModel) -> Uniform:
    """The roles of a gated model's widths: by its configuration, else by the names of its layers.

    What no number of the configuration says stays whole. Without a configuration a role is what is called
    alike but for the numbers in its name, and is as wide: `blocks.0.mlp.fc1`, `blocks.1.mlp.fc1`, ...
    """
    config = configuration_of(gated.model)
    if config is None:
        return Uniform(gated, tuple(_by_names(gated)))
    heads = head_widths(gated.model, config)
    config = changed(config, heads)
    return Uniform(gated, tuple(_by_configuration(gated, config)), config, heads)


def _by_names(gated: GatedModel) -> Iterator[Role]:
    alike: dict[Any, list[tuple[int, ...]]] = defaultdict(list)
    for group in gated.channels.unit_groups:
        own = set(group)
        names = {
            ".".join("*" if part.isdigit() else part for part in layer.name.split("."))
            for layer in gated.channels.layers
            if own & set(layer.out_units)
        }
        alike[tuple(sorted(names)), len(group)].append(group)
    for (_, size), groups in alike.items():
        yield Role(tuple(groups), (1,) * len(groups), size)


def _by_configuration(gated: GatedModel, config: Any) -> Iterator[Role]:
    said = widths_said(gated.model, config)
    known = {axis for axes in said.values() for axis in axes}
    whole = {(t.tensor, t.axis) for t in gated.channels.tensors if PINNED not in t.units}
    groups = gated.channels.unit_groups
    axes_of = [
        {(t.tensor, t.axis) for t in gated.channels.tensors if not own.isdisjoint(t.units)}
        for own in map(set, groups)
    ]
    members: list[tuple[set[str], set[int]]] = []  # numbers, and the groups whose widths they say
    for index, axes in enumerate(axes_of):
        numbers = {name for name, own in said.items() if own & axes}
        meeting = [entry for entry in members if entry[0] & numbers]
        members = [entry for entry in members if not entry[0] & numbers]
        members.append(
            (
                numbers.union(*(entry[0] for entry in meeting)),
                {index}.union(*(entry[1] for entry in meeting)),
            )
        )
    for numbers, indices in members:
        own = tuple(groups[index] for index in sorted(indices))
        # What no number says, or with what is pinned, comes and goes whole, and the least of it is all.
        is_said = all(axes_of[index] <= known for index in indices)
        is_said &= all(said[name] <= whole for name in numbers)
        size = gcd(*map(len, own)) if is_said else 1
        yield Role(
            own,
            tuple(len(group) // size for group in own),
            size,
            tuple(sorted(numbers | _heads_beside(own, size, said, dict(numbers_of(config))))),
        )


def _heads_beside(
    groups: Sequence[tuple[int, ...]],
    size: int,
    said: Mapping[str, frozenset[Any]],
    values: Mapping[str, int],
) -> set[str]:
    """Numbers of heads that move no axis: heads are a group of a role with wider ones (BERT's trunk)."""
    has_wider = len({len(group) for group in groups}) > 1
    return {n for n, axes in said.items() if not axes and has_wider and values[n] == size}


__all__ = ["Role", "Uniform", "uniform_of"]
