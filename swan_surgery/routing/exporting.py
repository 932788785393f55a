"""A routed model as ONNX: one file that splits its batch, or the parts in files of their own; run and compared.

The parts are exported one by one (`swan_surgery.exporting`) and put together: the scores decide by NonZero which rows are gathered
for which branch, an `If` around each branch leaves it out where no row takes it, ScatterND restores the order.
"""

import math
import tempfile
from collections.abc import Sequence
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from swan_surgery.cutting.verification import tensor_error
from swan_surgery.environment.extras import needed_from
from swan_surgery.environment.writing import as_path, replacing
from swan_surgery.errors import ExportError, InputError, ModelError
from swan_surgery.exporting import Exported, OnnxSession, export
from swan_surgery.gates import GatedModel
from swan_surgery.models import Inputs, as_inputs, copy_of
from swan_surgery.models.modes import evaluating
from swan_surgery.routing.onnx_graphs import Part, assembled
from swan_surgery.routing.parts import Parts
from swan_surgery.routing.routed_model import MASKED, RoutedModel
from swan_surgery.routing.rows import margin_score


_TOLERANCE = 1e-4
_BATCHES = (1, 2, 5)
_MOST = 4  # inputs


class _Front(nn.Module):
    """Trunk and score; by the margin the light branch's output, too."""

    def __init__(self, own: Parts, *, margin: bool) -> None:
        super().__init__()
        self.trunk = own.trunk
        self.decides = own.light if margin else own.switch
        self.margin = margin

    # Not *args: torch.export wants to know them by name.
    def forward(self, a: Any, b: Any = None, c: Any = None, d: Any = None) -> Any:
        """What crosses, the score, what the light branch returns."""
        crossing = self.trunk(*(given for given in (a, b, c, d) if given is not None))
        found = self.decides(crossing)
        return (crossing, margin_score(found), found) if self.margin else (crossing, found)


def export_routed(
    routed: RoutedModel,
    path: str | PathLike[str],
    *,
    example_inputs: Any = None,
    split: bool = False,
) -> Exported | tuple[Exported, ...]:
    """Write a routed model in eval mode as ONNX; what is kept was run in onnxruntime and agrees with it.

    Args:
        routed: with thresholds set; it is not changed.
        path: ends in `.onnx`.
        example_inputs: those of `add_switch` by default.
        split: three files a switch in place of one: `NAME.front.onnx` (inputs -> what crosses, the score that the switch
            predicts), `NAME.light.onnx` and `NAME.full.onnx`; those of nested switches are numbered.

    Returns:
        What was exported; a tuple with `split=True`. Rows whose score lies at the threshold, up to rounding, are not compared.

    Raises:
        ModelError: a mask whose gates are in: `swan.cut_mask(routed)` first.
        InputError: another suffix.
        MissingExtraError: needs `pip install 'swan-surgery[export]'`.
        ExportError: torch cannot export a part, or the file computes something else.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> routed = swan.add_switch(net, "1", example_inputs=torch.randn(4, 3), light=0.5)
        >>> parts = swan.export_routed(routed.eval(), folder / "routed.onnx", split=True)
        >>> [exported.path.name for exported in parts]
        ['routed.front.onnx', 'routed.light.onnx', 'routed.full.onnx']
    """
    if not isinstance(routed, RoutedModel):
        raise ModelError(
            f"expected a routed model, got {type(routed).__name__}; call swan.add_switch first"
        )
    path = as_path(path, "swan.export_routed(routed, path)")
    if path.suffix != ".onnx":
        raise InputError(f"{path.name!r}: a routed model is exported to .onnx")
    if isinstance(routed.body, GatedModel):
        raise ModelError(MASKED)
    inputs = routed.own_inputs() if example_inputs is None else as_inputs(example_inputs)
    if inputs.kwargs or len(inputs.args) > _MOST or any(given is None for given in inputs.args):
        raise InputError(
            f"a routed model is exported with 1 to {_MOST} inputs by position; pass example_inputs as a tuple"
        )
    parts = copy_of(routed.parts).eval()
    assert isinstance(parts, Parts)  # noqa: S101 - a copy of one
    if split:
        return _export_parts(parts, path, inputs)
    with tempfile.TemporaryDirectory() as folder, needed_from("export"):
        import_module("onnx")
        model = _assemble(routed, parts, inputs, Path(folder))
    with replacing(path) as temporary:
        temporary.write_bytes(model)
        worst, batches = _compare(routed, OnnxSession(temporary), inputs)
        if not worst <= _TOLERANCE:
            raise ExportError(
                f"the export of the routed model computes something else: relative error {worst:.1e}; nothing was kept"
            )
    return Exported(path, worst, batches, path.stat().st_size)


