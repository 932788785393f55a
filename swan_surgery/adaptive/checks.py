"""Checks at the edge: is this an adaptive model, can it still change, what may be asked, and does a loader hold data?"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from swan_surgery.adaptive.adaptive_model import AdaptiveModel
from swan_surgery.errors import InputError, ModelError
from swan_surgery.models.batches import check_batch


def check_adaptive(adapted: object, *, to: str, compact: bool = False) -> None:
    """Refuse anything but an adaptive model; where it shall change, also a compact one.

    Raises:
        ModelError: says what was seen and what to do.
    """
    if not isinstance(adapted, AdaptiveModel):
        raise ModelError(
            f"expected an adaptive model to {to}, got {type(adapted).__name__}; call swan.adapt(model) first"
        )
    if adapted.is_compact and not compact:
        raise ModelError(
            f"cannot {to} what swan.compact returned; do it before, and call compact again"
        )


def check_choice(structure: str, per: str, widths: Sequence[float]) -> None:
    """Refuse what `adapt` does not offer.

    Raises:
        InputError: says what there is.
    """
    if structure != "nested":
        raise InputError(f'structure must be "nested"; got {structure!r}')
    if per not in ("block", "network"):
        raise InputError(f'per must be "block" or "network"; got {per!r}')
    if not _ascend(widths):
        raise InputError(
            f"widths must ascend from above 0 to 1, at least two of them; got {widths!r}"
        )


def _ascend(widths: Sequence[float]) -> bool:
    if not isinstance(widths, (tuple, list)) or len(widths) < 2:
        return False
    if not all(isinstance(width, (int, float)) for width in widths):
        return False
    return list(widths) == sorted(set(widths)) and widths[0] > 0 and widths[-1] == 1


def batches_of(loader: Iterable[Any], num_batches: int | None) -> list[Any]:
    """What a loader yields, held in memory.

    Raises:
        InputError: as of `checked`, and where it yields no batch.
    """
    batches = list(checked(loader, num_batches))
    if not batches:
        raise InputError("the loader yielded no batch; nothing was changed")
    return batches


def checked(loader: Iterable[Any], num_batches: int | None) -> Iterator[Any]:
    """What a loader yields, batch by batch.

    Raises:
        InputError: it is no loader, or yields what is no batch, or one without samples.
    """
    if not isinstance(loader, Iterable):
        raise InputError(f"a loader yields batches; got {type(loader).__name__}")
    if num_batches is not None and num_batches < 1:
        raise InputError(f"num_batches must be 1 or more; got {num_batches}")
    for batch in islice(loader, num_batches):
        check_batch(batch)
        yield batch


__all__ = ["batches_of", "check_adaptive", "check_choice", "checked"]
