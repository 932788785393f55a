"""`report`: measure two models on the same inputs and say what changed."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from swan_surgery.channels import ChannelMap
from swan_surgery.costs.macs import count_macs
from swan_surgery.costs.params import count_params
from swan_surgery.cutting.pruning import prune
from swan_surgery.environment.machine import Environment, device_of, environment
from swan_surgery.environment.notebooks import html_table
from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import InputError
from swan_surgery.gates import GatedModel
from swan_surgery.models import Inputs, as_inputs, copy_of
from swan_surgery.models.checks import check_is_module, checked_inputs
from swan_surgery.reporting import measurement, rendering
from swan_surgery.reporting.figures import Figures, LayerChange, LayerFigures
from swan_surgery.reporting.page import page, tiles
from swan_surgery.timing.loop import Latency
from swan_surgery.timing.memory import peak_activation_bytes
from swan_surgery.timing.runtimes import Runtime, in_turns


_VERSION = 1


@dataclass(frozen=True, slots=True)
class Report:
    """What two models cost, and what changed layer by layer. `str(report)` is a text table.

    Attributes:
        before: figures of the first model.
        after: figures of the second.
        layers: layers that differ or not, in the order of the first model.
        input_shapes: shapes of the example inputs; the MACs are for these.
        batch: first dimension of the first example input.
        environment: device, threads and versions.
        runtime: where the latencies were measured.
        unit: of the accuracies, as in "%".
    """

    before: Figures
    after: Figures
    layers: tuple[LayerChange, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    batch: int
    environment: Environment
    runtime: Runtime = "eager"
    unit: str = ""

    def __str__(self) -> str:
        """The whole report in plain text."""
        return "\n".join(
            [
                self.summary(),
                rendering.text_table(
                    "layers", rendering.LAYER_HEADER, rendering.layer_rows(self.layers)
                ),
                *self._footnotes(),
            ]
        )

    def summary(self) -> str:
        """The totals alone, without the layers, in plain text."""
        title = self._title()
        rows = rendering.summary_rows(self.before, self.after, self.batch, self.unit)
        return rendering.text_table(title, rendering.SUMMARY_HEADER, rows)

    def _repr_html_(self) -> str:
        rows = rendering.summary_rows(self.before, self.after, self.batch, self.unit)
        layers = rendering.layer_rows(self.layers)
        return html_table(self._title(), rendering.SUMMARY_HEADER, rows) + html_table(
            "layers", rendering.LAYER_HEADER, layers, notes=self._footnotes()
        )

    def to_markdown(self) -> str:
        """The whole report as markdown tables."""
        rows = rendering.summary_rows(self.before, self.after, self.batch, self.unit)
        return "\n\n".join(
            [
                f"## {self._title()}",
                rendering.markdown_table(rendering.SUMMARY_HEADER, rows),
                "### Layers",
                rendering.markdown_table(rendering.LAYER_HEADER, rendering.layer_rows(self.layers)),
                "\n".join(f"- {note}" for note in self._footnotes()) + "\n",
            ]
        )

    def to_html(
        self,
        *,
        channels: ChannelMap | None = None,
        probabilities: Mapping[str, Tensor] | None = None,
        runs: Sequence[tuple[str, float, float]] = (),
        relative_error: float | None = None,
    ) -> str:
        """The whole report as one HTML file: no scripts, no network, light and dark.

        Args:
            channels: `gated.channels`, for which layers hang together and which channels stay.
            probabilities: gate probabilities, shape (num_units,), by the name of the moment they were
                taken at, as in `{"epoch 3": gated.gates.probabilities()}`; drawn as histograms.
            runs: name, share of MACs in (0, 1] and accuracy of several runs, drawn as a Pareto front.
            relative_error: between the gated and the pruned model, if it was measured.
        """
        old, new = self.before, self.after
        notes = self._footnotes()
        if relative_error is not None:
            notes.insert(
                0, f"gated and pruned model agree to {relative_error:.1e} of the largest output"
            )
        return page(
            self._title(),
            tiles(old, new, self.unit),
            rendering.summary_rows(old, new, self.batch, self.unit),
            self.layers,
            notes,
            channels=channels,
            probabilities=probabilities,
            runs=runs,
            quality=f"accuracy in {self.unit}" if self.unit else "accuracy",
        )

    def to_json(self) -> str:
        """The figures as versioned JSON."""
        return json.dumps({"version": _VERSION, **asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Read what `to_json` wrote.

        Raises:
            InputError: not a report, or of another version.
        """
        try:
            data = json.loads(text)
            if data.pop("version") != _VERSION:
                raise InputError(f"a report of another version; this is version {_VERSION}")
            return cls(
                before=_figures(data["before"]),
                after=_figures(data["after"]),
                layers=tuple(
                    LayerChange(entry["name"], _layer(entry["before"]), _layer(entry["after"]))
                    for entry in data["layers"]
                ),
                input_shapes=tuple(tuple(shape) for shape in data["input_shapes"]),
                batch=data["batch"],
                environment=Environment(**data["environment"]),
                runtime=data.get("runtime", "eager"),
                unit=data.get("unit", ""),
            )
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as err:
            raise InputError(f"not a report: {err}") from err

    def _title(self) -> str:
        where = "" if self.runtime == "eager" else f", {self.runtime}"
        return f"{self.before.model} before and after, batch {self.batch}{where}"

    def _footnotes(self) -> list[str]:
        shapes = ["x".join(map(str, shape)) or "scalar" for shape in self.input_shapes]
        return [
            *rendering.speed_notes(self.before, self.after, self.layers),
            *rendering.footnotes(self.before, self.after, shapes, self.environment),
        ]


