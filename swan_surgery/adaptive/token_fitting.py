"""Gates of blocks of neurons in closed form: what each gives a token, read off the token, at one price."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from swan_surgery.adaptive.adaptive_model import AdaptiveModel
from swan_surgery.adaptive.bisecting import mean_macs, write_lowest_price
from swan_surgery.adaptive.calibrating import observe_
from swan_surgery.adaptive.thresholds import Reading, fit_reading
from swan_surgery.adaptive.token_block import TokenBlock
from swan_surgery.adaptive.watching import watching
from swan_surgery.calibration import calibrate, norms_of
from swan_surgery.errors import InputError
from swan_surgery.models.batches import run_on_batch


# Tokens of a layer that its gates are fitted to, evenly from all batches.
_MOST = 16_384
# A price at which any finite reading leaves one block of neurons open.
_DEAREST = 2.0**60
# The mean size of a layer's logits.
_LOGIT = 2.0


@dataclass
class _Layer:
    """Tokens of a layer, and how far what each block of neurons gives them lies from its mean."""

    tokens: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    squares: float = 0.0
    count: int = 0


def fit_tokens_(
    adapted: AdaptiveModel, batches: list[Any], share: float, others: list[Any] | None
) -> None:
    """Set all gates, so that samples cost `share` of the given model on average."""
    readings = _readings(adapted, batches)
    _price_(adapted, batches, readings, share)
    if others is not None and norms_of(adapted):
        calibrate(adapted, others)
    observe_(adapted, batches if others is None else others, among="mixed")
    _price_(adapted, batches, readings, share)


def _readings(adapted: AdaptiveModel, batches: list[Any]) -> Mapping[str, Reading]:
    """By layer, the distance of each block's output from its mean, in shares of the layer's own output.

    The norm of a block's output is what D2DMoE (Szatkowski et al., 2024) regresses; closed is the mean
    here, so the mean is taken off.
    """
    layers = {name: _Layer() for name in adapted.costs.blocks}
    most = max(1, _MOST // len(batches))
    with watching(adapted, layers) as seen, adapted.holding(-1):
        for batch in batches:
            with _listening(adapted, layers, most):
                run_on_batch(adapted, batch)
            for name, own in layers.items():
                tokens = seen[name][-1]
                own.tokens.append(tokens[:: _step(len(tokens), most)].double())
                seen[name].clear()
    found = {}
    for name, own in layers.items():
        scale = (own.squares / max(own.count, 1)) ** 0.5 or 1.0
        norms = torch.cat(own.norms) / scale
        if not bool(norms.isfinite().all()):
            raise InputError(f"the outputs of {name!r} on these batches are not finite")
        found[name] = fit_reading(torch.cat(own.tokens), norms)
    return found


def _step(count: int, most: int) -> int:
    return -(-count // most)


@contextmanager
def _listening(adapted: AdaptiveModel, layers: Mapping[str, _Layer], most: int) -> Iterator[None]:
    """Layers tell what their blocks of neurons give."""

    def heard(_module: nn.Module, args: Any, *, block: TokenBlock, own: _Layer) -> None:
        x = args[0].detach().flatten(0, -2)
        norms, total = block.distances(x[:: _step(len(x), most)])
        own.norms.append(norms.double().cpu())
        own.squares += float(total.double().square().sum())
        own.count += len(total)

    handles = []
    for name, own in layers.items():
        block = adapted.blocks()[name]
        assert isinstance(block, TokenBlock)  # noqa: S101 - of tokens
        reader = block.full.get_submodule(block.reader)
        handles.append(reader.register_forward_pre_hook(partial(heard, block=block, own=own)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _price_(
    adapted: AdaptiveModel, batches: list[Any], readings: Mapping[str, Reading], share: float
) -> None:
    """The lowest price whose gates keep the budget when they run.

    Open is whose squared distance is worth its MACs: norm >= price * (MACs of the block / of all)^(1/2).
    """
    costs = {
        name: (own / own.sum()).clamp(min=1e-12).sqrt()
        for name, own in adapted.costs.marginal().items()  # type: ignore[attr-defined]
    }
    budget = share * adapted.costs.dense

    def write(price: float) -> None:
        for name, own in readings.items():
            gates = adapted.blocks()[name].effort
            bias = own.bias - price * costs[name]
            size = float((own.weight.square().sum(0).sqrt() + bias.abs()).mean()) / _LOGIT
            scale = 1 / size if size > 0 else 1.0
            gates.weight.copy_(own.weight.T * scale)
            gates.bias.copy_(bias * scale)

    dearest = 1.0
    write(dearest)
    while mean_macs(adapted, batches) > budget and dearest < _DEAREST:
        dearest *= 2
        write(dearest)
    write_lowest_price(adapted, batches, write, budget, dearest)


__all__ = ["fit_tokens_"]
