"""Where gates sit: up from each consumer, through what keeps zero, to the first thing that does not.

Closing a unit must make every layer that sums over it read exact zero, and every path from producer
to consumer passes exactly one gate.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx, nn

from swan_surgery.channels.labels.fields import axes_of
from swan_surgery.gates.graph.node_units import NodeFacts
from swan_surgery.gates.graph.tracing import module_at
from swan_surgery.gates.graph.zero_test import ZeroTest


@dataclass(frozen=True, eq=False, slots=True)
class Site:
    """A gate behind `node`; for `users` only, if given. `units` has the field's shape, -1 = open.

    `num_elements` is the size of the node's value at the example inputs.
    """

    node: fx.Node
    units: Tensor
    users: tuple[fx.Node, ...] = ()
    num_elements: int = 0

    @property
    def num_channels(self) -> int:
        """Positions along the gated axis."""
        return self.units.numel()


@dataclass(frozen=True, slots=True)
class Placement:
    """All sites of one traced graph, and the units that no gate can close in it."""

    sites: list[Site]
    uncovered: frozenset[int]


def place(model: nn.Module, graph: fx.Graph, facts: dict[fx.Node, NodeFacts]) -> Placement:
    """Find the sites of one traced graph, in graph order."""
    walk = _Walk(model, facts)
    reads: dict[tuple[fx.Node, fx.Node], frozenset[fx.Node]] = {}
    uncovered: frozenset[int] = frozenset()
    for node in graph.nodes:
        wanted = facts[node].summed
        if not wanted:
            continue
        # No gate on an activation reaches what such a node multiplies among weights.
        uncovered |= facts[node].summed_in_weights
        source = _summed_input(node, facts)
        if source is None or not facts[source].units >= wanted:
            uncovered |= wanted
            continue
        sites = (None if facts[node].is_stale else walk.sites_above(source)) or frozenset()
        gated = frozenset(unit for site in sites for unit in facts[site].units)
        # Without sites that cover what is summed over, the gate goes right before the consumer.
        reads[source, node] = sites if gated >= wanted else frozenset()
        if not reads[source, node] and crosses(facts[source]):
            uncovered |= wanted
    shared = _double_gated(graph, facts, frozenset().union(*reads.values()))
    # A value that changes in place between two readers is gated in front of each of them.
    stale = [node for node in graph.nodes if facts[node].is_stale]
    shared |= frozenset(source for node in stale for source in node.all_input_nodes)
    behind: dict[fx.Node, None] = {}
    edges: dict[fx.Node, list[fx.Node]] = {}
    for (source, consumer), sites in reads.items():
        if sites & shared or not sites:
            edges.setdefault(source, []).append(consumer)
        else:
            behind.update(dict.fromkeys(sites))
    order = {node: index for index, node in enumerate(graph.nodes)}
    places = [(node, ()) for node in behind] + [(n, tuple(u)) for n, u in edges.items()]
    found = [
        Site(node, units_at(facts[node]), users, prod(facts[node].shape or ()))
        for node, users in places
    ]
    found.sort(key=lambda site: (order[site.node], len(site.users)))
    return Placement(found, uncovered)


def units_at(facts: NodeFacts) -> Tensor:
    """The units of a node's value, broadcastable to it; -1 where there is none."""
    combined = torch.full((1,) * len(facts.shape or ()), -1)
    for field in facts.fields:
        units = torch.where(field > 0, field - 1, -1)
        if axes_of(field):
            combined = torch.maximum(combined, units)
    return combined


def crosses(facts: NodeFacts) -> bool:
    """Whether units lie along several axes of one value: no gate of one factor each closes both there."""
    labelled = [field > 0 for field in facts.fields if bool((field > 0).any())]
    return any(
        bool((one & two).any()) for number, one in enumerate(labelled) for two in labelled[:number]
    )


def _summed_input(node: fx.Node, facts: dict[fx.Node, NodeFacts]) -> fx.Node | None:
    """The input that brings the units a node sums over: one is enough, weights do not count."""
    for source in node.all_input_nodes:
        if facts[source].units & facts[node].summed and not facts[source].is_weight:
            return source
    return None


@dataclass(frozen=True, slots=True)
class _Step:
    """How to gate above a node: behind `own` nodes, or above all (or the cheapest) of `above`."""

    own: frozenset[fx.Node] = frozenset()
    above: tuple[fx.Node, ...] = ()
    one_is_enough: bool = False


