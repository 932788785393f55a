"""`export`: a model as ONNX or torch.export file, run and compared with the model before it is kept."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from swan_surgery.cutting.verification import tensor_error
from swan_surgery.environment.extras import needed_from
from swan_surgery.environment.process_wide import without_warnings
from swan_surgery.environment.writing import as_path, replacing
from swan_surgery.errors import ExportError, InputError, ModelError, SwanError
from swan_surgery.exporting.naming import output_names, rename_
from swan_surgery.exporting.session import OnnxSession
from swan_surgery.gates.checks import check_model
from swan_surgery.models import Inputs, copy_of
from swan_surgery.models.checks import checked_inputs


# Other runtimes order sums in other ways; relative to the largest output.
_TOLERANCE = 1e-4
# Of torch's own words about what it cannot export, in characters.
_LONGEST = 200
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# Batches that a file of any batch size is run on.
_BATCHES = (1, 2, 5)

Run = Callable[[Inputs], Sequence[Tensor]]


@dataclass(frozen=True, slots=True)
class Exported:
    """An export that was run and compared.

    Attributes:
        path: the file.
        relative_error: largest difference of any output over the largest output, over all runs.
        batches: batch sizes it was run with; a single one where the batch is fixed.
        size_bytes: of the file.
    """

    path: Path
    relative_error: float
    batches: tuple[int, ...]
    size_bytes: int

    @property
    def has_dynamic_batch(self) -> bool:
        """Whether the file takes any batch size."""
        return len(self.batches) > 1


def export(
    model: nn.Module,
    path: str | PathLike[str],
    example_inputs: Any,
    *,
    dynamic_batch: bool = True,
) -> Exported:
    """Write a model in eval mode for another runtime; what is kept was run and agrees with it.

    `.onnx` is made by torch's dynamo exporter and run by onnxruntime on the CPU, `.pt2` by
    `torch.export` and run by torch. The file takes any batch size where the model allows it. In ONNX, inputs
    are called as the arguments of `forward`, outputs as the model names them (`logits`; else `output`, or
    `output_0`, `output_1`), and the free axis `batch`.

    Args:
        model: a plain model, usually what `swan.prune` returned; it is not changed.
        path: ends in `.onnx` or `.pt2`; an existing file is replaced once the new one has agreed.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments.
        dynamic_batch: False fixes the batch size of the example inputs.

    Raises:
        InputError: another suffix, or the model cannot be run on the inputs.
        ModelError: not a plain model: gated ones are pruned first; adaptive ones decide on data what runs, unless masked.
        MissingExtraError: `.onnx` needs `pip install 'swan-surgery[export]'`.
        ExportError: torch cannot export the model, or the export computes something else.
        WritingError: the file could not be written.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> exported = swan.export(net, folder / "net.pt2", torch.randn(4, 3))
        >>> exported.has_dynamic_batch, exported.relative_error < 1e-6
        (True, True)
    """
    path = as_path(path, "swan.export(model, path, example_inputs)")
    if (own := getattr(type(model), "export_as_a_whole", None)) is not None:
        return own(model, path, example_inputs=example_inputs)  # type: ignore[no-any-return]  # made of several models
    if path.suffix not in EXPORTERS:
        raise InputError(
            f"{path.name!r}: the suffix says what to export to, and must be one of "
            f"{', '.join(EXPORTERS)}"
        )
    given: Any = model
    for own in given.modules() if isinstance(given, nn.Module) else ():
        says: Any = own
        if hasattr(type(own), "exports_not") and (reason := says.exports_not(path.suffix)):
            raise ModelError(reason)
    check_model(model)
    inputs = checked_inputs(model, example_inputs, to="export")
    private = copy_of(model).eval()
    inputs = _named(private, inputs)
    wanted = _wanted(private, inputs)
    with replacing(path) as temporary:
        run, own = _exported(
            private, temporary, wanted, EXPORTERS[path.suffix], dynamic=dynamic_batch
        )
        worst = max(_error(run(given), outputs) for given, outputs in own.values())
        if not worst <= _TOLERANCE:
            raise ExportError(
                f"the export of {type(model).__name__} to {path.suffix} computes something else: "
                f"relative error {worst:.1e}, allowed are {_TOLERANCE:.0e}; nothing was kept"
            )
        size = temporary.stat().st_size
    return Exported(path, worst, tuple(own), size)


Wanted = Mapping[int, tuple[Inputs, Sequence[Tensor]]]
Exporter = Callable[[nn.Module, Path, Inputs, Any], Run]


def _exported(
    model: nn.Module, path: Path, wanted: Wanted, exporter: Exporter, *, dynamic: bool
) -> tuple[Run, Wanted]:
    """Export for any batch where asked for and possible, else for that of the example inputs."""
    first = next(iter(wanted))
    if dynamic and len(wanted) > 1:
        # A batch of one would be taken for a constant.
        sample = wanted[max(wanted)][0]
        batch = max(wanted)

        def dimensions(leaf: Any) -> Any:
            is_batched = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch
            return {0: torch.export.Dim.AUTO} if is_batched else None

        # As torch.export names inputs: those of `*args` are one parameter's, together.
        call = inspect.signature(model.forward).bind(*sample.args, **sample.kwargs)
        shapes = tree_map(dimensions, dict(call.arguments))
        try:
            run = exporter(model, path, sample, shapes)
            for given, outputs in wanted.values():
                _error(run(given), outputs)
        except Exception:  # noqa: BLE001, S110 - a batch that the model fixes in its code, in whatever runtime's words
            pass
        else:
            return run, wanted
    return exporter(model, path, wanted[first][0], None), {first: wanted[first]}


def _wanted(model: nn.Module, inputs: Inputs) -> Wanted:
    """What the model returns, for every batch size that it takes."""
    found: dict[int, tuple[Inputs, Sequence[Tensor]]] = {}
    for size, given in _sizes(inputs):
        try:
            found[size] = given, _outputs(model, given)
        except Exception as err:
            if not found:
                raise InputError(
                    f"{type(model).__name__} cannot be run on the example inputs: "
                    f"{type(err).__name__}: {str(err).splitlines()[0] if str(err) else ''}"
                ) from err
    return found


def _sizes(inputs: Inputs) -> Iterator[tuple[int, Inputs]]:
    """The example inputs at their own batch size, then at others; once without any batch."""
    leaves = [x for x in tree_leaves((inputs.args, dict(inputs.kwargs))) if isinstance(x, Tensor)]
    batch = next((x.shape[0] for x in leaves if x.ndim), 0)
    yield batch, inputs
    if not batch:
        return

    def repeated(size: int) -> Callable[[Tensor], Tensor]:
        def repeat(x: Tensor) -> Tensor:
            if not x.ndim or x.shape[0] != batch:
                return x
            return x.repeat(-(-size // batch), *[1] * (x.ndim - 1))[:size]

        return repeat

    for size in _BATCHES:
        if size != batch:
            yield size, inputs.map(repeated(size))


def _result(model: nn.Module, inputs: Inputs) -> Any:
    with torch.no_grad():
        return inputs.run(model)


def _outputs(model: nn.Module, inputs: Inputs) -> Sequence[Tensor]:
    leaves = tree_leaves(_result(model, inputs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    if len(found) != len(wanted):
        return float("inf")
    return max((tensor_error(a, b.cpu()) for a, b in zip(found, wanted, strict=True)), default=0.0)


def _to_pt2(model: nn.Module, path: Path, inputs: Inputs, shapes: Any) -> Run:
    with _torch_errors(".pt2"):
        program = torch.export.export(
            model, inputs.args, dict(inputs.kwargs), dynamic_shapes=shapes
        )
        torch.export.save(program, path)
        loaded = torch.export.load(path).module()

    def run(given: Inputs) -> Sequence[Tensor]:
        return [tensor.cpu() for tensor in _outputs(loaded, given)]

    return run


def _to_onnx(model: nn.Module, path: Path, inputs: Inputs, shapes: Any) -> Run:
    with needed_from("export"):
        import_module("onnxscript")  # the exporter's own need, said before it runs
    with _torch_errors(".onnx"):
        own = inputs.map(Tensor.cpu)
        model = model.to("cpu")
        names = output_names(_result(model, own))
        program = torch.onnx.export(
            model,
            # It takes a dict at the end for arguments by name, where there are no others.
            own.args if own.kwargs else (*own.args, {}),
            kwargs=dict(own.kwargs),
            dynamo=True,
            dynamic_shapes=shapes,
            verbose=False,
        )
        assert program is not None  # noqa: S101 - the dynamo exporter returns one
        rename_(program.model, names)
        program.save(path)
        session = OnnxSession(path)

    def run(given: Inputs) -> Sequence[Tensor]:
        results = session.run(session.feed(given))
        return [torch.from_numpy(np.asarray(result)) for result in results]

    return run


def _named(model: nn.Module, inputs: Inputs) -> Inputs:
    """All by name where some are: torch.export wants one or the other."""
    if not inputs.kwargs:
        return inputs
    bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs)
    if len(bound.kwargs) + len(bound.args) != len(bound.arguments):
        if not inputs.args:  # the names are those of a model inside
            return inputs
        raise InputError("give a model that takes *args or **kwargs its example inputs in a tuple")
    return Inputs((), dict(bound.arguments))


@contextmanager
def _torch_errors(kind: str) -> Iterator[None]:
    """Torch's exporters raise all sorts of errors, and warn about matters of their own."""
    try:
        with without_warnings():
            yield
    except (OSError, SwanError):
        raise
    except Exception as err:
        raise ExportError(f"cannot be exported to {kind}: {_told(err)}") from err


def _told(err: BaseException) -> str:
    """What lies at the bottom of an error, in one line: the exporters wrap theirs in advice."""
    while err.__cause__ is not None:
        err = err.__cause__
    text = _COLOURS.sub("", next((line for line in str(err).splitlines() if line.strip()), ""))
    return f"{type(err).__name__}: {text if len(text) <= _LONGEST else text[:_LONGEST] + ' ...'}"


EXPORTERS: Mapping[str, Exporter] = {".onnx": _to_onnx, ".pt2": _to_pt2}
