"""Parts of a batch: which rows take a branch, what it gives for them, and all in order again."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from swan_surgery.adaptive.probing import close
from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import InputError
from swan_surgery.models import copy_of, doubled
from swan_surgery.models.batches import check_batch


def margin_score(light: Any) -> Tensor:
    """1 - (the largest class probability - the second), per sample, for class scores [B, C, ...]: 0 is certain.

    Raises:
        InputError: the output is no tensor of class scores.
    """
    if not isinstance(light, Tensor):
        leaves = [t for t in tree_flatten(light)[0] if isinstance(t, Tensor)]
        light = leaves[0] if len(leaves) == 1 else None
    if light is None or light.ndim < 2 or light.shape[1] < 2 or not light.is_floating_point():
        raise InputError(
            'decide="margin" needs class scores [B, classes, ...] as the only output; take decide="predicted"'
        )
    best = light.float().softmax(1).topk(2, dim=1).values
    score: Tensor = 1 - (best[:, 0] - best[:, 1])
    return score.flatten(1).mean(1) if score.ndim > 1 else score


def leaving(scores: Tensor, threshold: float) -> Tensor:
    """Which samples leave, bool: compared in a type that holds both numbers, where a threshold lies between two scores."""
    wide = torch.float32 if scores.device.type == "mps" else torch.float64
    return scores.to(wide) <= threshold


def merged(light: Any, full: Any, order: Tensor) -> Any:
    """Outputs of the two parts of a batch as one; `order`: which samples they are, the light branch's first."""
    ones, structure = tree_flatten(light)
    twos = tree_flatten(full)[0]
    back = order.argsort()
    together = [
        torch.cat([a, b]).index_select(0, back) if isinstance(a, Tensor) else a
        for a, b in zip(ones, twos, strict=True)
    ]
    return tree_unflatten(together, structure)


def rows_of(output: Any, rows: Tensor) -> Any:
    """The output for some rows of the batch."""
    leaves, structure = tree_flatten(output)
    own = [t.index_select(0, rows) if isinstance(t, Tensor) else t for t in leaves]
    return tree_unflatten(own, structure)


def run_branch(branch: nn.Module, crossing: Tensor) -> Any:
    """Run a branch on a part of a batch.

    Raises:
        InputError: a single row, and batch-norms in train mode.
    """
    if len(crossing) == 1 and any(
        isinstance(m, _BatchNorm) and m.training for m in branch.modules()
    ):
        raise InputError(
            "one sample of the batch takes a branch whose batch-norms are in train mode, which need two; train by "
            "routed.loss(batch), which runs whole batches, and route in eval mode: routed.eval()"
        )
    return branch(crossing)


def writes_to_input(branch: nn.Module, crossing: Tensor) -> bool:
    """Whether a branch works in place on what it is given, in either mode; tried on a copy of it."""
    for training in (False, True):
        own = copy_of(branch).train(training)
        given = doubled(crossing.detach().clone())  # batch-norm wants two samples
        before = given._version  # noqa: SLF001 - torch counts what is written there
        try:
            with torch.no_grad(), streams_kept(0):
                own(given)
        except Exception:  # noqa: BLE001 - the user's own code may raise anything
            return True
        if given._version != before:  # noqa: SLF001
            return True
    return False


def is_plain(branch: nn.Module) -> bool:
    """Whether all of its modules are torch's own, so that what they do to their input in one run they do in all."""
    return all(type(module).__module__.startswith("torch.nn.") for module in branch.modules())


def check_apart(branch: nn.Module, crossing: Tensor, what: str) -> None:
    """Refuse a branch that mixes samples: on a part of a batch it would give something else. In eval mode.

    Raises:
        InputError: `what` the branch is, and what to do.
    """
    count = len(crossing)
    # Other values on both sides, larger ones among them: whatever is taken over the batch is another one then.
    before, behind = crossing.flip(0) * 3 + 1, crossing.flip(tuple(range(crossing.ndim))) * -0.5
    rows = torch.arange(count, device=crossing.device)
    with torch.no_grad(), streams_kept():
        alone, again = branch(crossing.clone()), branch(crossing.clone())
        if not _alike(alone, again):
            return  # draws at random, so that nothing can be told
        try:
            together = branch(torch.cat([before, crossing, behind]))
            halves = [branch(crossing[own].clone()) for own in (rows[:1], rows[1:]) if len(own)]
        except Exception:  # noqa: BLE001 - it runs for some numbers of samples alone
            together, halves = None, []
    follows = all(len(t) == 3 * count for t in tree_leaves(together) if isinstance(t, Tensor))
    parted = [alone, *(rows_of(alone, own) for own in (rows[:1], rows[1:]) if len(own))]
    found = [rows_of(together, rows + count) if follows else together, *halves]
    if together is None or not all(map(_alike, parted, found)):
        raise InputError(
            f"{what} mixes samples: a sample comes out otherwise when others are beside it (batch-norm without running "
            f"statistics?), so that no part of a batch can take another way; switch behind what mixes them"
        )


def _alike(one: Any, two: Any) -> bool:
    pairs = zip(tree_flatten(one)[0], tree_flatten(two)[0], strict=True)
    return all(
        a.shape == b.shape and close(a.nan_to_num(), b.nan_to_num())
        for a, b in pairs
        if isinstance(a, Tensor)
    )


def learning_(module: nn.Module) -> None:
    """Let all of its parameters learn that can: whole numbers cannot."""
    for own in module.parameters():
        own.requires_grad_(own.is_floating_point() or own.is_complex())


def detached(output: Any) -> Any:
    """The output without gradients."""
    leaves, structure = tree_flatten(output)
    return tree_unflatten([t.detach() if isinstance(t, Tensor) else t for t in leaves], structure)


def arguments_of(batch: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as arguments of the model, copied to its device: as in `swan.calibrate`.

    Raises:
        InputError: it is no batch, or holds no samples.
    """
    check_batch(batch)
    if isinstance(batch, Mapping):
        own = {k: v.to(device, copy=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
        return (), {k: v for k, v in own.items() if k != "labels"}
    first = batch[0] if isinstance(batch, (tuple, list)) else batch
    return (first.to(device, copy=True),), {}


def labels_of(batch: Any) -> Any:
    """The labels of a batch; None where it has none."""
    if isinstance(batch, Mapping):
        return batch.get("labels")
    return batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None


__all__ = [
    "arguments_of",
    "check_apart",
    "detached",
    "is_plain",
    "labels_of",
    "learning_",
    "leaving",
    "margin_score",
    "merged",
    "rows_of",
    "run_branch",
    "writes_to_input",
]
