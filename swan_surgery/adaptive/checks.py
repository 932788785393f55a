"""Checks at the edge: is this an adaptive model, can it still change, what may be asked, and does a loader hold data?"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from swan_surgery.adaptive.adaptive_model import AdaptiveModel
from swan_surgery.errors import InputError, ModelError
from swan_surgery.models.batches import batches_in, check_batch


_WIDTHS = (0.25, 0.5, 0.75, 1.0)


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


@dataclass(frozen=True, slots=True)
class Choice:
    """What `adapt` is asked for."""

    kind: str
    per: str
    widths: tuple[float, ...]
    block_size: int


def checked_choice(
    structure: str, per: str, widths: Sequence[float] | None, block_size: int
) -> Choice:
    """What `adapt` is asked for, with the widths that hold by default.

    Raises:
        InputError: it does not offer that; says what there is.
    """
    if structure not in ("nested", "free", "blocks"):
        raise InputError(f'structure must be "nested", "free" or "blocks"; got {structure!r}')
    if per not in ("block", "network"):
        raise InputError(f'per must be "block" or "network"; got {per!r}')
    if structure != "nested":
        if per == "network" or widths is not None:
            raise InputError(
                "free units and blocks of neurons have no widths, and every block looks for itself: leave widths "
                'out, and per="block"'
            )
        if type(block_size) is not int or block_size < 1:
            raise InputError(f"block_size must be a whole number of neurons; got {block_size!r}")
        return Choice(structure, per, (), block_size)
    widths = _WIDTHS if widths is None else widths
    if not _ascend(widths):
        raise InputError(
            f"widths must ascend from above 0 to 1, at least two of them; got {widths!r}"
        )
    return Choice(structure, per, tuple(widths), block_size)


def check_allocation(allocation: object, kind: str) -> None:
    """What widths may be shares of.

    Raises:
        InputError: neither of the two, or what has no widths.
    """
    if allocation not in (None, "scores", "uniform"):
        raise InputError(f'allocation must be "scores" or "uniform"; got {allocation!r}')
    if allocation is not None and kind != "nested":
        raise InputError(f"allocation is of nested widths; structure={kind!r} has none")


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
    for batch in batches_in(loader, num_batches):
        check_batch(batch)
        yield batch


__all__ = [
    "Choice",
    "batches_of",
    "check_adaptive",
    "check_allocation",
    "checked",
    "checked_choice",
]