class _Walk:
    def __init__(self, model: nn.Module, facts: dict[fx.Node, NodeFacts]) -> None:
        self._model = model
        self._facts = facts
        self._zero = ZeroTest(model, facts)
        self._memo: dict[fx.Node, frozenset[fx.Node] | None] = {}
        self._steps: dict[fx.Node, _Step] = {}

    def sites_above(self, node: fx.Node) -> frozenset[fx.Node] | None:
        """The nodes behind which gates make `node` read zero; None if there is a way around them."""
        pending = [node]  # a stack of our own: residual trunks are deeper than Python's
        while pending:
            top = pending[-1]
            if top not in self._steps:
                self._steps[top] = self._step(top)
            step = self._steps[top]
            missing = [source for source in step.above if source not in self._memo]
            if missing:
                pending += missing
                continue
            pending.pop()
            known = [self._memo[source] for source in step.above]
            found = [sites for sites in known if sites is not None]
            if step.one_is_enough:
                self._memo[top] = min(found, key=self._price, default=None)
            elif len(found) < len(known):
                self._memo[top] = None
            else:
                self._memo[top] = step.own.union(*found) or None
        return self._memo[node]

    def _step(self, node: fx.Node) -> _Step:
        facts = self._facts[node]
        crossed = crosses(facts)
        has_place = facts.units and not crossed and not self._folds(node)
        own = frozenset([node]) if has_place else frozenset()
        is_tensor = facts.shape is not None
        # A product of activations by their pixels makes no channels: `f @ f.T` has those of `f` twice.
        makes = facts.contracts and not (crossed and not facts.summed)
        starts = makes or facts.is_stale or node.op in ("placeholder", "get_attr")
        if starts or (is_tensor and not facts.units):
            return _Step(own)
        carriers = tuple(
            source
            for source in node.all_input_nodes
            if self._carries(source) and not self._facts[source].is_weight
        )
        if not carriers:
            return _Step(own)
        # Where units cross, each operand brings those of its own axis.
        single = () if crossed else carriers
        alone = [source for source in single if self._zero.keeps_zero(node, [source])]
        if alone:
            whole = [s for s in alone if self._facts[s].units >= facts.units] or alone
            return _Step(above=tuple(whole), one_is_enough=True)
        if self._zero.keeps_zero(node, list(carriers)):
            return _Step(above=carriers)
        if not is_tensor:
            # A tuple of tensors that does not keep zero: gates go behind its parts instead.
            return _Step(frozenset(user for user in node.users if self._facts[user].units))
        return _Step(own)

    def _folds(self, node: fx.Node) -> bool:
        """Whether units lie on the first axis of what no layer made: heads, times the batch.

        A gate there would fit the batch of the example inputs alone.
        """
        facts = self._facts[node]
        first = any(axes_of(f)[:1] == (0,) and bool((f > 0).any()) for f in facts.fields)
        weighed = node.op == "call_module" or any(
            self._facts[source].is_weight for source in node.all_input_nodes
        )
        return first and len(facts.shape or ()) > 1 and not facts.is_weight and not weighed

    def _carries(self, node: fx.Node) -> bool:
        facts = self._facts[node]
        if facts.shape is not None:
            return bool(facts.units)
        # A tuple of tensors, or a part of one.
        return any(self._carries(user) for user in node.users)

    def _price(self, sites: frozenset[fx.Node]) -> tuple[int, int, str]:
        """Prefer gates that fold into a layer, then fewer gates."""
        loose = sum(module_at(self._model, site) is None for site in sites)
        return loose, len(sites), min((site.name for site in sites), default="")


def _double_gated(
    graph: fx.Graph, facts: dict[fx.Node, NodeFacts], sites: frozenset[fx.Node]
) -> frozenset[fx.Node]:
    """Sites whose gated value reaches another site that gates the same unit again."""
    above: dict[fx.Node, frozenset[fx.Node]] = {}
    again: set[fx.Node] = set()
    for node in graph.nodes:
        reaching: set[fx.Node] = set()
        if not facts[node].contracts or not facts[node].summed:
            for source in node.all_input_nodes:
                reaching |= above.get(source, frozenset())
        if node in sites:
            again |= {site for site in reaching if facts[site].units & facts[node].units}
            reaching.add(node)
        above[node] = frozenset(reaching)
    return frozenset(again)
