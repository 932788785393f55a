"""Runs a traced graph once on a shell and notes what every node carries: units, shape, role."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from swan_surgery.channels.data.channel_map import ChannelMap
from swan_surgery.channels.labels.fields import Fields, axis_field
from swan_surgery.channels.labels.recording import Contraction
from swan_surgery.channels.labels.unit_labels import UnitLabels
from swan_surgery.channels.runs.tracing import LabelMode, label_tensors, run_labelled
from swan_surgery.models.inputs import Inputs
from swan_surgery.models.tensors import named_tensors


@dataclass(slots=True)
class NodeFacts:
    """What one node's value is.

    Attributes:
        fields: label fields of its tensor; label = unit + 1.
        shape, dtype: of its tensor; None if it is no tensor.
        value: the value itself if it is no tensor (a size, a tuple).
        summed: units the node sums over; those must read exact zero when closed.
        summed_in_weights: those of them that it also sums over where weights meet weights.
        contracts: the node is a conv, linear or matmul, so its channels start here.
        is_weight: the node is computed from parameters alone.
        is_stale: an input was changed in place after it was computed.
    """

    fields: Fields = ()
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    value: Any = None
    summed: frozenset[int] = frozenset()
    summed_in_weights: frozenset[int] = frozenset()
    contracts: bool = False
    is_weight: bool = False
    is_stale: bool = False
    version: int = 0
    units: frozenset[int] = field(default=frozenset())


def node_facts(
    shell: nn.Module, graph: fx.Graph, units: Mapping[str, Fields], inputs: Inputs
) -> dict[fx.Node, NodeFacts]:
    """Interpret the graph on `meta` (or real) stand-ins and collect the facts of every node.

    Args:
        shell: a private copy of the model, which is run.
        graph: traced from it.
        units: the result of `unit_fields`.
        inputs: on the shell's device.
    """
    labels = UnitLabels()
    label_tensors(labels, shell, units)
    interpreter = _FactInterpreter(shell, graph, labels)
    mode = LabelMode(labels)
    placeholders = [node.target for node in graph.nodes if node.op == "placeholder"]
    args = list(inputs.args)
    rest = placeholders[len(args) :]
    args += [inputs.kwargs[name] for name in rest if name in inputs.kwargs]
    run_labelled(mode, shell, interpreter.run, tuple(args), {})
    return interpreter.facts


def unit_fields(model: nn.Module, channels: ChannelMap) -> dict[str, Fields]:
    """The fields of every parameter and buffer that holds units; label = unit + 1."""
    ranks = {name: tensor.ndim for name, tensor in named_tensors(model)}
    fields: dict[str, Fields] = {}
    for entry in channels.tensors:
        own = axis_field(torch.tensor(entry.units) + 1, entry.axis, ranks[entry.tensor])
        fields[entry.tensor] = (*fields.get(entry.tensor, ()), own)
    return fields


class _FactInterpreter(fx.Interpreter):
    def __init__(self, module: nn.Module, graph: fx.Graph, labels: UnitLabels) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.labels = labels
        self.facts: dict[fx.Node, NodeFacts] = {}
        self._sets: dict[bytes, frozenset[int]] = {}

    def _units_in(self, labels: Tensor) -> frozenset[int]:
        """The units in a label tensor; most nodes carry what the node before carried."""
        key = labels.numpy().tobytes()
        if key not in self._sets:
            self._sets[key] = frozenset((labels[labels > 0] - 1).tolist())
        return self._sets[key]

    def _summed(self, contractions: list[Contraction]) -> frozenset[int]:
        vectors = [c.summed for c in contractions if c.summed is not None]
        return frozenset().union(*map(self._units_in, vectors))

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and note its facts."""
        before = len(self.labels.recording.contractions)
        facts = NodeFacts()
        for source in n.all_input_nodes:
            value = self.env.get(source)
            if isinstance(value, Tensor) and value._version != self.facts[source].version:  # noqa: SLF001
                facts.is_stale = True
        result = super().run_node(n)
        if isinstance(result, Tensor):
            facts.fields = self.labels.fields(result)
            facts.version = result._version  # noqa: SLF001 - counts changes in place
            facts.shape, facts.dtype = tuple(result.shape), result.dtype
            facts.units = frozenset().union(*map(self._units_in, facts.fields))
        else:
            facts.value = result
        made = self.labels.recording.contractions[before:]
        facts.contracts = bool(made)
        facts.summed = self._summed(made)
        facts.summed_in_weights = self._summed([c for c in made if c.of_weights])
        sources = n.all_input_nodes
        facts.is_weight = n.op == "get_attr" or (
            bool(sources)
            and n.op in ("call_function", "call_method")
            and all(self.facts[source].is_weight for source in sources)
        )
        self.facts[n] = facts
        return result
