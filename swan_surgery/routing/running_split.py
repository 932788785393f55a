"""A model cut as it runs, where no graph is to be had: its own code runs twice, each time in part.

In the trunk the run ends with the module's output. In the rest the code runs again from its beginning, where every
module that ran before stands for itself without computing anything: what it returns is NaN (zero where
integers are asked for). So what else crosses shows: the outputs are then not the model's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import InputError
from swan_surgery.models import Inputs, doubled, sharing_copy_of
from swan_surgery.routing.rows import writes_to_input
from swan_surgery.routing.stand_ins import (
    INPUTS,
    Carry,
    Entry,
    Exit,
    Gone,
    RunningRest,
    RunningTrunk,
    Shape,
    Stand,
)


def split_as_it_runs(model: nn.Module, after: str, inputs: Inputs) -> tuple[nn.Module, nn.Module]:
    """Trunk and rest of a model whose code is not traced; parameters stay shared with it.

    Args:
        model: a private copy in eval mode.
        after: a module that is called once and returns one tensor.
        inputs: example inputs.

    Raises:
        InputError: more crosses than that tensor: says what.
    """
    runs = [_record(model, after, given) for given in (inputs, inputs.map(doubled))]
    one, two = runs
    if one.order != two.order:
        raise InputError(
            f"{type(model).__name__} runs other modules for twice as many samples, and cannot be cut as it runs"
        )
    batch = one.crossing.shape[0]
    shapes = {key: _shapes(one.outputs[key], two.outputs[key], batch) for key in one.outputs}
    carry = Carry()
    trunk = RunningTrunk(_with(model, {after: Exit(model.get_submodule(after))}, drop=one.behind))
    stands: dict[str, nn.Module] = {
        name: Stand(name, model.get_submodule(name), _calls_of(name, shapes), carry)
        for name in one.before
    }
    stands[after] = Entry(after, model.get_submodule(after), [], carry)
    rest = RunningRest(
        _with(model, stands), carry, shapes[INPUTS, 0], tuple(one.crossing.shape[1:])
    )
    _check(model, trunk, rest, after, inputs)
    rest.copies = writes_to_input(rest, one.crossing)
    return trunk, rest


@dataclass(slots=True)
class _Run:
    """One run of a model: what ran before a module returned, and what behind it."""

    crossing: Tensor
    order: list[str]
    before: list[str]
    behind: list[str]
    outputs: dict[tuple[str, int], Any]


def _record(model: nn.Module, after: str, given: Inputs) -> _Run:
    """Note the outermost modules that ran wholly before a module returned, and wholly behind."""
    names = {id(module): name for name, module in model.named_modules()}
    order: list[str] = []
    outputs: dict[tuple[str, int], Any] = {}
    crossing: list[Tensor] = []
    early: set[str] = set()
    late: set[str] = set()

    def enter(module: nn.Module, *_: Any) -> None:
        (late if crossing else early).add(names[id(module)])

    def leave(module: nn.Module, _args: Any, output: Any) -> None:
        name = names[id(module)]
        order.append(name)
        if crossing:
            late.add(name)
        elif name == after:
            crossing.append(output)
        else:
            outputs[name, sum(key[0] == name for key in outputs)] = output

    handles = [m.register_forward_pre_hook(enter) for m in model.modules()]
    handles += [m.register_forward_hook(leave) for m in model.modules()]
    try:
        with torch.no_grad(), streams_kept(0):
            given.run(model)
    finally:
        for handle in handles:
            handle.remove()
    above = {after[:end] for end in range(len(after)) if after[end : end + 1] == "."} | {"", after}
    own = given.copied()
    outputs[INPUTS, 0] = (own.args, dict(own.kwargs))
    before = _outermost(early - late - above, after)
    return _Run(crossing[0], order, before, _outermost(late - early - above, after), outputs)


def _outermost(names: set[str], after: str) -> list[str]:
    kept = [
        n for n in sorted(names) if not after.startswith(f"{n}.") and not n.startswith(f"{after}.")
    ]
    return [n for n in kept if not any(n.startswith(f"{other}.") for other in kept)]


def _calls_of(name: str, shapes: Mapping[tuple[str, int], Any]) -> list[Any]:
    return [shapes[key] for key in sorted(key for key in shapes if key[0] == name)]


def _shapes(one: Any, two: Any, batch: int) -> Any:
    def shape(a: Any, b: Any) -> Any:
        return Shape.of(a, b, batch) if isinstance(a, Tensor) else a

    return tree_map(shape, one, two)


def _with(
    model: nn.Module, others: Mapping[str, nn.Module], *, drop: list[str] | None = None
) -> nn.Module:
    """A copy that shares parameters, with other modules in some places."""
    found = sharing_copy_of(model)
    gone = {name: Gone(model.get_submodule(name)) for name in drop or ()}
    for name, module in {**gone, **others}.items():
        parent, _, key = name.rpartition(".")
        found.get_submodule(parent)._modules[key] = module  # noqa: SLF001 - its store: keys may be digits
    return found


def _check(model: nn.Module, trunk: nn.Module, rest: nn.Module, after: str, inputs: Inputs) -> None:
    for given in (inputs, varied(inputs), inputs.map(doubled)):
        wanted = _outputs(model, given)
        try:
            found = tree_leaves(_quiet(rest, _quiet(given.run, trunk)))
        except Exception as err:  # noqa: BLE001 - the model's own code may raise anything
            first = str(err).splitlines()[0] if str(err) else ""
            found, why = (
                None,
                f"its code cannot run without the modules before ({type(err).__name__}: {first})",
            )
        else:
            why = ""
        if found is None or not same(found, wanted):
            names = [] if found is None else _what_else(model, trunk, rest, given)
            raise InputError(
                f"a switch after {after!r} needs its output to be all that is read behind it, but "
                + (why or f"{' and '.join(names) or 'something else'} is read behind it, too")
                + "; switch after a module where everything comes together"
            )


def _what_else(model: nn.Module, trunk: nn.Module, rest: nn.Module, given: Inputs) -> list[str]:
    """Each of what ran before alone without its values: which does the output miss?"""
    assert isinstance(rest, RunningRest)  # noqa: S101 - made here
    carry = rest.carry
    after = next(m.name for m in rest.modules() if isinstance(m, Entry))
    real = {k: v for k, v in _record(model, after, given).outputs.items() if _stands(rest, k[0])}
    crossing = _quiet(given.run, trunk)
    wanted = _outputs(model, given)
    missed = []
    for key in real:
        carry.real = {other: value for other, value in real.items() if other != key}
        try:
            alike = same(tree_leaves(_quiet(rest, crossing)), wanted)
        except Exception:  # noqa: BLE001 - the model's own code may raise anything
            alike = False
        if not alike:
            missed.append(repr(key[0]) if key[0] else "the model's input")
    carry.real = {}
    return missed


def _stands(rest: nn.Module, name: str) -> bool:
    return name == INPUTS or any(isinstance(m, Stand) and m.name == name for m in rest.modules())


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


def _outputs(model: nn.Module, given: Inputs) -> list[Any]:
    return tree_leaves(_quiet(given.run, model))


def _quiet(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad(), streams_kept(0):
        return run(*args, **kwargs)


def same(one: list[Any], two: list[Any]) -> bool:
    """Bitwise the same tensors, and the same of all else."""
    return len(one) == len(two) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else type(a) is type(b)
        for a, b in zip(one, two, strict=True)
    )


__all__ = ["same", "split_as_it_runs", "varied"]
