"""ONNX graphs of the parts put together: gathered rows, an `If` around each branch, rows scattered back."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Part:
    """An exported part.

    Attributes:
        path: its file.
        shapes: of its outputs, for one sample.
    """

    path: Path
    shapes: Sequence[tuple[int, ...]]


class _Assembly:
    """The graph that grows."""

    def __init__(self) -> None:
        self.onnx: Any = import_module("onnx")
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.inputs: list[Any] = []
        self.opsets: dict[str, int] = {}
        self.functions: list[Any] = []
        self.ir_version = 0
        self._count = 0

    def load(self, part: Part, prefix: str) -> Any:
        """The graph of a part with names of its own; its weights become those of the whole."""
        compose: Any = import_module("onnx.compose")
        model = compose.add_prefix(self.onnx.load(part.path), prefix)
        for entry in model.opset_import:
            self.opsets[entry.domain] = max(self.opsets.get(entry.domain, 0), entry.version)
        self.functions += model.functions
        self.ir_version = max(self.ir_version, model.ir_version)
        self.weights += model.graph.initializer
        return model.graph

    def add(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        """A node with one output; its name."""
        self._count += 1
        name = f"routing.{kind}.{self._count}"
        self.nodes.append(
            self.onnx.helper.make_node(kind, list(inputs), [name], name, **attributes)
        )
        return name

    def constant(self, value: Any, kind: int) -> str:
        """A number, or a list of numbers."""
        self._count += 1
        name = f"routing.constant.{self._count}"
        sizes = [len(value)] if isinstance(value, list) else []
        values = value if isinstance(value, list) else [value]
        self.weights.append(self.onnx.helper.make_tensor(name, kind, sizes, values))
        return name

    def renamed(self, graph: Any, old: str, new: str) -> Any:
        """The nodes of a part with its input taken from elsewhere."""
        for node in graph.node:
            for index, name in enumerate(node.input):
                if name == old:
                    node.input[index] = new
        return graph.node

    def rows(self, is_taken: str) -> str:
        """Indices of the rows where a condition holds, [K]."""
        found = self.add("NonZero", [is_taken])
        return self.add("Squeeze", [found, self.constant([0], self.onnx.TensorProto.INT64)])

    def branch(
        self, graph: Any, rows: str, crossing: str, shapes: Sequence[tuple[int, ...]]
    ) -> list[str]:
        """What a branch gives for these rows, and nothing where there are none: it does not run then."""
        onnx, helper = self.onnx, self.onnx.helper
        given = self.add("Gather", [crossing, rows], axis=0)
        size = self.add("Size", [rows])
        is_any = self.add("Greater", [size, self.constant(0, onnx.TensorProto.INT64)])
        nodes = self.renamed(graph, graph.input[0].name, given)
        kinds = [output.type.tensor_type.elem_type for output in graph.output]
        then = helper.make_graph(
            list(nodes),
            f"{given}.then",
            [],
            [
                helper.make_tensor_value_info(o.name, k, None)
                for o, k in zip(graph.output, kinds, strict=True)
            ],
        )
        empty, outputs = [], []
        for index, (kind, shape) in enumerate(zip(kinds, shapes, strict=True)):
            name = f"{given}.empty.{index}"
            tensor = helper.make_tensor(f"{name}.value", kind, [0, *shape], [])
            empty.append(helper.make_node("Constant", [], [name], name, value=tensor))
            outputs.append(helper.make_tensor_value_info(name, kind, None))
        otherwise = helper.make_graph(empty, f"{given}.else", [], outputs)
        names = [f"{given}.out.{index}" for index in range(len(kinds))]
        self.nodes.append(
            helper.make_node(
                "If", [is_any], names, f"{given}.if", then_branch=then, else_branch=otherwise
            )
        )
        return names


def assembled(switches: Sequence[tuple[Part, Part | None, float]], full: Part) -> bytes:
    """One model of the parts.

    Args:
        switches: front, light branch and threshold of each; without a light branch the front gives its outputs
            behind what crosses and the score.
        full: the full branch of the last switch.
    """
    own = _Assembly()
    onnx, helper = own.onnx, own.onnx.helper
    outputs, kinds = _from(own, switches, full, 0, None)
    infos = [
        helper.make_tensor_value_info(f"output_{i}", kind, ["batch", *shape])
        for i, (kind, shape) in enumerate(zip(kinds, full.shapes, strict=True))
    ]
    for index, name in enumerate(outputs):
        own.nodes.append(
            helper.make_node("Identity", [name], [f"output_{index}"], f"output_{index}")
        )
    graph = helper.make_graph(own.nodes, "routed", own.inputs, infos, own.weights)
    opsets = [helper.make_opsetid(domain, version) for domain, version in own.opsets.items()]
    model = helper.make_model(graph, opset_imports=opsets, functions=own.functions)
    model.ir_version = own.ir_version
    onnx.checker.check_model(model)
    found: bytes = model.SerializeToString()
    return found


def _not_above(own: _Assembly, threshold: float, kind: int) -> float:
    """The largest number of a type that is not above the threshold: as `score <= threshold` is compared in float64."""
    numbers: Any = own.onnx.helper.tensor_dtype_to_np_dtype(kind).type
    found = numbers(threshold)
    return float(np.nextafter(found, numbers(-np.inf)) if float(found) > threshold else found)


def _from(
    own: _Assembly,
    switches: Sequence[tuple[Part, Part | None, float]],
    full: Part,
    level: int,
    crossing: str | None,
) -> tuple[list[str], list[int]]:
    """Outputs of a switch and all behind it, and their types."""
    tensor = own.onnx.TensorProto
    front, light, threshold = switches[level]
    graph = own.load(front, f"front{level}/")
    if crossing is None:
        own.inputs += graph.input
        own.nodes += graph.node
    else:
        own.nodes += own.renamed(graph, graph.input[0].name, crossing)
    crosses, score, *lights = [output.name for output in graph.output]
    kind = graph.output[1].type.tensor_type.elem_type
    is_easy = own.add("LessOrEqual", [score, own.constant(_not_above(own, threshold, kind), kind)])
    easy, hard = own.rows(is_easy), own.rows(own.add("Not", [is_easy]))
    if light is None:
        ones = [own.add("Gather", [name, easy], axis=0) for name in lights]
    else:
        ones = own.branch(own.load(light, f"light{level}/"), easy, crosses, light.shapes)
    if level + 1 == len(switches):
        last = own.load(full, "full/")
        kinds = [output.type.tensor_type.elem_type for output in last.output]
        twos = own.branch(last, hard, crosses, full.shapes)
    else:
        behind = own.add("Gather", [crosses, hard], axis=0)
        twos, kinds = _from(own, switches, full, level + 1, behind)
    order = own.add("Concat", [easy, hard], axis=0)
    places = own.add("Unsqueeze", [order, own.constant([1], tensor.INT64)])
    found = []
    for one, two in zip(ones, twos, strict=True):
        rows = own.add("Concat", [one, two], axis=0)
        found.append(own.add("ScatterND", [rows, places, rows]))
    return found, kinds


__all__ = ["Part", "assembled"]
