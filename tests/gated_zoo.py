"""The zoo with gates: every model is gated once per process, and tests get copies of their own.

Gating takes a hundred times as long as copying what came out. Tests about the conversion itself call
`swanify`; all others start here.
"""

import copy
import functools

import torch

import swan_surgery as swan
from swan_surgery.gates import GatedModel
from tests.zoo import ZOO


@functools.cache
def _gated_once(name: str, dtype: torch.dtype) -> GatedModel:
    model, inputs = ZOO[name]()
    with torch.random.fork_rng(devices=[]):
        return swan.swanify(model.to(dtype), tuple(tensor.to(dtype) for tensor in inputs))


def fresh_zoo(name: str = "resnet_projection", *, dtype: torch.dtype = torch.float64) -> GatedModel:
    """In eval mode, all gates open, as `swanify` returns it."""
    return copy.deepcopy(_gated_once(name, dtype))


def drawn_zoo(
    name: str = "resnet_projection",
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 1,
    shift: float = 0.0,
) -> GatedModel:
    """With logits drawn around `shift`: about half of the units are closed at 0."""
    gated = fresh_zoo(name, dtype=dtype)
    drawn = torch.randn(gated.gates.num_units, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        gated.gates.logits.copy_(drawn + shift)
    return gated


def closed_zoo(
    name: str = "resnet_projection",
    *,
    share: float = 0.5,
    dtype: torch.dtype = torch.float64,
    seed: int = 1,
) -> GatedModel:
    """With a share of the units closed, the rest clearly open."""
    gated = fresh_zoo(name, dtype=dtype)
    drawn = torch.rand(gated.gates.num_units, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        gated.gates.logits.copy_(torch.where(drawn < share, -3.0, 3.0) + drawn)
    return gated
