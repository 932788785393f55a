"""Does zero in give zero out? Tested by running the node, instead of listing functions."""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import ModelError
from swan_surgery.gates.graph.node_units import NodeFacts
from swan_surgery.gates.graph.tracing import LAYERS, module_at
from swan_surgery.models.copies import copy_of


class ZeroTest:
    """Runs single nodes on made-up values; remembers answers by operation and arguments."""

    def __init__(self, model: nn.Module, facts: dict[fx.Node, NodeFacts]) -> None:
        self._model = model
        self._facts = facts
        self._known: dict[tuple[Any, ...], bool] = {}
        self._generator = torch.Generator().manual_seed(0)
        self._sign = 0
        self._has_drawn = False

    def keeps_zero(self, node: fx.Node, zeroed: list[fx.Node]) -> bool:
        """Whether the node's value is exactly zero when the inputs `zeroed` are, whatever the rest.

        Layers with parameters of their own (norms above all) never count: their bias may be zero
        today and not tomorrow.
        """
        module = module_at(self._model, node)
        if isinstance(module, LAYERS):
            return False
        key = self._key(node, module, zeroed)
        if key not in self._known:
            self._known[key] = self._keeps(node, module, zeroed)
        return self._known[key]

    def _keeps(self, node: fx.Node, module: nn.Module | None, zeroed: list[fx.Node]) -> bool:
        """Whether it holds for whatever data: of both signs, then all on one side of zero."""
        for sign in (0, 1, -1):
            self._sign, self._has_drawn = sign, False
            if not self._run(node, module, zeroed):
                return False
            if not self._has_drawn:
                break
        return True

    def _key(
        self, node: fx.Node, module: nn.Module | None, zeroed: list[fx.Node]
    ) -> tuple[Any, ...]:
        def show(leaf: Any) -> Any:
            if not isinstance(leaf, fx.Node):
                return leaf
            facts = self._facts[leaf]
            if facts.shape is None:
                return repr(facts.value)
            return (
                "zero" if leaf in zeroed else "data",
                len(facts.shape),
                min(facts.shape, default=1) == 0,
            )

        what = repr(module) if module is not None else node.target
        arguments = map_aggregate((node.args, node.kwargs), show)
        return node.op, what, repr(arguments)

    def _run(self, node: fx.Node, module: nn.Module | None, zeroed: list[fx.Node]) -> bool:
        def make(leaf: Any) -> Any:
            return self._value(leaf, zero=leaf in zeroed) if isinstance(leaf, fx.Node) else leaf

        args = map_aggregate(node.args, make)
        kwargs = map_aggregate(node.kwargs, make)
        try:
            with torch.no_grad(), streams_kept():
                if module is not None:
                    private = copy_of(module).to("cpu")
                    self._shake(private)
                    result = private(*args, **kwargs)
                elif node.op == "call_method":
                    result = getattr(args[0], node.target)(*args[1:], **kwargs)  # type: ignore[arg-type]
                else:
                    result = node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, ModelError):
            return False
        results = result if isinstance(result, (tuple, list)) else [result]
        return all(
            isinstance(item, Tensor) and not bool(torch.count_nonzero(item)) for item in results
        )

    def _value(self, node: fx.Node, *, zero: bool) -> Any:
        facts = self._facts[node]
        if facts.shape is None or facts.dtype is None:
            return self._real(facts.value)
        if zero:
            return torch.zeros(facts.shape, dtype=facts.dtype)
        if facts.dtype is torch.bool:
            return torch.rand(facts.shape, generator=self._generator) < 0.5
        if not facts.dtype.is_floating_point:
            return torch.ones(facts.shape, dtype=facts.dtype)
        return self._draw(facts.shape, facts.dtype)

    def _real(self, value: Any) -> Any:
        """Tuples of tensors came from the shell and have no data."""
        if isinstance(value, (tuple, list)):
            return type(value)(self._real(item) for item in value)
        return torch.zeros_like(value, device="cpu") if isinstance(value, Tensor) else value

    def _shake(self, module: nn.Module) -> None:
        """Parameters that happen to be zero must not look harmless."""
        for tensor in module.parameters():
            tensor.data = self._draw(tuple(tensor.shape), tensor.dtype)

    def _draw(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Values of both signs, away from zero: minimum(0, y) is 0 for positive y only."""
        self._has_drawn = True
        size = torch.rand(shape, generator=self._generator).add(0.5)
        if self._sign:
            return (size * self._sign).to(dtype)
        is_positive = torch.rand(shape, generator=self._generator) < 0.5
        return torch.where(is_positive, size, -size).to(dtype)
