"""One run of a model whose code is not traced: what ran before a module returned, and what behind it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.models import Inputs
from swan_surgery.routing.stand_ins import INPUTS


@dataclass(slots=True)
class Run:
    """One run of a model: what ran before a module returned, and what behind it."""

    crossing: Tensor
    order: list[str]
    before: list[str]
    behind: list[str]
    outputs: dict[tuple[str, int], Any]


def record(model: nn.Module, after: str, given: Inputs) -> Run:
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
    return Run(crossing[0], order, before, _outermost(late - early - above, after), outputs)


def _outermost(names: set[str], after: str) -> list[str]:
    kept = [
        n for n in sorted(names) if not after.startswith(f"{n}.") and not n.startswith(f"{after}.")
    ]
    return [n for n in kept if not any(n.startswith(f"{other}.") for other in kept)]


__all__ = ["Run", "record"]
