"""Whether a rehearsal took the same step as the recording, and what a step depends on."""

from typing import Any

import torch
from torch import Tensor

from swan_surgery.calls.arguments import same_number
from swan_surgery.channels.labels.recording import OpRecord, argument
from swan_surgery.channels.rules.registry import facts_named, facts_of


def counts(
    op: Any, measured: frozenset[int], tensor: Tensor, args: Any, kwargs: dict[str, Any]
) -> bool:
    """Whether the result tells how long a constant is along one of these axes."""
    facts = facts_of(op)
    if not measured or not facts.along_dim:
        return facts.counts and bool(measured)
    axis: int = argument(op, args, kwargs, "dim")
    return axis % tensor.ndim in measured


def is_equal(one: Tensor, two: Tensor) -> bool:
    """Whether two fields hold the same labels."""
    return one is two or (one.shape == two.shape and torch.equal(one, two))


def is_same(expected: OpRecord, record: OpRecord) -> bool:
    """Whether two runs took the same step; which kind of view reshape makes is none of the model's."""
    return expected.name == record.name or (_is_reshape(expected) and _is_reshape(record))


def _is_reshape(record: OpRecord) -> bool:
    return record.name.endswith(".default") and facts_named(record.packet).is_reshape


def numbers_in(record: OpRecord) -> tuple[Any, ...]:
    """The Python numbers of the torch function that an operation belongs to."""
    return () if record.frame is None else record.frame.leaves


def same_numbers(record: OpRecord, expected: OpRecord) -> bool:
    """Whether what must not follow a width is the same but for rounding, where it is equally much."""
    one, two = record.numbers, expected.numbers
    if one != two and not (len(one) == len(two) and all(map(same_number, one, two))):
        return False
    return all(
        a.shape != b.shape or _is_close(a, b)
        for a, b in zip(record.values, expected.values, strict=False)
    )


def _is_close(one: Tensor, two: Tensor) -> bool:
    if two.is_complex():
        return one.dtype == two.dtype and _is_close(
            torch.view_as_real(one), torch.view_as_real(two)
        )
    bound = 4 * torch.finfo(two.dtype).eps if two.is_floating_point() else 0
    return torch.allclose(one.double(), two.double(), rtol=bound, atol=0, equal_nan=True)