def _figures(data: dict[str, Any]) -> Figures:
    data["latencies"] = tuple(Latency(**entry) for entry in data["latencies"])
    data["uncounted_ops"] = tuple((name, calls) for name, calls in data["uncounted_ops"])
    return Figures(**data)


def _layer(data: dict[str, Any] | None) -> LayerFigures | None:
    return None if data is None else LayerFigures(**data)


def report(
    before: nn.Module,
    after: nn.Module,
    example_inputs: Any,
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
    unit: str = "",
    runtime: Runtime = "eager",
) -> Report:
    """Compare two models on the same inputs: cost, size, memory, latency, accuracy, widths.

    Copies are measured, in eval mode, each on the device where its model lies; the given models are
    not changed. A gated model stands for what `prune(gated)` makes of it, so that all its figures
    are those of the hard gates. Latency takes up to 2 s per model and batch size.

    Args:
        before: any model.
        after: any other model that takes the same inputs.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments.
        evaluate: gives a model's accuracy; it gets a copy in eval mode.
        unit: of what it gives, shown behind it, as in "%".
        runtime: where latencies are measured, as in `swan.measure_latency`: that which ships.

    Raises:
        ModelError: `before` or `after` is not an `nn.Module`.
        InputError: a model cannot be run on the inputs, or an unknown runtime.
        MissingExtraError, ExportError: of `runtime="onnxruntime"`.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> gated = swan.swanify(net, torch.zeros(1, 3))
        >>> gated.close("0", [1, 3, 5, 7])
        >>> found = swan.report(net, swan.prune(gated), torch.zeros(1, 3))
        >>> found.before.macs, found.after.macs
        (40, 20)
    """
    for model in (before, after):
        check_is_module(model)
    inputs = as_inputs(example_inputs)
    tensors = [leaf for leaf in _leaves(inputs) if isinstance(leaf, Tensor)]
    if not tensors:
        raise InputError("example_inputs holds no tensor")
    batch = tensors[0].shape[0] if tensors[0].ndim else 1
    models = [_stand_in(model) for model in (before, after)]
    with streams_kept():
        given = [(model, checked_inputs(model, inputs, to="count MACs")) for model in models]
        old_layers, new_layers = (measurement.layer_figures(*run) for run in given)
        timed = [in_turns(given, batch, runtime)]
        if batch > 1:
            timed.append(
                in_turns([(model, _first(own, batch)) for model, own in given], 1, runtime)
            )
        figures = [
            _measure(model, own, latencies, evaluate)
            for (model, own), latencies in zip(given, zip(*timed, strict=True), strict=True)
        ]
    names = dict.fromkeys([*old_layers, *new_layers])
    measurement.name_swapped(*figures)
    return Report(
        before=figures[0],
        after=figures[1],
        layers=tuple(LayerChange(n, old_layers.get(n), new_layers.get(n)) for n in names),
        input_shapes=tuple(tuple(tensor.shape) for tensor in tensors),
        batch=batch,
        environment=environment(device_of(models[0])),
        runtime=runtime,
        unit=unit,
    )


def _stand_in(model: nn.Module) -> nn.Module:
    if isinstance(model, GatedModel):
        return prune(model, verify=False).eval()
    return copy_of(model).eval()


def _measure(
    model: nn.Module,
    inputs: Inputs,
    latencies: tuple[Latency, ...],
    evaluate: Callable[[nn.Module], float] | None,
) -> Figures:
    return Figures(
        model=type(model).__name__,
        macs=count_macs(model, inputs),
        params=count_params(model),
        size_bytes=measurement.size_bytes(model),
        peak_activation_bytes=peak_activation_bytes(model, inputs),
        latencies=latencies,
        uncounted_ops=measurement.uncounted_ops(model, inputs),
        accuracy=None if evaluate is None else float(evaluate(model)),
    )


def _leaves(inputs: Inputs) -> list[Any]:
    kwargs: Mapping[str, Any] = inputs.kwargs
    return tree_leaves((inputs.args, dict(kwargs)))


def _first(inputs: Inputs, batch: int) -> Inputs:
    """The first sample of every tensor that has one entry per sample."""
    return inputs.map(lambda t: t[:1] if t.ndim and t.shape[0] == batch else t)
