"""Names in an ONNX file: outputs as the model returns them, and one name for the batch.

The exporter takes the names of its own graph (`linear_7`, `s72`), which change with the model.
"""

import re
from collections.abc import Collection, Iterator
from importlib import import_module
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path


BATCH = "batch"


def output_names(result: Any) -> list[str]:
    """A name for every tensor in what a model returns: `logits`, `hidden_states.0`, `output`, `output_1`.

    Args:
        result: a tensor, or any nest of them.
    """
    return [
        _joined([str(_key(step)) for step in path])
        for path, leaf in tree_flatten_with_path(result)[0]
        if isinstance(leaf, Tensor)
    ]


def _key(step: Any) -> Any:
    """Of a mapping, a sequence or an attribute."""
    return next(getattr(step, name) for name in ("key", "idx", "name") if hasattr(step, name))


def _joined(steps: list[str]) -> str:
    if not steps or steps[0].isdecimal():
        return "_".join(["output", *steps])
    return ".".join(steps)


def rename_(model: Any, names: Collection[str]) -> None:
    """Rename the outputs, and the first axis where it is free, in a model of onnx_ir.

    Args:
        model: all free axes of its inputs are the batch.
        names: of the outputs; where these are not as many, or one is not its own, they keep theirs.
    """
    graph = model.graph
    free = {
        str(axis.value)
        for own in graph.inputs
        for axis in own.shape or ()
        if not isinstance(axis, int) and axis.value
    }
    if free:
        _rename_axes_(model, re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(free)))})\b"))
    outputs = list(graph.outputs)
    if len({id(own) for own in (*outputs, *graph.inputs)}) < len(outputs) + len(graph.inputs):
        return
    if len(names) != len(outputs):
        return
    taken = {own.name for own in _values(model)} - {own.name for own in outputs}
    for own, name in zip(outputs, names, strict=True):
        while name in taken:
            name = f"{name}_out"  # noqa: PLW2901 - until it is free
        taken.add(name)
        own.name = name


def _rename_axes_(model: Any, free: re.Pattern[str]) -> None:
    ir = import_module("onnx_ir")
    for own in _values(model):
        if own.shape is None:
            continue
        renamed = [
            axis
            if isinstance(axis, int) or axis.value is None
            else ir.SymbolicDim(free.sub(BATCH, str(axis.value)))
            for axis in own.shape
        ]
        if renamed != list(own.shape):
            own.shape = ir.Shape(renamed)


def _values(model: Any) -> Iterator[Any]:
    """Everything in a model that has a name."""
    traversal = import_module("onnx_ir").traversal
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in traversal.RecursiveGraphIterator(model.graph):
        yield from node.outputs
    for function in model.functions.values():
        yield from function.inputs
        for node in traversal.RecursiveGraphIterator(function.graph):
            yield from node.outputs
