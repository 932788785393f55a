"""Checks at the edge: is this an adaptive model, and can it still change?"""

from swan_surgery.adaptive.adaptive_model import AdaptiveModel
from swan_surgery.errors import ModelError


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


__all__ = ["check_adaptive"]
