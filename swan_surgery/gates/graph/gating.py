"""Gates in the graph that torch.fx traces from a model: folded into layers, or behind their outputs."""

from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any

from torch import Tensor, fx, nn

from swan_surgery.channels import ChannelMap
from swan_surgery.channels.labels.fields import Fields
from swan_surgery.errors import TraceError
from swan_surgery.gates.bank import GateBank
from swan_surgery.gates.gated_model import GatedModel
from swan_surgery.gates.graph import (
    NodeFacts,
    Placement,
    Site,
    foldable,
    insert,
    node_facts,
    place,
    trace,
    unit_fields,
    units_at,
)
from swan_surgery.gates.graph.faithfulness import Watch, difference, hooks_of
from swan_surgery.gates.sites import FoldedGate, GateSite
from swan_surgery.gates.starting import make_bank
from swan_surgery.models import Inputs, copy_of, doubled, shell_of


# What nodes raise on stand-ins or inputs that do not suit them.
_DOES_NOT_RUN = (RuntimeError, ValueError, NotImplementedError, TypeError, IndexError)
# Folding into a weight pays while the weight is not much larger than what the layer puts out.
_TYPICAL_BATCH = 8


@dataclass(frozen=True, slots=True)
class GraphPlan:
    """Where gates go in the graph, which serves both modes, and the units that are left to gate."""

    channels: ChannelMap
    graph: fx.Graph
    placed: Placement
    settings: Mapping[tuple[str, str], Any]


def plan_graph(copy: nn.Module, channels: ChannelMap, inputs: Inputs) -> GraphPlan:
    """Trace a private copy and place gates; units that none can close are pinned.

    Raises:
        TraceError: torch.fx cannot trace the model, or its trace is not the model.
    """
    graph, settings = _faithful_graph(copy, inputs)
    copy.eval()
    while True:
        units = unit_fields(copy, channels)
        placed = place(copy, graph, _facts(copy, graph, units, inputs))
        if not placed.uncovered:
            _check_batches(copy, graph, units, placed, inputs)
            return GraphPlan(channels, graph, placed, settings)
        channels = channels.without(placed.uncovered, "no gate can close these channels", "fx")


def _check_batches(
    copy: nn.Module,
    graph: fx.Graph,
    units: Mapping[str, Fields],
    placed: Placement,
    inputs: Inputs,
) -> None:
    """Gates behind functions fit a batch of another size, where the model takes one.

    A layer's own output has its channels on their axis; `conv2d(x.view(1, B * C, ...), groups=B)` does not.

    Raises:
        TraceError: one does not.
    """
    loose = [site for site in placed.sites if site.node.op != "call_module"]
    if not loose:
        return
    try:
        facts = node_facts(shell_of(copy), graph, units, inputs.on_meta().map(doubled))
    except _DOES_NOT_RUN:
        return
    for site in loose:
        if units_at(facts[site.node]).shape != site.units.shape:
            raise TraceError(
                f"a gate behind {site.node.name} of a torch.fx trace of {type(copy).__name__} would fit "
                f"batches of the example inputs' size alone"
            )


# torch.fx changes nn.Module for all threads while it traces, and the comparison draws random numbers.
_ONE_AT_A_TIME = Lock()


def _faithful_graph(
    copy: nn.Module, inputs: Inputs
) -> tuple[fx.Graph, Mapping[tuple[str, str], Any]]:
    """The trace of both modes, and the plain settings that it holds the values of.

    Raises:
        TraceError: says what a graph would not hold.
    """
    with _ONE_AT_A_TIME:
        return _traced(copy, inputs)


