"""What `add_switch` is asked for: names, light branches, ways of deciding."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from swan_surgery.errors import InputError
from swan_surgery.routing.routed_model import Decide
from swan_surgery.routing.rows import margin_score


Light = float | nn.Module | None


def decided(decide: Decide, output: Any) -> Decide:
    """What was asked for, if these outputs have a margin; without one "auto" leaves nothing to choose.

    Raises:
        InputError: says why there is no margin.
    """
    if decide not in ("margin", "auto"):
        return decide
    try:
        margin_score(output)
    except InputError:
        if decide == "margin":
            raise
        return "predicted"
    return decide


def names_of(after: str | Sequence[str]) -> tuple[str, ...]:
    """Of the modules behind which switches stand.

    Raises:
        InputError: neither a name nor a list of them.
    """
    names = (after,) if isinstance(after, str) else after
    if not isinstance(names, (tuple, list)) or not all(isinstance(name, str) for name in names):
        raise InputError(f"after must be a module's name, or a list of names; got {after!r}")
    return tuple(names)


def check_asked(
    names: Sequence[str], lights: Sequence[Light], default: Tensor | None, decide: object
) -> None:
    """Light branches and ways of deciding that fit together.

    Raises:
        InputError: says what does not.
    """
    if not names or len(lights) != len(names):
        raise InputError(
            f"give one light branch for all switches, or one for each: {len(names)} and {len(lights)}"
        )
    if decide not in ("predicted", "margin", "label", "auto"):
        raise InputError(f"decide must be predicted, margin, label or auto; got {decide!r}")
    for light in lights:
        if light is None and not isinstance(default, Tensor):
            raise InputError(
                "light=None ends inputs at the switch: pass default=, a tensor: the output of one sample that they get"
            )
        if light is not None and decide == "label":
            raise InputError('decide="label" is gated compression: pass light=None and default=')
        is_share = isinstance(light, (int, float)) and not isinstance(light, bool)
        if is_share and not 0 < float(light) <= 1:  # type: ignore[arg-type]  # told apart above
            raise InputError(f"light must be a share of the rest's MACs in (0, 1]; got {light!r}")
        if not is_share and light is not None and not isinstance(light, nn.Module):
            raise InputError(f"light must be a share, a module or None; got {type(light).__name__}")


__all__ = ["Light", "check_asked", "decided", "names_of"]
