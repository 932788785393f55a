"""The gated model: an ordinary `nn.Module` that runs the base model's graph with gates in it."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, fx, nn

from swan_surgery.channels import PINNED, ChannelMap
from swan_surgery.environment.notebooks import html_table
from swan_surgery.errors import InputError, ModelError, SwanWarning
from swan_surgery.gates.bank import INITIAL_LOGIT, GateBank
from swan_surgery.gates.in_place import Acting, ungate_modules_
from swan_surgery.models import Inputs, copy_of
from swan_surgery.models.architecture import structure_of
from swan_surgery.models.subclasses import own_class, subclass_of


# Where torch keeps what is to be called around a module's own forward.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class GatedModel(nn.Module):
    """A copy of the base model with a gate on every unit.

    Attributes:
        model: the copy of the base model: same class, same `state_dict` keys, trained in place.
        gates: the `GateBank`.
        sites: the places where gates act, by name.
        channels: the `ChannelMap`; `print(gated.channels.explain())` says layer by layer who shares
            gates, what stays and why, and what is rewritten or weighted.
        example_inputs: what the model was mapped with; costs are for these shapes.
        ignored: the patterns of modules whose channels were to get no gate.
        free_outputs: the patterns of outputs that the user gave up.
        settings: (module, attribute) -> the plain value that the traced graph was made with.
        acting: when gates act on the base model in place; None where a traced graph runs.
        mapped_structure: what the base model looked like when it was mapped (`structure_of`).
        mapped_inputs: the example inputs it was mapped with.
        kept: what others have worked out about the model as it is, by name (`costs.freshness`).
    """

    ignored: tuple[str, ...] = ()
    free_outputs: tuple[str, ...] = ()
    acting: Acting | None = None

    def __init__(
        self,
        model: nn.Module,
        gates: GateBank,
        sites: Mapping[str, nn.Module],
        *,
        channels: ChannelMap,
        example_inputs: Inputs,
    ) -> None:
        super().__init__()
        self.model = model
        self.gates = gates
        self.sites = nn.ModuleDict(sites)
        self.channels = channels
        self.example_inputs = example_inputs
        self._graph: fx.Graph | None = None
        self._passed_over: tuple[str, ...] = ()
        self._graph_forward: Callable[..., Any] | None = None
        self.settings: dict[tuple[str, str], Any] = {}
        self.mapped_structure = structure_of(model)
        self.mapped_inputs = example_inputs
        self.kept: dict[str, Any] = {}
        self.training = model.training
        self.sites.train(model.training)
        made: Any = subclass_of(GatedModel, _like, own_class(model))
        self.__class__ = made

    @property
    def config(self) -> Any:
        """The base model's, where it has one: frameworks look there."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.gates.logits.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the base model; the gates of half models stay in float32."""
        floating = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        return next(floating, self.gates.logits.dtype)

    def own_inputs(self) -> Inputs:
        """The example inputs on the model's device and in its floating-point type."""
        return self.example_inputs.on(self.device, self.dtype)

    def run_graph(self, graph: fx.Graph) -> None:
        """Run a graph whose targets are relative to this model, instead of the model's own code."""
        graph.owning_module = None
        self._graph = graph
        self._graph_forward = type(fx.GraphModule(self, graph)).forward
        called = {str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")}
        parts = (name.split(".") for name in called if name.startswith("model."))
        around = {".".join(own[1:end]) for own in parts for end in range(1, len(own))}
        self._passed_over = tuple(name for name in around if f"model.{name}" not in called)
        graph.owning_module = (
            None  # else it would be pickled with that module, which is traced anew
        )

    def __getstate__(self) -> dict[str, Any]:
        """Code that was made on the spot is made again from its graph."""
        return vars(self) | {"_graph_forward": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's own
        if self._graph is not None:
            self.run_graph(self._graph)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base model's forward, with gates."""
        if self._graph_forward is not None:
            self._check_settings()
            if not torch.compiler.is_compiling():
                self._name_silent_hooks()
            return self._graph_forward(self, *args, **kwargs)
        with acting_gates(self) as model:
            return model(*args, **kwargs)

    def _check_settings(self) -> None:
        for (name, attribute), value in self.settings.items():
            now = getattr(self.model.get_submodule(name), attribute, None)
            if now != value:
                raise ModelError(
                    f"attribute {attribute!r} of module {name!r} is {now!r}, but was {value!r} when the "
                    f"model was traced, and the gated model runs that graph; call swan.swanify(model, "
                    f"..., in_place=True) to gate the model's own code, which reads it anew"
                )

    def _name_silent_hooks(self) -> None:
        for name in self._passed_over:
            module = self.model.get_submodule(name)
            if any(vars(module)[own] for own in _HOOKS):
                warnings.warn(
                    f"hooks of {name or 'the base model'!r} ({type(module).__name__}) do not fire: the gated "
                    f"model runs a graph of the layers inside it; hook one of these, or the gated model "
                    f"itself, or call swan.swanify(model, ..., in_place=True)",
                    SwanWarning,
                    stacklevel=4,
                )

    @staticmethod
    def exports_not(_suffix: str) -> str:
        """Why `swan.export` does not take it."""
        return "the model is gated: export what swan.prune(gated) returns"

    def close(self, layer: str, channels: Iterable[int] | Tensor) -> None:
        """Close the units of chosen output channels, and with them whatever hangs on the same gates.

        Args:
            layer: module name of a layer, or parameter name of a bare weight.
            channels: numbers of its output channels, or a mask of them: bool, one entry per channel.

        Raises:
            InputError: no such layer or channel, or one without a gate; neither whole numbers nor a mask.
        """
        known = {own.name: own for own in self.channels.layers}
        if layer not in known:
            raise InputError(
                f"the model has no layer {layer!r} with channels; there are {', '.join([*known][:6])}, ..."
            )
        of_channel = known[layer].out_units
        chosen = _numbers_of(channels, len(of_channel), layer)
        for channel in chosen:
            if not 0 <= channel < len(of_channel):
                raise InputError(
                    f"{layer!r} has {len(of_channel)} output channels; got {channel}, and they count from 0"
                )
            if of_channel[channel] == PINNED:
                raise InputError(
                    f"channel {channel} of {layer!r} has no gate; gated.channels.explain() says why"
                )
        units = torch.tensor([of_channel[channel] for channel in chosen], dtype=torch.int64)
        with torch.no_grad():
            self.gates.logits[units.to(self.gates.logits.device)] = -INITIAL_LOGIT

    def base_model(self) -> nn.Module:
        """A copy of the base model with the weights as trained, and without gates."""
        return ungate_modules_(copy_of(self.model))

    @property
    def runs_in_place(self) -> bool:
        """Whether the base model runs its own Python code, instead of a graph traced from it."""
        return self._graph_forward is None

    def _repr_html_(self) -> str:
        is_open = [*self.gates.open_mask().tolist(), True]  # the last answers for PINNED
        rows = []
        for layer in self.channels.layers:
            gated = [unit for unit in layer.out_units if unit != PINNED]
            left = sum(is_open[unit] for unit in layer.out_units)
            share = (
                f"{sum(is_open[unit] for unit in gated)} of {len(gated)}" if gated else "no gates"
            )
            rows.append((layer.name, str(len(layer.out_units)), share, str(left)))
        header = ("layer", "channels", "gates open", "channels left")
        return html_table(self.extra_repr(), header, rows)

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return (
            f"{type(self.model).__name__}: {self.channels.num_gated_channels} of "
            f"{self.channels.num_channels} channels gated by {self.channels.num_units} units"
        )


def _numbers_of(channels: Iterable[int] | Tensor, width: int, layer: str) -> list[int]:
    """What is meant by numbers or by a mask, which must not be taken for the numbers 0 and 1."""
    given = channels if isinstance(channels, Tensor) else torch.as_tensor(list(channels))
    if given.dtype == torch.bool and given.shape == (width,):
        return given.nonzero().reshape(-1).tolist()
    is_row = given.ndim == 1 and not (given.is_floating_point() or given.is_complex())
    if given.numel() and (not is_row or given.dtype == torch.bool):
        raise InputError(
            f"channels must be whole numbers, or a mask of {width} bools, one for each channel of {layer!r}; "
            f"got {given.dtype} of shape {tuple(given.shape)}"
        )
    return given.tolist()


def _like(base: type[nn.Module], kind: type[nn.Module]) -> tuple[tuple[type, ...], dict[str, Any]]:
    """A gated model that takes what a class takes: frameworks ask the signature which columns to keep."""

    @wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return base.forward(self, *args, **kwargs)

    name = f"Gated{kind.__name__}"  # some also ask the name what the model is for
    return (base,), {"__name__": name, "__qualname__": name, "forward": forward}


@contextmanager
def acting_gates(gated: GatedModel) -> Iterator[nn.Module]:
    """Let the gates act on `gated.model` inside the block, for methods other than `forward`.

    Example:
        >>> with acting_gates(gated) as model:  # doctest: +SKIP
        ...     model.generate(input_ids)

    Raises:
        ModelError: `gated` is not a gated model, or runs a traced graph, which knows `forward` only.
    """
    if not isinstance(gated, GatedModel):
        raise ModelError(
            f"expected a gated model, got {type(gated).__name__}; call swan.swanify(model) first"
        )
    if gated.acting is None:
        raise ModelError(
            f"{type(gated.model).__name__} runs as a traced graph, which has no method but forward; "
            f"call swan.swanify(model, ..., in_place=True) to gate the model's own code"
        )
    with gated.acting.begin():
        yield gated.model


@contextmanager
def soft_gates(gated: GatedModel) -> Iterator[GatedModel]:
    """Evaluate with soft gates (h * p) inside the block; `eval()` alone evaluates hard gates.

    Example:
        >>> with soft_gates(gated):  # doctest: +SKIP
        ...     accuracy = evaluate(gated)

    Raises:
        ModelError: `gated` is not a gated model.
    """
    if not isinstance(gated, GatedModel):
        raise ModelError(
            f"expected a gated model, got {type(gated).__name__}; call swan.swanify(model) first"
        )
    with gated.gates.soft_evaluation():
        yield gated