def _traced(copy: nn.Module, inputs: Inputs) -> tuple[fx.Graph, Mapping[tuple[str, str], Any]]:
    watch = Watch()
    hooked = hooks_of(copy)
    if hooked is not None:
        watch.met(f"hooks ({hooked})")
    shell = shell_of(copy)
    graph, in_training = (trace(shell, watch, training=training) for training in (False, True))
    if graph.python_code("self").src != in_training.python_code("self").src:
        watch.met("code that asks which mode a module is in (self.training)")
    if not watch.reasons:
        found = difference(copy, graph, inputs)
        if found is not None:
            watch.met(found)
    if watch.reasons:
        raise TraceError(
            f"a torch.fx trace of {type(copy).__name__} would not be the model: it has "
            f"{', '.join(watch.reasons)}"
        )
    return graph, watch.settings


def _facts(
    copy: nn.Module, graph: fx.Graph, units: Mapping[str, Fields], inputs: Inputs
) -> dict[fx.Node, NodeFacts]:
    """Facts of a graph in the copy's mode: on a shell if it runs there, else on real data.

    Batch-norm refuses one sample in training, so every input is tried doubled as well.
    """
    on_meta = inputs.on_meta()
    attempts = [
        (stand_in, candidate)
        for stand_in, own in ((shell_of, on_meta), (copy_of, inputs))
        for candidate in (own, own.map(doubled))
    ]
    for stand_in, candidate in attempts[:-1]:
        try:
            return node_facts(stand_in(copy), graph, units, candidate)
        except _DOES_NOT_RUN:
            continue
    stand_in, candidate = attempts[-1]
    try:
        return node_facts(stand_in(copy), graph, units, candidate)
    except _DOES_NOT_RUN as err:
        first = str(err).splitlines()[0] if str(err) else ""
        raise TraceError(
            f"the torch.fx trace of {type(copy).__name__} does not run on the example inputs "
            f"({type(err).__name__}: {first}); if forward has optional arguments, or branches on "
            f"its inputs, move that decision out of forward"
        ) from err


def gate_graph(copy: nn.Module, plan: GraphPlan, inputs: Inputs) -> GatedModel:
    """Insert the planned gates; `copy` must be in its final mode."""
    graph, channels = plan.graph, plan.channels
    folded = foldable(copy, graph, plan.placed.sites)
    units: dict[str, Tensor] = {}
    chosen: dict[str, tuple[Site, nn.Module | None]] = {}
    names: dict[Site, str] = {}
    for site in plan.placed.sites:
        layer = copy.get_submodule(str(site.node.target)) if site in folded else None
        name = _name(site, folded=layer is not None, taken=units)
        names[site], units[name] = name, site.units
        chosen.setdefault(name, (site, layer))
    bank = make_bank(copy, channels, list(units.values()))
    sites = {name: _make_site(site, bank, layer) for name, (site, layer) in chosen.items()}
    gated = GatedModel(copy, bank, sites, channels=channels, example_inputs=inputs)
    together = {
        name: str(site.node.target)
        for name, (site, layer) in chosen.items()
        if layer is not None and layer.get_parameter("weight").ndim == 1
    }
    insert(graph, names, list(units), folded, together)
    gated.run_graph(graph)
    gated.settings = dict(plan.settings)
    return gated


def _name(site: Site, *, folded: bool, taken: dict[str, Tensor]) -> str:
    stem = str(site.node.target) if folded else site.node.name
    stem = stem.replace(".", "_") + ("_input" if site.users else "")
    name, number = stem, 1
    while name in taken and not (
        taken[name].shape == site.units.shape and taken[name].equal(site.units) and folded
    ):
        number += 1
        name = f"{stem}_{number}"
    return name


def _make_site(site: Site, bank: GateBank, layer: nn.Module | None) -> nn.Module:
    if layer is None:
        return GateSite(site.units, bank)
    weight = layer.get_parameter("weight")
    transposed = bool(getattr(layer, "transposed", False))
    return FoldedGate(
        site.units,
        bank,
        weight_axis=1 if transposed else 0,
        is_folded=weight.numel() <= _TYPICAL_BATCH * site.num_elements,
    )
