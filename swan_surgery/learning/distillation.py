"""Learning from the dense network: its outputs as soft targets."""

import torch.nn.functional as F
from torch import Tensor

from swan_surgery.errors import InputError


def distillation_loss(
    logits: Tensor, teacher_logits: Tensor, *, temperature: float = 4.0
) -> Tensor:
    """Kullback-Leibler divergence from the teacher's softened classes, times temperature squared.

    Hinton, Vinyals, Dean (arXiv:1503.02531): the factor keeps gradients comparable over temperatures.
    Usually mixed as `0.1 * cross_entropy + 0.9 * distillation_loss`.

    Args:
        logits: of the network that learns, shape (..., classes).
        teacher_logits: of the dense network, same shape; no gradient flows into it.
        temperature: above 0; higher shows more of the wrong classes.

    Returns:
        A scalar: the mean over all but the last axis.

    Raises:
        InputError: shapes differ, or `temperature` is not above 0.

    Example:
        >>> import torch
        >>> same = torch.tensor([[2.0, 0.0, -1.0]])
        >>> float(distillation_loss(same, same))
        0.0
    """
    if logits.shape != teacher_logits.shape:
        raise InputError(
            f"logits {tuple(logits.shape)} and teacher_logits {tuple(teacher_logits.shape)} must "
            f"have the same shape"
        )
    if not temperature > 0:
        raise InputError(f"temperature must be above 0; got {temperature}")
    student = F.log_softmax(logits / temperature, dim=-1).flatten(0, -2)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=-1).flatten(0, -2)
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return divergence * temperature**2
