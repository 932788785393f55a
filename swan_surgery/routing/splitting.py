"""A model in two: up to and including a module, and the rest; together bitwise the model.

The cut is made in a coarse graph: only the code of the modules around the one named is traced, all others stay
whole. Where that graph is not the model, or cannot be had, the model is cut as it runs (`running_split`).
"""

import copy
import difflib
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import InputError
from swan_surgery.gates.graph.faithfulness import Watch, difference, hooks_of, watching
from swan_surgery.gates.graph.tracing import LayerTracer
from swan_surgery.models import Inputs, doubled
from swan_surgery.routing.rows import writes_to_input
from swan_surgery.routing.running_checks import same
from swan_surgery.routing.running_split import split_as_it_runs


@dataclass(frozen=True, slots=True)
class Split:
    """Two models that, one behind the other, are the given one.

    Attributes:
        trunk: takes what the model takes, returns the tensor that crosses.
        rest: takes the tensor that crosses, returns what the model returns.
        way: "graph", or why the model was cut as it runs.
    """

    trunk: nn.Module
    rest: nn.Module
    way: str


def split_at(model: nn.Module, after: str, inputs: Inputs) -> Split:
    """Cut a private copy of a model, in eval mode, behind a module; the copy is used up.

    Args:
        model: in eval mode; its modules end in the trunk and the rest.
        after: the module, by its name in `named_modules`.
        inputs: example inputs of any batch size.

    Raises:
        InputError: no such module, it is not run exactly once, its output is not one tensor with the batch in
            front, or more than this tensor crosses: says which.
    """
    check_crossing(model, after, inputs)
    try:
        trunk, rest = _in_graph(model, after, inputs)
    except NotInGraphError as err:
        trunk, rest = split_as_it_runs(model, after, inputs)
        return Split(trunk, rest, f"as it runs: {err}")
    return Split(trunk, rest, "graph")


def check_crossing(model: nn.Module, after: str, inputs: Inputs) -> Tensor:
    """What crosses behind a module: its only output, in its only call.

    Raises:
        InputError: says what was found instead.
    """
    names = dict(model.named_modules())
    if after not in names or not after:
        near = difflib.get_close_matches(after, list(names), 3, 0.3)
        raise InputError(
            f"{type(model).__name__} has no module {after!r} to switch after"
            + (f"; there are {', '.join(map(repr, near))}" if near else "")
        )
    found: list[Any] = []
    handle = names[after].register_forward_hook(lambda _m, _a, output: found.append(output))
    try:
        sizes = [_run_for(model, found, given) for given in (inputs, inputs.map(doubled))]
    finally:
        handle.remove()
    for outputs in sizes:
        if len(outputs) != 1:
            raise InputError(
                f"module {after!r} is called {len(outputs)} times in a run of {type(model).__name__}; a "
                f"switch stands behind a module that is called once"
            )
        if not isinstance(outputs[0], Tensor):
            kinds = [type(leaf).__name__ for leaf in tree_leaves(outputs[0])]
            raise InputError(
                f"module {after!r} returns a {type(outputs[0]).__name__} of {', '.join(kinds)}; a switch "
                f"stands behind a module that returns one tensor: name one inside or behind it"
            )
    (one,), (two,) = sizes
    if not one.ndim or two.shape[0] != 2 * one.shape[0] or two.shape[1:] != one.shape[1:]:
        raise InputError(
            f"module {after!r} returns {list(one.shape)}, and {list(two.shape)} for twice as many samples: "
            f"a switch needs the batch on the first axis, and on no other"
        )
    result: Tensor = one
    return result


def _run_for(model: nn.Module, found: list[Any], given: Inputs) -> list[Any]:
    found.clear()
    try:
        with torch.no_grad(), streams_kept():
            given.run(model)
    except Exception as err:
        first = str(err).splitlines()[0] if str(err) else ""
        raise InputError(
            f"{type(model).__name__} cannot be run on the example inputs, or not on twice as many samples: "
            f"{type(err).__name__}: {first}; a switch splits batches, so pass example_inputs of one"
        ) from err
    return list(found)


def inner_name(model: nn.Module, name: str) -> str:
    """The name of a module in what is left of a model."""
    names = dict(model.named_modules())
    return f"model.{name}" if name not in names and f"model.{name}" in names else name


class NotInGraphError(Exception):
    """Why a graph of the model is not to be had."""


