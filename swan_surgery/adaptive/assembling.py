"""From groups that adapt to the adaptive model: its blocks, put in the places of the given ones."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from swan_surgery.adaptive.adaptive_model import AdaptiveModel
from swan_surgery.adaptive.block import AdaptiveBlock
from swan_surgery.adaptive.candidates import NestedGroup
from swan_surgery.adaptive.costs import BlockCosts, block_costs, unit_costs
from swan_surgery.adaptive.effort import Effort, features_of
from swan_surgery.adaptive.free_block import FreeBlock
from swan_surgery.adaptive.levels import narrowing
from swan_surgery.adaptive.matrices import matrix_of
from swan_surgery.adaptive.nested_block import NestedBlock
from swan_surgery.adaptive.probing import Probe, close
from swan_surgery.adaptive.span_block import SpanBlock
from swan_surgery.adaptive.statics import shell_at
from swan_surgery.adaptive.structure import Structure, open_mask
from swan_surgery.adaptive.token_block import TokenBlock
from swan_surgery.adaptive.unit_gates import UnitGates
from swan_surgery.adaptive.units import Shells, units_of
from swan_surgery.channels import ChannelMap
from swan_surgery.costs.table import CostTable
from swan_surgery.cutting.plan import make_plan
from swan_surgery.errors import ModelError
from swan_surgery.models import Inputs
from swan_surgery.models.evaluated import outputs_of


def assembled(
    ordered: nn.Module, table: CostTable, structure: Structure, probed: Probe
) -> AdaptiveModel:
    """The adaptive model.

    Args:
        ordered: a private model whose units are in order; used up.
        table: of its MACs.
        structure: what adapts.
        probed: how its blocks are called.
    """
    names = list(dict.fromkeys(group.block for group in structure.groups))
    looks = names if structure.per == "block" else names[:1]
    last = {name: _is_last(structure, name) for name in names}
    first = {name: probed.rows[name].first(probed.calls[name].arguments) for name in looks}
    if structure.kind == "blocks":
        sizes = {name: own.shape[-1] for name, own in first.items()}
    else:
        sizes = {
            name: features_of(own, channels_last=last[name]).shape[1] for name, own in first.items()
        }
    make = {"nested": _nested, "free": _free, "blocks": _tokens}[structure.kind]
    model = ordered
    blocks, costs = make(ordered, table, structure, probed, sizes, last)
    for name, block in blocks.items():
        if name:
            ordered.set_submodule(name, block)
        else:
            model = block
    for block in blocks.values():
        block.is_settled = True
    return AdaptiveModel(model, structure, costs)


def as_given(adapted: AdaptiveModel, base: nn.Module, inputs: Inputs) -> AdaptiveModel:
    """The adaptive model, if it computes what the given one does on its example inputs: with all open it shall.

    Raises:
        ModelError: it does not; the model does something else with a block than call it.
    """
    wanted = outputs_of(base, inputs)
    try:
        found = outputs_of(adapted, inputs)
    except (AttributeError, TypeError) as err:
        raise ModelError(
            f"the model does something with its blocks that only modules of their own kind can ({err}): leave them "
            f"out, ignore=[...] ({', '.join(adapted.blocks())})"
        ) from err
    if not all(map(_agree, found, wanted)):
        raise ModelError(
            f"with everything open the adaptive model computes something else than the given one: its code does "
            f"something else with a block than call it (asks for its class, say); leave such blocks out, "
            f"ignore=[...] ({', '.join(adapted.blocks())})"
        )
    return adapted


def _agree(found: Tensor, wanted: Tensor) -> bool:
    """Whether activations are equal up to rounding; labels and boxes that were chosen by rounding are not asked."""
    if found.shape != wanted.shape or not wanted.is_floating_point():
        return True
    there = wanted.isfinite()
    zero = wanted.new_zeros(())
    same = torch.equal(there, found.isfinite())
    return same and close(torch.where(there, found, zero), torch.where(there, wanted, zero))


def _free(
    ordered: nn.Module,
    table: CostTable,
    structure: Structure,
    probed: Probe,
    sizes: Mapping[str, int],
    last: Mapping[str, bool],
) -> tuple[dict[str, AdaptiveBlock], BlockCosts]:
    groups = {name: units_of(structure.groups, name) for name in sizes}
    counts = {name: [len(own.units) for own in groups[name]] for name in sizes}
    looking = sum(size * sum(counts[name]) for name, size in sizes.items())
    costs = unit_costs(table, structure.groups, batch=probed.batch, looking=looking)
    like = reference(ordered)
    blocks: dict[str, AdaptiveBlock] = {}
    for name, size in sizes.items():
        full = ordered.get_submodule(name)
        blocks[name] = FreeBlock(
            name,
            full,
            Shells(full, name, groups[name], structure.channels),
            groups[name],
            effort=UnitGates(size, counts[name], like=like),
            rows=probed.rows[name],
            channels_last=last[name],
        )
    return blocks, costs


def _tokens(
    ordered: nn.Module,
    table: CostTable,
    structure: Structure,
    probed: Probe,
    sizes: Mapping[str, int],
    last: Mapping[str, bool],  # noqa: ARG001 - features of tokens always are
) -> tuple[dict[str, AdaptiveBlock], BlockCosts]:
    outputs = {
        group.block: len(matrix_of(ordered.get_submodule(group.readers[0])))
        for group in structure.groups
    }
    # The gates, and the means of what is closed.
    looking = sum(
        (size + outputs[name])
        * len(structure.sizes[name])
        * torch.Size(structure.tokens[name]).numel()
        for name, size in sizes.items()
    )
    costs = unit_costs(
        table, structure.groups, batch=probed.batch, looking=looking, sizes=structure.sizes
    )
    like = reference(ordered)
    blocks: dict[str, AdaptiveBlock] = {
        name: token_block(
            ordered, name, structure.groups, structure.channels, structure.sizes[name], probed, like
        )
        for name in sizes
    }
    return blocks, costs


def token_block(
    ordered: nn.Module,
    name: str,
    groups: Sequence[NestedGroup],
    channels: ChannelMap,
    sizes: Sequence[int],
    probed: Probe,
    like: Tensor,
) -> TokenBlock:
    """A feed-forward layer with a gate per block of neurons; all are open."""
    full = ordered.get_submodule(name)
    (own,) = units_of(groups, name)
    (writers,) = (group.writers for group in groups if group.block == name)
    cut = len(name) + 1 if name else 0
    first = probed.rows[name].first(probed.calls[name].arguments)
    is_flat = first.ndim == 2 and len(first) != 2 * probed.batch
    kind = (
        partial(SpanBlock, writers=[own[cut:] for own in writers], is_flat=is_flat)
        if writers
        else TokenBlock
    )
    return kind(
        name,
        full,
        Shells(full, name, [own], channels),
        own,
        sizes,
        effort=UnitGates(first.shape[-1], [len(sizes)], like=like),
        rows=probed.rows[name],
    )


def _nested(
    ordered: nn.Module,
    table: CostTable,
    structure: Structure,
    probed: Probe,
    sizes: Mapping[str, int],
    last: Mapping[str, bool],
) -> tuple[dict[str, AdaptiveBlock], BlockCosts]:
    groups, widths, counts = structure.groups, structure.widths, structure.counts
    shells = [_shells(ordered, structure, level) for level in range(len(widths) - 1)]
    like = reference(ordered)
    costs = block_costs(table, groups, counts, batch=probed.batch, looking=sum(sizes.values()))
    extra = {name: own - own[0] for name, own in costs.blocks.items()}
    if structure.per == "network":
        extra[next(iter(sizes))] = torch.stack(list(extra.values())).sum(0)
    blocks: dict[str, AdaptiveBlock] = {}
    for name in last:
        own = [group for group in groups if group.block == name]
        kept = [counts[place] for place, group in enumerate(groups) if group.block == name]
        blocks[name] = NestedBlock(
            name,
            ordered.get_submodule(name),
            [level[name] for level in shells],
            [
                narrowing(own, [each[level] for each in kept], name)
                for level in range(len(widths) - 1)
            ],
            effort=Effort(sizes[name], len(widths), like=like) if name in sizes else None,
            rows=probed.rows[name],
            channels_last=last[name],
            extra=extra[name].to(like.device),
        )
    return blocks, costs


def reference(model: nn.Module) -> Tensor:
    """A tensor of the model's type and device."""
    return next(p for p in model.parameters() if p.is_floating_point())


def _is_last(structure: Structure, block: str) -> bool:
    """Whether channels are the last axis of what goes into a block: its first layer is linear."""
    for layer in structure.channels.layers:
        if not block or layer.name.startswith(f"{block}."):
            return "conv" not in layer.op
    return False


def _shells(model: nn.Module, structure: Structure, level: int) -> Mapping[str, nn.Module]:
    """All blocks at a level, without data; whoever reads what is closed has a bias."""
    mask = open_mask(structure, dict.fromkeys((g.block for g in structure.groups), level))
    readers = [reader for group in structure.groups for reader in group.readers]
    shell = shell_at(model, make_plan(structure.channels, mask), readers)
    return {g.block: shell.get_submodule(g.block) for g in structure.groups}


__all__ = ["assembled", "reference", "token_block"]
