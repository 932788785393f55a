"""What a file holds of an adaptive model beside its weights: structure, statistics, and who looks at what."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swan_surgery.adaptive import AdaptiveModel, compact
from swan_surgery.adaptive.adapting import adapt_in_order
from swan_surgery.adaptive.allocation import Counts
from swan_surgery.adaptive.block import AdaptiveBlock
from swan_surgery.adaptive.nested_block import NestedBlock
from swan_surgery.artifacts.structures import encode, map_digest
from swan_surgery.errors import ArtifactError, SwanError
from swan_surgery.models import Inputs


PREFIX = "adaptive/"


def adaptive_part(adapted: AdaptiveModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of what is not the dense model."""
    structure = adapted.structure
    given = (structure.example_inputs.args, dict(structure.example_inputs.kwargs))
    inputs, leaves = encode(given)
    tensors = {f"inputs/{i}": t.detach().clone().contiguous() for i, t in enumerate(leaves)}
    for index, block in enumerate(adapted.blocks().values()):
        for name, tensor in block.own_state().items():
            tensors[f"{PREFIX}{index}/{name}"] = tensor.detach().clone().contiguous()
    header = {
        "structure": structure.kind,
        "per": structure.per,
        "widths": list(structure.widths),
        "counts": [list(own) for own in structure.counts],
        "block_size": structure.block_size,
        "ignore": list(structure.ignored),
        "blocks": _blocks(adapted),
        "map": map_digest(structure.channels),
        "execution": adapted.execution,
        "max_macs": adapted.max_macs,
        "compact": adapted.is_compact,
        "training": adapted.training,
        "inputs": inputs,
    }
    return header, tensors


def _blocks(adapted: AdaptiveModel) -> list[list[Any]]:
    groups = adapted.structure.groups
    return [
        [name, [len(g.units) for g in groups if g.block == name]] for name in adapted.costs.blocks
    ]


def _own_readers_(block: AdaptiveBlock, saved: Mapping[str, Tensor]) -> None:
    """Places for the readers that levels of the saved block had for themselves."""
    if not isinstance(block, NestedBlock):
        return
    for level in range(block.num_levels - 1):
        if f"statistics.{level}.weight_0" in saved:
            block.own_readers_(level)


def _counts(header: Mapping[str, Any]) -> Counts | None:
    """How many units each width keeps; None in files of versions that had the same share in all groups."""
    counts = header.get("counts")
    if counts is None:
        return None
    if not isinstance(counts, list) or not all(isinstance(own, list) for own in counts):
        raise ArtifactError(
            f"the file keeps {counts!r} units at its widths: these are no lists of numbers"
        )
    return tuple(tuple(own) for own in counts)


def rebuilt_adaptive(
    path: Path,
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    base: nn.Module,
    inputs: Inputs,
) -> AdaptiveModel:
    """The adaptive model around a base model with its weights, whose channels are in order already.

    Raises:
        ArtifactError: this version adapts other blocks.
    """
    try:
        adapted = adapt_in_order(
            base,
            inputs,
            structure=header["structure"],
            per=header["per"],
            widths=tuple(header["widths"]),
            block_size=header.get("block_size", 1),
            ignore=header["ignore"],
            counts=_counts(header),
        )
    except SwanError as err:
        raise ArtifactError(f"{path}: the model could not be adapted again: {err}") from err
    if (
        _blocks(adapted) != header["blocks"]
        or map_digest(adapted.structure.channels) != header["map"]
    ):
        raise ArtifactError(
            f"{path}: this version adapts other channels than the one that saved it; load it with "
            f"swan_surgery as named in the file"
        )
    for index, block in enumerate(adapted.blocks().values()):
        prefix = f"{PREFIX}{index}/"
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        _own_readers_(block, own)
        state = block.own_state()
        if set(own) != set(state):
            raise ArtifactError(f"{path}: block {block.name!r} has other statistics")
        for name, tensor in state.items():
            if tensor.shape != own[name].shape:
                raise ArtifactError(f"{path}: {name!r} of block {block.name!r} has another shape")
            with torch.no_grad():
                tensor.copy_(own[name])
    if header["execution"] in ("group", "gather", "masked"):
        adapted.execution = header["execution"]
    adapted.max_macs = None if header["max_macs"] is None else int(header["max_macs"])
    adapted.training = bool(header["training"])
    if not header["compact"]:
        return adapted
    return compact(adapted, execution="masked" if adapted.execution == "masked" else "auto")


__all__ = ["PREFIX", "adaptive_part", "rebuilt_adaptive"]
