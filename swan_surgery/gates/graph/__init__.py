"""fx graphs of a model: traced, annotated with units, and rewritten with gates."""

from swan_surgery.gates.graph.insertion import foldable, insert
from swan_surgery.gates.graph.node_units import NodeFacts, node_facts, unit_fields
from swan_surgery.gates.graph.placement import Placement, Site, place, units_at
from swan_surgery.gates.graph.tracing import trace


__all__ = [
    "NodeFacts",
    "Placement",
    "Site",
    "foldable",
    "insert",
    "node_facts",
    "place",
    "trace",
    "unit_fields",
    "units_at",
]
