"""Writes gates into a traced graph: as a folded layer call, or as a multiplication behind a node."""

import operator
from collections.abc import Callable, Mapping, Sequence

from torch import fx, nn

from swan_surgery.gates.graph.faithfulness import prefixed
from swan_surgery.gates.graph.placement import Site
from swan_surgery.gates.graph.tracing import module_at
from swan_surgery.gates.sites import fold_vectors


# Exact classes whose output is affine in weight and bias per channel: scaling those scales it.
FOLDABLE = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
)  # fmt: skip


def foldable(model: nn.Module, graph: fx.Graph, sites: Sequence[Site]) -> set[Site]:
    """Sites right behind a layer that can absorb them: all its calls gated alike, no tricks."""
    by_target: dict[str, list[Site]] = {}
    also_raw = {site.node for site in sites if site.users}  # some reader wants the bare value
    for site in sites:
        if site.node.op == "call_module" and not site.users and site.node not in also_raw:
            by_target.setdefault(str(site.node.target), []).append(site)
    calls: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    found = set()
    for target, members in by_target.items():
        alike = all(
            m.units.shape == members[0].units.shape and m.units.equal(members[0].units)
            for m in members
        )
        if alike and calls[target] == len(members) and _absorbs(model, members[0]):
            found.update(members)
    return found


def _absorbs(model: nn.Module, site: Site) -> bool:
    layer = module_at(model, site.node)
    if type(layer) not in FOLDABLE or layer is None:
        return False
    if getattr(layer, "weight", None) is None or "weight" not in dict(layer.named_parameters()):
        return False
    if layer._forward_hooks or layer._forward_pre_hooks:  # noqa: SLF001 - nn.Module's own store
        return False
    if getattr(layer, "transposed", False) and layer.groups != 1:
        return False  # weight (in, out/groups, ...) has no axis of all output channels
    shape = site.units.shape
    axis = len(shape) - 1 if isinstance(layer, nn.Linear) else 1
    return (
        len(site.node.args) == 1
        and not site.node.kwargs
        and len(shape) > axis
        and shape[axis] == site.units.numel()
    )


def _all_but(kept: set[fx.Node]) -> Callable[[fx.Node], bool]:
    return lambda user: user not in kept


def insert(
    graph: fx.Graph,
    names: Mapping[Site, str],
    order: Sequence[str],
    folded: set[Site],
    together: Mapping[str, str],
) -> None:
    """Rewrite a graph whose targets start with `model.`: one `gates()` call, then one call per site.

    Args:
        graph: the traced graph, changed in place; module targets are relative to the base model.
        names: the site module of each site.
        order: site modules in the order in which `gates()` returns their values.
        folded: the sites whose layer call is replaced.
        together: site module -> its layer, where a gate is folded into vectors: all of them are scaled at once.
    """
    prefixed(graph)
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        values = graph.call_module("gates")
        scaled = _scaled_together(graph, values, order, together)
    own_gates: dict[fx.Node, set[fx.Node]] = {}
    edges_first = sorted(names.items(), key=lambda item: not item[0].users)
    for site, name in edges_first:
        node = site.node
        index = order.index(name)
        if site in folded:
            with graph.inserting_before(node):
                value = graph.call_function(operator.getitem, (values, index))
                layer = graph.get_attr(str(node.target))
                at_hand = (scaled[name],) if name in scaled else ()
                given = (layer, value, node.args[0], *at_hand)
                gated = graph.call_module(f"sites.{name}", given)
            node.replace_all_uses_with(gated)
            graph.erase_node(node)
        elif site.users:
            # Right before each reader: the value may change in place between the two.
            for user in site.users:
                with graph.inserting_before(user):
                    value = graph.call_function(operator.getitem, (values, index))
                    gated = graph.call_module(f"sites.{name}", (value, node))
                user.replace_input_with(node, gated)
                own_gates.setdefault(node, set()).add(gated)
        else:
            following = node.next
            with graph.inserting_before(following):
                value = graph.call_function(operator.getitem, (values, index))
                gated = graph.call_module(f"sites.{name}", (value, node))
            own_gates.setdefault(node, set()).add(gated)
            node.replace_all_uses_with(gated, delete_user_cb=_all_but(own_gates[node]))
    graph.lint()


def _scaled_together(
    graph: fx.Graph, values: fx.Node, order: Sequence[str], together: Mapping[str, str]
) -> dict[str, fx.Node]:
    """Nodes of the scaled parameters by site module; written where the graph is open for insertion."""
    if not together:
        return {}
    layers = [graph.get_attr(f"model.{layer}") for layer in together.values()]
    own = [graph.call_function(operator.getitem, (values, order.index(n))) for n in together]
    whole = graph.call_function(fold_vectors, (layers, own))
    return {
        name: graph.call_function(operator.getitem, (whole, index))
        for index, name in enumerate(together)
    }
