"""Learning from the dense network: its outputs as soft targets."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from swan_surgery.errors import InputError
from swan_surgery.models.outputs import iter_named_tensors, spread_of


Head = Literal["softmax", "sigmoid", "regression"]


def distillation_loss(
    outputs: Any,
    teacher_outputs: Any,
    *,
    temperature: float = 4.0,
    head: Head | Mapping[str, Head] = "softmax",
) -> Tensor:
    """How far outputs are from the teacher's, for classes, independent labels, or numbers.

    "softmax": Kullback-Leibler divergence from the teacher's softened classes along the last axis, times
    temperature squared (Hinton, Vinyals, Dean, arXiv:1503.02531: the factor keeps gradients comparable over
    temperatures). "sigmoid": the same for each logit alone, which is a label of its own. "regression":
    squared difference over the variance of the teacher's values. Each is a mean, so a mixture such as
    `0.1 * task_loss + 0.9 * distillation_loss(...)` needs no other weights.

    Args:
        outputs: of the network that learns: logits of shape (..., classes), or all that it returns, in
            tuples, dicts or dataclasses.
        teacher_outputs: of the dense network, same shapes; no gradient flows into it.
        temperature: above 0; higher shows more of the wrong classes.
        head: what the outputs are; for several of different kinds a mapping from their names (indices,
            keys and attributes joined by dots, or glob patterns; the first that matches counts). Outputs
            that it does not name play no part.

    Returns:
        A scalar: the mean over outputs, positions and samples.

    Raises:
        InputError: shapes or names differ, an unknown head, no output that `head` names, or `temperature`
            not above 0.

    Example:
        >>> import torch
        >>> same = torch.tensor([[2.0, 0.0, -1.0]])
        >>> float(distillation_loss(same, same))
        0.0
        >>> boxes = {"classes": same, "boxes": torch.ones(1, 4)}
        >>> kinds = {"classes": "sigmoid", "boxes": "regression"}
        >>> float(distillation_loss(boxes, boxes, head=kinds))
        0.0
    """
    if not temperature > 0:
        raise InputError(f"temperature must be above 0; got {temperature}")
    heads = head if isinstance(head, Mapping) else {"*": head}
    for given in heads.values():
        if given not in get_args(Head):
            raise InputError(f"head must be one of {', '.join(get_args(Head))}; got {given!r}")
    found, wanted = (_floating(value) for value in (outputs, teacher_outputs))
    if [(n, y.shape) for n, y in found.items()] != [(n, y.shape) for n, y in wanted.items()]:
        seen = (
            ", ".join(f"{name} {tuple(y.shape)}".strip() for name, y in own.items())
            for own in (found, wanted)
        )
        raise InputError(
            f"the outputs ({next(seen)}) and the teacher's ({next(seen)}) must have the same shapes"
        )
    parts = []
    for name, own in found.items():
        kind = next((kind for at, kind in heads.items() if fnmatch(name, at)), None)
        if kind is not None:
            parts.append(_LOSSES[kind](own, wanted[name].detach(), temperature))
    if not parts:
        raise InputError(
            f"head names {', '.join(heads)}, but the outputs are called {', '.join(found) or 'nothing'}"
        )
    return torch.stack(parts).mean()


def _floating(outputs: Any) -> dict[str, Tensor]:
    """Outputs by name; a number for the whole batch is a loss computed along, if there is more."""
    found = {n: y for n, y in iter_named_tensors(outputs) if y.is_floating_point()}
    return {n: y for n, y in found.items() if y.ndim} or found


def _classes(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    student = F.log_softmax(logits / temperature, dim=-1).flatten(0, -2)
    target = F.log_softmax(teacher / temperature, dim=-1).flatten(0, -2)
    return F.kl_div(student, target, reduction="batchmean", log_target=True) * temperature**2


def _labels(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    student, target = logits / temperature, teacher / temperature
    p = target.sigmoid()
    own = p * (F.logsigmoid(target) - F.logsigmoid(student))
    other = (1 - p) * (F.logsigmoid(-target) - F.logsigmoid(-student))
    return (own + other).mean() * temperature**2


def _numbers(values: Tensor, teacher: Tensor, _temperature: float) -> Tensor:
    return (values - teacher).square().mean() / spread_of(teacher).square().to(values.dtype)


_LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "softmax": _classes,
    "sigmoid": _labels,
    "regression": _numbers,
}
