"""Which feed-forward layers let tokens choose in passing, and run with them what lies between."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from swan_surgery.adaptive.assembling import reference, token_block
from swan_surgery.adaptive.block import AdaptiveBlock
from swan_surgery.adaptive.candidates import NestedGroup
from swan_surgery.adaptive.choices import drawn_masks
from swan_surgery.adaptive.neuron_blocks import even_sizes
from swan_surgery.adaptive.probing import Call, Probe, close, twice
from swan_surgery.adaptive.run import Run, begin
from swan_surgery.channels import ChannelMap
from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.models import Inputs
from swan_surgery.models.modes import evaluating


_NOT_APART = "what lies between the linear layers does not take each neuron by itself"


def in_passing(group: NestedGroup) -> NestedGroup:
    """The same group, by its linear layers instead of its block."""
    owners = dict.fromkeys(own.tensor.rpartition(".")[0] for own in group.axes)
    return replace(group, writers=tuple(name for name in owners if name not in group.readers))


def with_spans(
    model: nn.Module,
    inputs: Inputs,
    spans: Sequence[NestedGroup],
    channels: ChannelMap,
    probed: Probe,
    *,
    block_size: int,
) -> tuple[list[NestedGroup], dict[tuple[int, ...], str], Probe]:
    """Those that can, by their units why the others cannot, and the probe with what the former get and give.

    Args:
        model: a private copy.
        inputs: example inputs.
        spans: groups with writers.
        channels: the map of the model.
        probed: how their blocks, writers and readers are called.
        block_size: neurons in a block.
    """
    reasons: dict[tuple[int, ...], str] = {}
    found: list[NestedGroup] = []
    # Of two where one module holds the other the inner one adapts: there may be many of these.
    for span in sorted(spans, key=lambda own: -_depth(own.block)):
        reason = _refusal(span, probed) or in_the_way(span, [own.block for own in found])
        if reason is None:
            found.append(span)
        else:
            reasons[span.units] = reason
    called = _as_called(found, probed)
    if found and not _is_exact(model, inputs, found, channels, called, block_size):
        alone = [
            own for own in found if _is_exact(model, inputs, [own], channels, called, block_size)
        ]
        reasons |= {own.units: _NOT_APART for own in found if own not in alone}
        found = alone
    return found, reasons, _as_called(found, probed)


def odd_spans(
    model: nn.Module, inputs: Inputs, spans: Sequence[NestedGroup], probed: Probe
) -> list[str]:
    """Blocks whose reader, somewhere in a run of the model, gives something else than it did when probed."""
    if not spans:
        return []
    seen: dict[str, Any] = {}
    handles = [
        model.get_submodule(own.readers[0]).register_forward_hook(
            lambda _module, _args, output, name=own.block: seen.update({name: output})
        )
        for own in spans
    ]
    try:
        _run(model, twice(inputs, probed.batch))
    finally:
        for handle in handles:
            handle.remove()
    return [
        own.block
        for own in spans
        if own.block not in seen or not close(seen[own.block], probed.calls[own.block].output)
    ]


def _refusal(span: NestedGroup, probed: Probe) -> str | None:
    (reader,) = span.readers
    for name in (*span.writers, reader):
        if name in probed.refused:
            return probed.refused[name]
        if probed.counts[name] != 1:
            return f"{name!r} runs {probed.counts[name]} times as a module"
    inputs = [_input(probed.calls[name]) for name in span.writers]
    if any(not torch.equal(own, inputs[0]) for own in inputs[1:]):
        return "the layers that write them get different inputs"
    if inputs[0].shape[:-1] != probed.calls[reader].output.shape[:-1]:
        return "what reads them does not give one row per token"
    return None


def _depth(name: str) -> int:
    return len(name.split(".")) if name else 0


def _input(call: Call) -> Tensor:
    found: Tensor = next(leaf for leaf in tree_leaves(call.arguments) if isinstance(leaf, Tensor))
    return found


def in_the_way(group: NestedGroup, adapts: Iterable[str]) -> str | None:
    """Why a group cannot adapt beside others: blocks replace modules, and none stands in another."""
    for name in adapts:
        inner, outer = sorted((name, group.block), key=len, reverse=True)
        if not outer or inner == outer or inner.startswith(f"{outer}."):
            return f"{name or 'the model'!r} adapts already, and one of the two holds the other"
    return None


def _as_called(spans: Sequence[NestedGroup], probed: Probe) -> Probe:
    """Blocks stand for their feed-forward layers: what these get and give."""
    first = {span.block: span.writers[0] for span in spans}
    calls = {
        span.block: Call(
            probed.calls[span.writers[0]].arguments, probed.calls[span.readers[0]].output
        )
        for span in spans
    }
    return replace(
        probed,
        rows={**probed.rows, **{block: probed.rows[name] for block, name in first.items()}},
        calls={**probed.calls, **calls},
        refused={name: why for name, why in probed.refused.items() if name not in first},
    )


def _is_exact(
    model: nn.Module,
    inputs: Inputs,
    spans: Sequence[NestedGroup],
    channels: ChannelMap,
    probed: Probe,
    block_size: int,
) -> bool:
    """Whether tokens that choose at random get the same packed as masked, and all open what the model gives."""
    many = twice(inputs, probed.batch)
    masks: dict[str, Tensor] = {}
    blocks: dict[str, AdaptiveBlock] = {}
    for span in spans:
        sizes = even_sizes(len(span.units), block_size)
        blocks[span.block] = token_block(
            model, span.block, [span], channels, sizes, probed, like=reference(model)
        )
        x = _input(probed.calls[span.block])
        rows = drawn_masks(x[..., 0].numel(), len(sizes), torch.Generator().manual_seed(0))
        masks[span.block] = rows.reshape(*x.shape[:-1], len(sizes)).to(x.device)
    whole = {name: torch.ones_like(own) for name, own in masks.items()}
    given = _leaves(model, many)
    try:
        with _installed(model, blocks) as whole_model:
            masked, packed = (
                _leaves(whole_model, many, Run(way, masks)) for way in ("masked", "group")
            )
            opened = _leaves(whole_model, many, Run("group", whole))
    except Exception:  # noqa: BLE001 - the model's own code, with neurons side by side
        return False
    return all(map(close, packed, masked)) and all(map(close, opened, given))


@contextmanager
def _installed(model: nn.Module, blocks: Mapping[str, AdaptiveBlock]) -> Iterator[nn.Module]:
    whole = model
    for name, block in blocks.items():
        if name:
            model.set_submodule(name, block)
        else:
            whole = block
    try:
        yield whole
    finally:
        for name, block in blocks.items():
            if name:
                model.set_submodule(name, block.full)


def _leaves(model: nn.Module, inputs: Inputs, run: Run | None = None) -> list[Tensor]:
    if run is None:
        found = _run(model, inputs)
    else:
        with begin(run):
            found = _run(model, inputs)
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]


def _run(model: nn.Module, inputs: Inputs) -> Any:
    with torch.no_grad(), streams_kept(), evaluating(model):
        return inputs.run(model)


__all__ = ["in_passing", "odd_spans", "with_spans"]
