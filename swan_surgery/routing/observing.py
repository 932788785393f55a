"""One pass over data with all parts of a routed model: scores, harm and distances of every sample."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import InputError
from swan_surgery.models.modes import evaluating
from swan_surgery.routing.arguments import check_kinds
from swan_surgery.routing.losses import per_sample
from swan_surgery.routing.parts import Ending
from swan_surgery.routing.routed_model import RoutedModel
from swan_surgery.routing.rows import arguments_of, labels_of, margin_score


# (light output, full output, labels) -> a loss between 0 and 1 per sample, shape [B].
Harm = Callable[[Any, Any, Any], Tensor]


_TOKENS = 3  # axes of [B, C, T] and of [B, T, C]; of images the classes lie in front
_TOLD = {"harm": "harm", "right": "what is right", "labels": "labels", "margin": "margins"}


@dataclass(frozen=True)
class Observed:
    """Every sample at every switch, whether or not it would get there; float64 on the CPU.

    Attributes:
        scores: by way of deciding, [switches, N].
        harm: what a sample that leaves at a switch loses, between 0 and 1, [switches, N]; None without labels.
        apart: the discrepancy of light and full, [switches, N].
        right: where the full branch [last row] and each light branch are right, [switches + 1, N]; None where there
            are no labels of classes.
        labels: as the loader gave them, if any.
        counts: the harm is 0 or 1.
        data: SHA-256 of all samples.
    """

    scores: dict[str, Tensor]
    harm: Tensor | None
    apart: Tensor
    right: Tensor | None
    labels: Tensor | None
    counts: bool
    data: str

    @property
    def num_samples(self) -> int:
        """How many there are."""
        return self.apart.shape[1]


class _Columns:
    """Grows by batches."""

    def __init__(self) -> None:
        self.found: dict[str, list[Tensor]] = {}

    def add(self, name: str, values: Tensor | list[Tensor]) -> None:
        own = torch.stack(list(values)) if isinstance(values, list) else values
        self.found.setdefault(name, []).append(own.detach().double().cpu())

    def get(self, name: str) -> Tensor | None:
        own = self.found.get(name)
        return None if own is None else torch.cat(own, _samples_axis(own[0]))


def _samples_axis(values: Tensor) -> int:
    """Labels have one row; all else one for each switch."""
    return min(1, values.ndim - 1)


def observe(routed: RoutedModel, loader: Iterable[Any], *, harm: Harm | None = None) -> Observed:
    """Run all parts on everything, in eval mode.

    Raises:
        InputError: no batches, or a harm that is not between 0 and 1.
    """
    if isinstance(loader, Tensor) or not isinstance(loader, Iterable):
        raise InputError(
            f"a loader yields batches; got {type(loader).__name__}; for a single batch pass [batch]"
        )
    columns, digest = _Columns(), hashlib.sha256()
    counts = True
    with evaluating(routed), torch.no_grad(), streams_kept():
        for batch in loader:
            counts &= _observe(routed, batch, harm, columns, digest)
    apart = columns.get("apart")
    if apart is None:
        raise InputError("the loader yielded no batch")
    for name, parts in columns.found.items():
        if sum(own.shape[_samples_axis(own)] for own in parts) != apart.shape[-1]:
            raise InputError(
                f"some batches tell {_TOLD.get(name, name)} and others do not: give labels with all of them, of one "
                f"kind, or with none"
            )
    predicted = columns.get("predicted")
    if not all(bool(own.isfinite().all()) for own in (apart, predicted) if own is not None):
        raise InputError(
            "on some samples the parts of the model give NaN or infinity: look for these in the batches, and leave them "
            "out"
        )
    ways = ("predicted", "margin", "label")
    scores = {way: own for way in ways if (own := columns.get(way)) is not None}
    return Observed(
        scores,
        columns.get("harm"),
        apart,
        columns.get("right"),
        columns.get("labels"),
        counts,
        digest.hexdigest(),
    )


def _observe(
    routed: RoutedModel, batch: Any, harm: Harm | None, columns: _Columns, digest: Any
) -> bool:
    args, kwargs = arguments_of(batch, routed.device)
    labels = labels_of(batch)
    for leaf in tree_leaves((args, kwargs, labels)):
        if isinstance(leaf, Tensor):
            digest.update(_bytes(leaf))
    check_kinds(routed.parts.trunk, routed.example_inputs, args, kwargs)
    full, lights, predicted = routed.body(*args, **kwargs)
    chain = routed.parts.chain
    endings = [isinstance(own.light, Ending) for own in chain]
    # Whether it is a distance or a label that a switch predicts, its own light branch says.
    if any(endings):
        columns.add("label", list(predicted))
    if not all(endings):
        columns.add("predicted", list(predicted))
        if _are_scores(full):
            columns.add("margin", [margin_score(light) for light in lights])
    columns.add("apart", [routed.discrepancies(light, full) for light in lights])
    found = _harm(routed, lights, full, batch, harm)
    if found is not None:
        if not bool(((found >= 0) & (found <= 1)).all()):
            raise InputError("harm must lie between 0 and 1 for every sample")
        columns.add("harm", found)
    right = _right([*lights, full], labels)
    if right is not None:
        columns.add("right", right)
    if isinstance(labels, Tensor) and labels.ndim == 1:
        columns.add("labels", labels)
    return found is None or bool(((found == 0) | (found == 1)).all())


def _harm(
    routed: RoutedModel, lights: Any, full: Any, batch: Any, harm: Harm | None
) -> Tensor | None:
    labels = labels_of(batch)
    if harm is not None:
        count = _only(full).shape[0]
        losses = [per_sample(harm(light, full, labels), count, "loss") for light in lights]
        return torch.stack(losses)
    if labels is None:
        return None
    endings = [isinstance(own.light, Ending) for own in routed.parts.chain]
    if any(endings) and routed.positive is None:
        return None
    positive = routed.positives(batch).double() if any(endings) else None
    right = None if all(endings) else _right([*lights, full], labels)
    if positive is None and right is None:
        return None
    rows = []
    for level, is_ending in enumerate(endings):
        if is_ending:
            assert positive is not None  # noqa: S101 - there is an ending
            rows.append(positive)
            continue
        if right is None:
            return None
        # Of a sample's positions the share that the full branch has right and the light one wrong.
        lost = right[-1] * (1 - right[level])
        rows.append(lost.reshape(len(lost), -1).mean(1))
    return torch.stack(rows)


def _right(outputs: list[Any], labels: Any) -> Tensor | None:
    """1 where the largest class score is the label's, [outputs, B, ...]; None where there are no such labels."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or not _are_scores(outputs[-1]):
        return None
    scores = [_only(output) for output in outputs]
    axes = _class_axes(scores[-1], labels)
    if len(axes) > 1 and scores[-1].ndim == _TOKENS:
        raise InputError(
            f"outputs {list(scores[-1].shape)} and labels {list(labels.shape)}: the classes may lie on axis 1 or on the "
            f"last one; say what is wrong by loss=lambda light, full, labels: ... between 0 and 1 for each sample"
        )
    if not axes:
        return None
    return torch.stack([(own.argmax(axes[0]) == labels.to(own.device)).double() for own in scores])


def _class_axes(scores: Tensor, labels: Tensor) -> list[int]:
    """Where the classes may lie, so that there is a label for every position: [B, C, ...] or [B, ..., C]."""
    axes = dict.fromkeys([1, scores.ndim - 1])
    return [a for a in axes if (*scores.shape[:a], *scores.shape[a + 1 :]) == tuple(labels.shape)]


def _are_scores(output: Any) -> bool:
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return (
        len(leaves) == 1
        and leaves[0].ndim >= 2
        and leaves[0].shape[1] > 1
        and leaves[0].is_floating_point()
    )


def _only(output: Any) -> Tensor:
    found: Tensor = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
    return found


def _bytes(tensor: Tensor) -> bytes:
    found: bytes = (
        tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    )
    return found


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers, names included."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            found.update(name.encode())
            found.update(_bytes(tensor))
    return found.hexdigest()


__all__ = ["Harm", "Observed", "observe", "weights_digest"]
