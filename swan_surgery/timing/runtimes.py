"""How long a model takes where it will run: eager, compiled, or in onnxruntime."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from swan_surgery.environment.machine import Environment, device_of, environment
from swan_surgery.environment.notebooks import html_table
from swan_surgery.errors import InputError, ModelError
from swan_surgery.exporting import OnnxSession, export
from swan_surgery.gates import GatedModel
from swan_surgery.gates.checks import check_model
from swan_surgery.models import Inputs, as_inputs, copy_of
from swan_surgery.models.checks import checked_inputs
from swan_surgery.timing.loop import Latency, latencies_in_turns, paired_latencies, timed_pass


Runtime = Literal["eager", "compile", "onnxruntime"]


@dataclass(frozen=True, slots=True)
class MeasuredLatency:
    """Milliseconds per forward pass in one runtime, and where they were measured.

    Attributes:
        runtime: "eager", "compile" or "onnxruntime".
        latency: median and quartiles.
        environment: device, threads and versions.
    """

    runtime: Runtime
    latency: Latency
    environment: Environment

    def __str__(self) -> str:
        """One line."""
        own = self.latency
        noise = "; too noisy a machine to compare by" if own.is_noisy else ""
        return (
            f"{self.runtime}, batch {own.batch}: {own.median_ms:.3g} ms [{own.lower_quartile_ms:.3g}, "
            f"{own.upper_quartile_ms:.3g}], median and quartiles of {own.repeats}; {self.environment.device}, "
            f"{self.environment.threads} threads, torch {self.environment.torch}{noise}"
        )

    def _repr_html_(self) -> str:
        own = self.latency
        row = (
            self.runtime,
            str(own.batch),
            f"{own.median_ms:.3g} ms",
            f"{own.lower_quartile_ms:.3g} to {own.upper_quartile_ms:.3g} ms",
        )
        header = ("runtime", "batch", "median", "quartiles")
        return html_table("Latency", header, [row], notes=[str(self)])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def measure_latency(
    model: nn.Module,
    example_inputs: Any,
    *,
    runtime: Runtime = "eager",
    seconds: float = 2.0,
) -> MeasuredLatency:
    """Measure how long a forward pass takes, in eval mode, on the model's device.

    Three passes first, then up to 200 in `seconds` (never fewer than 3). To compare models, measure
    them in turns with `swan.report`, or one after the other on a quiet machine.

    Args:
        model: a plain model; a copy runs.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments; their first
            dimension is the batch.
        runtime: "eager" as torch runs it; "compile" after `torch.compile`, whose compilation is not
            counted; "onnxruntime" on the CPU, with as many threads as torch uses.
        seconds: how long to measure.

    Raises:
        ModelError: a gated model: prune it first.
        InputError: an unknown runtime, or the model cannot be run on the inputs.
        MissingExtraError: onnxruntime needs `pip install 'swan-surgery[export]'`.
        ExportError: the model cannot be exported for onnxruntime.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> measured = swan.measure_latency(net, torch.randn(4, 3), seconds=0.01)
        >>> measured.latency.batch, measured.latency.median_ms > 0
        (4, True)
    """
    inputs = as_inputs(example_inputs)
    run = forward_pass(model, inputs, runtime)
    leaves = tree_leaves((inputs.args, dict(inputs.kwargs)))
    batch = next((x.shape[0] for x in leaves if isinstance(x, Tensor) and x.ndim), 1)
    (latency,) = latencies_in_turns([run], batch, seconds_each=seconds)
    device = torch.device("cpu") if runtime == "onnxruntime" else device_of(model)
    return MeasuredLatency(runtime, latency, environment(device))


def in_turns(
    runs: Sequence[tuple[nn.Module, Inputs]], batch: int, runtime: Runtime
) -> list[Latency]:
    """Time models in turns in a runtime; see `latencies_in_turns`."""
    if runtime == "eager":
        return paired_latencies(runs, batch)
    return latencies_in_turns([forward_pass(*run, runtime) for run in runs], batch)


def forward_pass(model: nn.Module, inputs: Inputs, runtime: Runtime) -> Callable[[], None]:
    """One forward pass of a copy in a runtime, as a function to be timed.

    Raises:
        As `measure_latency`.
    """
    if runtime not in get_args(Runtime):
        raise InputError(f"runtime must be one of {get_args(Runtime)}; got {runtime!r}")
    if isinstance(model, GatedModel):
        raise ModelError("the model is gated: measure what swan.prune(gated) returns")
    check_model(model)
    inputs = checked_inputs(model, inputs, to="measure")
    if runtime == "onnxruntime":
        return _in_onnxruntime(model, inputs)
    private = copy_of(model).eval()
    ready: Callable[..., Any] = torch.compile(private) if runtime == "compile" else private
    run = timed_pass(ready, inputs, device_of(private))
    try:
        with torch.no_grad():
            run()
    except Exception as err:
        text = str(err).splitlines()[0] if str(err) else ""
        raise InputError(
            f"{type(model).__name__} cannot be run on the inputs: {type(err).__name__}: {text}"
        ) from err
    return run


def _in_onnxruntime(model: nn.Module, inputs: Inputs) -> Callable[[], None]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export(model, path, inputs, dynamic_batch=False)
        session = OnnxSession(path, threads=torch.get_num_threads())
    feed = session.feed(inputs)

    def run() -> None:
        session.run(feed)

    return run
