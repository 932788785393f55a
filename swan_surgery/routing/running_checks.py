"""Is a model that was cut as it runs the model still? By its outputs, by what they are computed from, by what training changes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import InputError
from swan_surgery.models import Inputs, copy_of, doubled
from swan_surgery.routing.blank_reads import BlankReads
from swan_surgery.routing.stand_ins import RunningRest


_MOST_FLIPS = 16  # a run each


def check_outputs(
    model: nn.Module, trunk: nn.Module, rest: nn.Module, after: str, inputs: Inputs
) -> None:
    """Refuse parts that together do not give the model's outputs: on the example, on other values, on twice as many."""
    for given in (inputs, varied(inputs), inputs.map(doubled)):
        wanted = tree_leaves(_quiet(given.run, model))
        crossing = _quiet(given.run, trunk)
        try:
            found = tree_leaves(_quiet(rest, crossing))
        except Exception as err:
            raise _does_not_run(after, err) from err
        if not same(found, wanted):
            raise _reads_more(after, "something else is read behind it, too")


def _reads_more(after: str, why: str) -> InputError:
    return InputError(
        f"a switch after {after!r} needs its output to be all that is read behind it, but {why}; switch after a module "
        f"where everything comes together"
    )


def _does_not_run(after: str, err: Exception) -> InputError:
    first = str(err).splitlines()[0] if str(err) else ""
    return _reads_more(
        after, f"its code cannot run without the modules before ({type(err).__name__}: {first})"
    )


def check_values(trunk: nn.Module, rest: RunningRest, after: str, inputs: Inputs) -> None:
    """Refuse a rest whose outputs depend on the values of blanks, also where these are the example's by chance."""
    crossing = _quiet(inputs.run, trunk)
    try:
        found, wanted = _followed(rest, crossing, None)
    except Exception as err:
        raise _does_not_run(after, err) from err
    for names, what in ((found.names(wanted), "is read"), (found.late, "is read as a number")):
        if names:
            listed = " and ".join(repr(n) if n else "the model's input" for n in sorted(names))
            raise _reads_more(after, f"{listed} {what} behind it, too")
    for flip in range(min(found.reads, _MOST_FLIPS)):
        try:
            _, other = _followed(rest, crossing, flip)
        except Exception:  # noqa: BLE001, S112 - a path that the model's own code forbids
            continue
        # A path that never comes to the switch the trunk refuses.
        if rest.carry.has_crossed and not same(other, wanted):
            raise _reads_more(
                after, "a number that its code reads in front of it decides what runs behind it"
            )


def _followed(
    rest: RunningRest, crossing: Tensor, flip: int | None
) -> tuple[BlankReads, list[Any]]:
    carry = rest.carry
    reads = BlankReads(flip)
    reads.has_crossed = lambda: carry.has_crossed
    carry.blanks = reads
    try:
        with reads.following():
            outputs = tree_leaves(_quiet(rest, crossing))
    finally:
        carry.blanks = None
    return reads, outputs


def check_statistics(
    model: nn.Module, trunk: nn.Module, rest: nn.Module, after: str, inputs: Inputs
) -> None:
    """Refuse buffers that training changes on both sides of a switch: in the rest by blanks."""
    given = inputs.map(doubled)
    try:
        crossing = Inputs((_quiet(given.run, trunk),), {})
        front, behind, whole = (
            _changed(module, at)
            for module, at in ((trunk, given), (rest, crossing), (model, given))
        )
    except Exception:  # noqa: BLE001 - train mode may ask for more samples; it says so then
        return
    wrong = sorted((behind & front) | (behind - whole))
    if wrong:
        raise InputError(
            f"{type(model).__name__} is cut as it runs, and keeps statistics ({wrong[0]!r}) in code that runs on both "
            f"sides of a switch after {after!r}: training would spoil them; switch elsewhere, or freeze them"
        )


def _changed(module: nn.Module, given: Inputs) -> set[str]:
    """Names, in the model, of the buffers that a run in train mode changes."""
    own = copy_of(module).train()
    _quiet(given.run, own)
    before = dict(module.named_buffers())
    return {
        name.removeprefix("model.")
        for name, buffer in own.named_buffers()
        if not torch.equal(buffer, before[name])
    }


def varied(inputs: Inputs) -> Inputs:
    """Other values of the same shapes and kinds."""
    return inputs.map(
        lambda t: (
            t.flip(0).mul(1.5).add(0.25)
            if t.is_floating_point()
            else t.roll(1, -1)
            if t.ndim
            else t
        )
    )


def _quiet(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad(), streams_kept(0):
        return run(*args, **kwargs)


def same(one: list[Any], two: list[Any]) -> bool:
    """Bitwise the same tensors, and the same of all else."""
    return len(one) == len(two) and all(
        _equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else type(a) is type(b)
        for a, b in zip(one, two, strict=True)
    )


def _equal(one: Tensor, two: Tensor) -> bool:
    """NaN where the other one has it, too."""
    return torch.equal(one, two) or (
        one.shape == two.shape and bool(((one == two) | ((one != one) & (two != two))).all())
    )


__all__ = ["check_outputs", "check_statistics", "check_values", "same", "varied"]