class _CoarseTracer(LayerTracer):
    """Looks into the modules around one, and keeps all others, that one included, as single nodes."""

    def __init__(self, watch: Watch, after: str) -> None:
        super().__init__(watch)
        self._after = after

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the module becomes one node."""
        del m
        return not self._after.startswith(f"{module_qualified_name}.")


def _in_graph(model: nn.Module, after: str, inputs: Inputs) -> tuple[nn.Module, nn.Module]:
    around = [name for name in _above(after) if hooks_of(_alone(model, name))]
    if around:
        raise NotInGraphError(f"module {around[0]!r} has hooks")
    watch = Watch()
    try:
        with watching(model, watch):
            graph = _CoarseTracer(watch, after).trace(model)
    except Exception as err:
        first = str(err).splitlines()[0] if str(err) else ""
        raise NotInGraphError(f"torch.fx cannot trace it ({type(err).__name__}: {first})") from err
    if watch.reasons:
        raise NotInGraphError(f"{watch.reasons[0]} would be lost in a graph")
    differs = difference(model, graph, inputs)
    if differs is not None:
        raise NotInGraphError(differs)
    cut = [node for node in graph.nodes if node.op == "call_module" and node.target == after]
    if len(cut) != 1:
        raise NotInGraphError(f"{after!r} is called in a way that a graph does not show")
    trunk, rest = _halves(graph, cut[0])
    halves = fx.GraphModule(model, trunk, "Trunk"), fx.GraphModule(model, rest, "Rest")
    with torch.no_grad(), streams_kept(0):
        crossing = inputs.run(halves[0])
    if writes_to_input(halves[1], crossing) or _goes_around(rest):
        halves = halves[0], fx.GraphModule(model, _copying(rest), "Rest")
    with torch.no_grad(), streams_kept(0):
        wanted = tree_leaves(inputs.run(model))
    with torch.no_grad(), streams_kept(0):
        found = tree_leaves(halves[1](inputs.run(halves[0])))
    if not same(found, wanted):
        raise NotInGraphError("other outputs than its trace")
    return halves


def _above(after: str) -> Iterator[str]:
    parts = after.split(".")
    return (".".join(parts[:end]) for end in range(len(parts)))


def _alone(model: nn.Module, name: str) -> nn.Module:
    """A module without its children, so that hooks are its own."""
    shallow = copy.copy(model.get_submodule(name))
    vars(shallow)["_modules"] = {}
    return shallow


def _halves(graph: fx.Graph, cut: fx.Node) -> tuple[fx.Graph, fx.Graph]:
    nodes = list(graph.nodes)
    place = nodes.index(cut)
    given: set[fx.Node] = set()  # what depends on the model's inputs
    for node in nodes:
        if node.op == "placeholder" or any(n in given for n in node.all_input_nodes):
            given.add(node)
    behind = nodes[place + 1 :]
    before = set(nodes[:place]) & given
    crossing = sorted(
        {n for node in behind for n in node.all_input_nodes if n in before}, key=nodes.index
    )
    if crossing:
        names = ", ".join(repr(str(node.name)) for node in crossing)
        raise NotInGraphError(f"besides the output of {cut.target!r}, {names} is read behind it")
    trunk, rest = fx.Graph(), fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    # All nodes, also those whose result is not read: they may write in place.
    for node in nodes[: place + 1]:
        known[node] = trunk.node_copy(node, known.__getitem__)
    trunk.output(known[cut])
    known = {cut: rest.placeholder("crossing")}
    for node in [*_needed([n for n in nodes[:place] if n not in given], behind), *behind]:
        known[node] = rest.node_copy(node, known.__getitem__)
    for half in (trunk, rest):
        half.lint()
    return trunk, rest


def _copying(rest: fx.Graph) -> fx.Graph:
    """The same on a copy of what crosses: the other branch reads it, too."""
    crossing = next(node for node in rest.nodes if node.op == "placeholder")
    with rest.inserting_after(crossing):
        copied = rest.call_method("clone", (crossing,))
    crossing.replace_all_uses_with(copied, delete_user_cb=lambda user: user is not copied)
    return rest


def _needed(nodes: list[fx.Node], behind: list[fx.Node]) -> list[fx.Node]:
    """Those of the model's own tensors that are read behind, in order.

    Raises:
        NotInGraphError: one is written to in front of the switch: each half has its own.
    """
    needed = {n for node in behind for n in node.all_input_nodes}
    for node in reversed(nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    written = [node for node in nodes if node.op.startswith("call") and _may_write(node)]
    if written:
        raise NotInGraphError(f"{str(written[0].name)!r} writes to tensors of the model's own")
    return [node for node in nodes if node in needed]


def _goes_around(graph: fx.Graph) -> bool:
    """Whether `.data` is taken of a tensor: what is written there torch does not count."""
    return any(node.target is getattr and "data" in node.args for node in graph.nodes)


def _may_write(node: fx.Node) -> bool:
    """By name, as torch names what works in place."""
    name = getattr(node.target, "__name__", str(node.target))
    is_operator = getattr(node.target, "__module__", "") == "_operator"
    return (
        (name.endswith("_") and not name.endswith("__"))
        or name in ("setitem", "delitem")
        or (is_operator and name.startswith("i") and hasattr(operator, name[1:]))
        or bool(node.kwargs.get("inplace"))
        or "out" in node.kwargs
    )


__all__ = ["Split", "check_crossing", "inner_name", "split_at"]
