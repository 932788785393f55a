"""Two runs of a model tell how its blocks are called: rows per sample, and whether samples stay apart."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from swan_surgery.adaptive.rows import Rows
from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import InputError
from swan_surgery.models import Inputs
from swan_surgery.models.modes import evaluating
from swan_surgery.models.tensors import plain_tensors


@dataclass(frozen=True, slots=True)
class Call:
    """A block's only call in a run: (args, kwargs) and what came out."""

    arguments: Any
    output: Any


@dataclass(frozen=True, slots=True)
class Probe:
    """How blocks are called; `refused` says of the others why they cannot take rows apart.

    Attributes:
        rows: by block, in the order in which they run.
        calls: by block, for a batch of `batch` samples twice.
        counts: how often each watched module ran.
        refused: block -> reason.
        batch: samples in the example inputs.
    """

    rows: Mapping[str, Rows]
    calls: Mapping[str, Call]
    counts: Mapping[str, int]
    refused: Mapping[str, str]
    batch: int


def batch_of(inputs: Inputs) -> int:
    """Samples in example inputs: the length of the first tensor's first axis.

    Raises:
        InputError: there is none.
    """
    for leaf in tree_leaves((inputs.args, dict(inputs.kwargs))):
        if isinstance(leaf, Tensor) and leaf.ndim and len(leaf):
            return leaf.shape[0]
    raise InputError("example_inputs hold no samples: no tensor has a first axis that is not empty")


def twice(inputs: Inputs, batch: int) -> Inputs:
    """As many samples again, the same ones turned around: other samples of the same kind."""

    def on(tensor: Tensor) -> Tensor:
        if not tensor.ndim or tensor.shape[0] != batch:
            return tensor
        return torch.cat([tensor, tensor.flip(tuple(range(1, tensor.ndim)))])

    return inputs.map(on)


def probe(
    model: nn.Module,
    inputs: Inputs,
    *,
    blocks: Iterable[str],
    watched: Iterable[str],
    by_token: Iterable[str] = (),
) -> Probe:
    """Run a private model in eval mode, once and with twice as many samples.

    Args:
        model: a private copy.
        inputs: example inputs.
        blocks: modules that shall take their samples apart.
        watched: modules whose calls are counted.
        by_token: modules that shall take tokens apart: their rows may be all tokens of one sample after the other.
    """
    batch = batch_of(inputs)
    layers = frozenset(by_token)
    names = tuple(dict.fromkeys((*blocks, *layers)))
    counts = dict.fromkeys(watched, 0)
    first, _ = _calls(model, inputs, names, counts={})
    second, broken = _calls(model, twice(inputs, batch), names, counts=counts)
    rows, refused = {}, dict(broken)
    for name in [*second, *names]:
        if name in rows or name in refused:
            continue
        if name not in second or name not in first:
            refused[name] = f"their block {name!r} does not run"
            continue
        calls = (first[name], second[name])
        found = _rows(model.get_submodule(name), *calls, batch, by_token=name in layers)
        if isinstance(found, Rows):
            rows[name] = found
        else:
            refused[name] = f"their block {name!r} {found}"
    return Probe(rows, second, counts, refused, batch)


def _calls(
    model: nn.Module, inputs: Inputs, names: Iterable[str], *, counts: dict[str, int]
) -> tuple[dict[str, Call], dict[str, str]]:
    calls: dict[str, Call] = {}
    broken: dict[str, str] = {}
    handles = []
    given: dict[str, Any] = {}
    kept: dict[str, list[int]] = {}

    def before(module: nn.Module, args: Any, kwargs: Any, *, name: str) -> None:
        given[name] = (tree_map(_copied, (args, kwargs)), (args, kwargs))
        kept[name] = _kept(module)

    def behind(module: nn.Module, _args: Any, _kwargs: Any, output: Any, *, name: str) -> None:
        if name in calls:
            broken[name] = f"their block {name!r} runs more than once"
        copied, own = given.pop(name)
        if not _same(copied, own):
            broken[name] = f"their block {name!r} changes its input in place"
        if _kept(module) != kept.pop(name):
            broken[name] = f"their block {name!r} keeps a tensor of each run"
        calls[name] = Call(copied, tree_map(_copied, output))

    def count(_module: nn.Module, _args: Any, *, name: str) -> None:
        counts[name] += 1

    for name in names:
        module = model.get_submodule(name)
        handles += [
            module.register_forward_pre_hook(partial(before, name=name), with_kwargs=True),
            module.register_forward_hook(partial(behind, name=name), with_kwargs=True),
        ]
    for name in counts:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(partial(count, name=name)))
    try:
        with torch.no_grad(), streams_kept(), evaluating(model):
            inputs.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return calls, broken


def _kept(block: nn.Module) -> list[int]:
    """The tensors that lie in plain attributes, by identity."""
    return [id(own) for module in block.modules() for own in plain_tensors(module).values()]


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _same(one: Any, other: Any) -> bool:
    (before, shape), (after, other_shape) = tree_flatten(one), tree_flatten(other)
    return shape == other_shape and all(
        torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(before, after, strict=True)
        if isinstance(a, Tensor)
    )


def _rows(block: nn.Module, one: Call, two: Call, batch: int, *, by_token: bool) -> Rows | str:
    """Which leaves hold a row per sample; or, in words, why rows cannot be taken apart."""
    single, shape = tree_flatten(one.arguments)
    double, other_shape = tree_flatten(two.arguments)
    if shape != other_shape:
        return "is called differently for more samples"
    positions = [
        index
        for index, (a, b) in enumerate(zip(single, double, strict=True))
        if isinstance(a, Tensor) and a.ndim and b.shape[0] == 2 * a.shape[0]
    ]
    counts = {len(single[index]) for index in positions}
    if by_token and len(counts) == 1 and not min(counts) % batch:
        (batch,) = counts
    if counts != {batch}:
        return "gets rows that are no samples"
    outputs = tree_leaves(two.output)
    if not outputs or any(
        leaf is not None and not (isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == 2 * batch)
        for leaf in outputs
    ):
        return "gives something that has no row per sample"
    rows = Rows.of(two.arguments, positions)
    first = rows.first(two.arguments)
    if not first.is_floating_point() or first.ndim < 2:
        return "gets no activations to look at"
    args, kwargs = tree_map(_copied, rows.take(two.arguments, range(batch)))
    try:
        with torch.no_grad(), streams_kept(), evaluating(block):
            alone = tree_leaves(block(*args, **kwargs))
    except Exception as err:  # noqa: BLE001 - the model's own code, with what a first run left in its arguments
        return f"does not run again with some of its samples ({type(err).__name__})"
    pairs = zip(alone, outputs, strict=True)
    same = all(close(a, b[:batch]) for a, b in pairs if isinstance(a, Tensor))
    return rows if same else "mixes samples, or draws at random"


def close(found: Tensor, wanted: Tensor) -> bool:
    """Equal up to rounding: 1e-9 of the largest value in float64, 1e-4 in float32, 2e-2 in half."""
    bounds = {torch.float64: 1e-9, torch.float32: 1e-4}
    if not found.is_floating_point():
        return torch.equal(found, wanted)
    scale = max(float(wanted.abs().max()), 1e-30) if wanted.numel() else 1.0
    error = float((found - wanted).abs().max()) if wanted.numel() else 0.0
    return error <= bounds.get(found.dtype, 2e-2) * scale


__all__ = ["Call", "Probe", "batch_of", "close", "evaluating", "probe", "twice"]
