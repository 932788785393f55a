"""torch.fx traces of a model, one per mode, with every layer left whole."""

from collections import OrderedDict
from threading import get_ident
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from swan_surgery.errors import TraceError
from swan_surgery.gates.graph.faithfulness import Watch, state_of_autograd, watching


# Leaves by isinstance: a subclass of a layer is one layer, whatever its forward does.
LAYERS = (
    _ConvNd,
    nn.Linear,
    _NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.MultiheadAttention,
    nn.Embedding,
    nn.RNNBase,
)


class LayerTracer(fx.Tracer):
    """Keeps conv, linear, norms and attention (and their subclasses) as single nodes."""

    def __init__(self, watch: Watch) -> None:
        """`watch`: takes note of what a graph does not hold."""
        super().__init__()
        self._watch = watch
        self._before = state_of_autograd()
        self._thread = get_ident()

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """As fx does, which sees the calls of all modules in all threads while it traces."""
        if get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """As fx does; what other threads read is not of this model."""
        if get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """As fx does."""
        self._watch.at_node(self._before)
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the module becomes one node."""
        return isinstance(m, LAYERS) or super().is_leaf_module(m, module_qualified_name)

    def create_arg(self, a: Any) -> Any:
        """As fx does, but a model that returns an OrderedDict or the like still returns one."""
        if isinstance(a, dict) and type(a) is not dict:
            kind: Any = type(a)
            items = {key: self.create_arg(value) for key, value in a.items()}
            if hasattr(kind, "__dataclass_fields__"):  # transformers' outputs are both
                return self.create_node("call_function", kind, (), items)
            if kind.__init__ in (dict.__init__, OrderedDict.__init__):
                return self.create_node("call_function", kind, (items,), {})
        return super().create_arg(a)


def trace(model: nn.Module, watch: Watch, *, training: bool) -> fx.Graph:
    """Trace a shell of a model in one mode.

    Raises:
        TraceError: torch.fx cannot follow the model's forward.
    """
    model.train(training)
    try:
        with watching(model, watch):
            graph = LayerTracer(watch).trace(model)
    except Exception as err:
        first = str(err).splitlines()[0] if str(err) else ""
        mode = "train" if training else "eval"
        raise TraceError(
            f"torch.fx cannot trace {type(model).__name__} in {mode} mode: "
            f"{type(err).__name__}: {first}"
        ) from err
    for node in graph.nodes:
        node.meta.pop("nn_module_stack", None)  # names classes that were made to watch
    return graph


def module_at(model: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module a node calls, or None."""
    return model.get_submodule(str(node.target)) if node.op == "call_module" else None


__all__ = ["LAYERS", "module_at", "trace"]