def _export_parts(parts: Parts, path: Path, inputs: Inputs) -> tuple[Exported, ...]:
    found = []
    for level, own in enumerate(parts.chain):
        number = f".{level}" if len(parts.chain) > 1 else ""
        with torch.no_grad():
            crossing = inputs.run(own.trunk)
        pieces = {"front": (_Front(own, margin=False), inputs), "light": (own.light, crossing)}
        if level + 1 == len(parts.chain):
            pieces["full"] = (own.full, crossing)
        for name, (piece, given) in pieces.items():
            found.append(export(piece, path.with_suffix(f"{number}.{name}.onnx"), given))
        inputs = Inputs((crossing,), {})
    return tuple(found)


def _assemble(routed: RoutedModel, parts: Parts, inputs: Inputs, folder: Path) -> bytes:
    found: list[tuple[Part, Part | None, float]] = []
    for level, own in enumerate(parts.chain):
        is_margin = routed.decision(level) == "margin"
        with torch.no_grad():
            crossing = inputs.run(own.trunk)
        front = _part(_Front(own, margin=is_margin), inputs, folder / f"front{level}.onnx")
        light = None if is_margin else _part(own.light, crossing, folder / f"light{level}.onnx")
        found.append((front, light, routed.thresholds[level]))
        inputs = Inputs((crossing,), {})
    full = _part(parts.last, inputs, folder / "full.onnx")
    return assembled(found, full)


def _part(module: nn.Module, inputs: Any, path: Path) -> Part:
    given = as_inputs(inputs)
    exported = export(module, path, given)
    if not exported.has_dynamic_batch:
        raise ExportError(
            f"a part of the routed model ({type(module).__name__}) exports for one batch size alone, and a routed model "
            f"splits batches; export the parts for batch 1 with split=True"
        )
    with torch.no_grad():
        leaves = tree_leaves(given.run(module))
    shapes = [tuple(leaf.shape[1:]) for leaf in leaves if isinstance(leaf, Tensor)]
    return Part(path, shapes)


def _compare(
    routed: RoutedModel, session: OnnxSession, inputs: Inputs
) -> tuple[float, tuple[int, ...]]:
    worst, batches = 0.0, []
    with evaluating(routed):
        for size in (_size(inputs), *_BATCHES):
            given = inputs.map(lambda t, size=size: _resized(t, size))
            with torch.no_grad():
                wanted = tree_leaves(given.run(routed))
                sure = _sure(routed, given)
            found = session.run(session.feed(given))
            worst = max(worst, _error(found, wanted, sure))
            batches.append(size)
    return worst, tuple(dict.fromkeys(batches))


def _size(inputs: Inputs) -> int:
    return next(
        t.shape[0] for t in tree_leaves((inputs.args, dict(inputs.kwargs))) if isinstance(t, Tensor)
    )


def _resized(tensor: Tensor, size: int) -> Tensor:
    times = -(-size // tensor.shape[0])
    return tensor.repeat(times, *[1] * (tensor.ndim - 1))[:size]


def _sure(routed: RoutedModel, given: Inputs) -> Tensor:
    """Which rows do not lie at a threshold up to rounding, bool [B]."""
    parts = routed.parts
    crossing = given.run(parts.trunk)
    sure = torch.ones(len(crossing), dtype=torch.bool, device=crossing.device)
    for level, own in enumerate(parts.chain):
        if level:
            crossing = own.trunk(crossing)
        threshold = routed.thresholds[level]
        if math.isinf(threshold):
            continue  # all go one way
        scores = routed.score(own, level, crossing)[0]
        sure &= ~((scores - threshold).abs() <= 1e-4 * (1 + abs(threshold)))
    return sure


def _error(found: Sequence[Any], wanted: list[Any], sure: Tensor) -> float:
    tensors = [t for t in wanted if isinstance(t, Tensor)]
    if len(found) != len(tensors):
        return float("inf")
    rows, errors = sure.cpu(), [0.0]
    for one, two in zip(found, tensors, strict=True):
        own = torch.as_tensor(one)
        if own.shape != two.shape:
            return float("inf")
        errors.append(tensor_error(two.cpu()[rows].double(), own[rows].double()))
    return max(errors)


# `swan.export`, which knows no routed models, finds it there.
RoutedModel.export_as_a_whole = export_routed  # type: ignore[attr-defined]  # looked up by name

__all__ = ["export_routed"]
