"""A model cut as it runs, where no graph is to be had: its own code runs twice, each time in part.

In the trunk the run ends with the module's output. In the rest the code runs again from its beginning, where every
module that ran before stands for itself without computing anything: what it returns is NaN (zero where
integers are asked for), and what is computed from that is followed (`running_checks`): so what else crosses shows.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from swan_surgery.errors import InputError
from swan_surgery.models import Inputs, doubled, sharing_copy_of
from swan_surgery.routing.running_checks import check_outputs, check_statistics, check_values
from swan_surgery.routing.running_record import record
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
    runs = [record(model, after, given) for given in (inputs, inputs.map(doubled))]
    one, two = runs
    if one.order != two.order:
        raise InputError(
            f"{type(model).__name__} runs other modules for twice as many samples, and cannot be cut as it runs"
        )
    batch = one.crossing.shape[0]
    shapes = {key: _shapes(one.outputs[key], two.outputs[key], batch) for key in one.outputs}
    carry = Carry(one.crossing.dtype)
    running = _with(model, {after: Exit(model.get_submodule(after))}, drop=one.behind)
    trunk = RunningTrunk(running, shapes[INPUTS, 0])
    stands: dict[str, nn.Module] = {
        name: Stand(name, model.get_submodule(name), _calls_of(name, shapes), carry)
        for name in one.before
    }
    stands[after] = Entry(after, model.get_submodule(after), [], carry)
    rest = RunningRest(
        _with(model, stands), carry, shapes[INPUTS, 0], tuple(one.crossing.shape[1:])
    )
    check_values(trunk, rest, after, inputs)
    check_outputs(model, trunk, rest, after, inputs)
    check_statistics(model, trunk, rest, after, inputs)
    return trunk, rest


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


__all__ = ["split_as_it_runs"]
