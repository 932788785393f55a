"""`compact`: the adaptive model as it is shipped, verified against the masked one."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from swan_surgery.adaptive.adaptive_model import AdaptiveModel
from swan_surgery.adaptive.block import with_tensors
from swan_surgery.adaptive.checks import check_adaptive
from swan_surgery.adaptive.free_block import FreeBlock
from swan_surgery.adaptive.nested_block import NestedBlock
from swan_surgery.adaptive.probing import batch_of, close, twice
from swan_surgery.adaptive.run import Execution
from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import InputError, VerificationError
from swan_surgery.models import Inputs, sharing_copy_of


def compact(
    adapted: AdaptiveModel,
    *,
    execution: Literal["auto", "group", "gather", "masked"] = "auto",
    verify: bool = True,
) -> AdaptiveModel:
    """A copy in eval mode that runs what samples take, and nothing else; it shares all weights.

    Each width of a block is a module whose weights are views of the block's: no weight is copied. Means of
    closed channels are folded into biases once, so call it again when weights or statistics have changed.

    Args:
        adapted: the result of `adapt`, calibrated and fitted; not changed.
        execution: "group" ("auto" for nested widths): a batch is split by width, each part runs densely, and
            the results are put back in order. "gather" ("auto" for free units): samples with the same mask run
            densely on slices of the weights, which are copies made at each call. Of blocks of neurons "group": each
            block runs the tokens that have it open, on views of the weights. ONNX holds groups. "masked": everything
            runs and masks are multiplied: the reference, and what `torch.export` takes; it saves no time.
        verify: run both ways on the example inputs, at every width and at widths at random, and compare.

    Raises:
        ModelError: not an adaptive model.
        InputError: another `execution`, or one of another structure.
        VerificationError: the two ways differ.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> small = swan.compact(swan.adapt(net, torch.zeros(2, 3)))
        >>> with small.holding(0):
        ...     narrowest = small(torch.ones(1, 3))
    """
    check_adaptive(adapted, to="make compact", compact=True)
    dense: Execution = "gather" if adapted.structure.kind == "free" else "group"
    if execution not in ("auto", dense, "masked"):
        raise InputError(
            f'execution must be "auto", "{dense}" or "masked" for structure="{adapted.structure.kind}"; '
            f"got {execution!r}"
        )
    small = sharing_copy_of(adapted)
    assert isinstance(small, AdaptiveModel)  # noqa: S101 - a copy of one
    small.eval()
    small.is_compact = True
    small.execution = "masked" if execution == "masked" else dense
    with torch.inference_mode(mode=False), torch.no_grad():
        for block in small.blocks().values():
            if isinstance(block, FreeBlock):
                block.bind()
            if isinstance(block, NestedBlock):
                block.bound = tuple(
                    with_tensors(block.shell(level), block.tensors(level))
                    for level in range(block.num_levels - 1)
                )
        if verify:
            _verify(small, (dense, "masked"))
    return small


def _verify(small: AdaptiveModel, ways: tuple[Execution, ...]) -> None:
    inputs = _own_inputs(small)
    inputs = twice(inputs, batch_of(inputs))
    device = next(small.parameters()).device
    before = small.execution
    try:
        for tried in small.choices.tried(batch_of(inputs), torch.Generator().manual_seed(0)):
            levels = tried.to(device) if isinstance(tried, Tensor) else tried
            outputs = []
            for way in ways:
                small.execution = way
                with small.holding(levels), streams_kept():
                    outputs.append(inputs.run(small))
            _compare(*outputs, levels=tried)
    finally:
        small.execution = before


def _compare(found: Any, wanted: Any, *, levels: Any) -> None:
    for own, other in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
        if isinstance(own, Tensor) and not close(own, other):
            error = float((own - other).abs().max() / other.abs().max())
            raise VerificationError(
                f"the compact model differs from the masked one by {error:.1e} of the largest output at "
                f"levels {levels}; please report this model"
            )


def _own_inputs(small: AdaptiveModel) -> Inputs:
    reference = next(p for p in small.parameters() if p.is_floating_point())

    def move(tensor: Tensor) -> Tensor:
        dtype = reference.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(reference.device, dtype)

    return small.structure.example_inputs.map(move)


__all__ = ["compact"]
