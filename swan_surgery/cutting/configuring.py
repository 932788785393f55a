"""A cut model whose own configuration says its widths, so that its class builds it again."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from swan_surgery.cutting.step import CONFIGURATION
from swan_surgery.cutting.verification import TOLERANCE, tensor_error
from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import InputError
from swan_surgery.gates import GatedModel
from swan_surgery.models.configurations import change_, misfit
from swan_surgery.models.modes import evaluating
from swan_surgery.models.outputs import iter_tensors
from swan_surgery.models.provenance import note_, provenance_of
from swan_surgery.models.subclasses import own_class


# Of a model in half precision: both run the same operations on the same weights.
_COARSE = 1e-2


def configured_(
    small: nn.Module, gated: GatedModel, values: Mapping[str, int], *, verify: bool
) -> nn.Module:
    """Write numbers into a cut model's configuration; returns the model.

    Args:
        small: private.
        gated: what it was cut from.
        values: by dotted name; without any, nothing is done.
        verify: build the model anew from the configuration, and compare.

    Raises:
        InputError: a model built from the configuration is another one.
    """
    if not values:
        return small
    change_(small.config, values)
    why = misfit(small)
    if why is None and verify and not _builds_the_same(small, gated):
        why = "a model built from it computes something else"
    if why is not None:
        raise InputError(
            f"uniform=True found no configuration of {type(small).__name__} for this cut: {why}. Cut without "
            f"it, and keep the model with swan.save"
        )
    provenance = provenance_of(small)
    if provenance is not None:  # a model rebuilt from a file says the same
        *before, last = provenance.steps
        said = replace(last, data={**last.data, CONFIGURATION: dict(values)})
        note_(small, replace(provenance, steps=(*before, said)))
    return small


def _builds_the_same(small: nn.Module, gated: GatedModel) -> bool:
    with streams_kept(), torch.no_grad():
        fresh: Any = own_class(small)(copy.deepcopy(small.config))
        fresh.to(gated.device, gated.dtype)
        fresh.load_state_dict(small.state_dict())
        inputs = gated.own_inputs()
        with evaluating(small, fresh):
            found, wanted = (list(iter_tensors(inputs.run(model))) for model in (fresh, small))
    if len(found) != len(wanted):
        return False
    most = TOLERANCE.get(gated.dtype, _COARSE)
    return all(tensor_error(w, f) <= most for w, f in zip(wanted, found, strict=True))


__all__ = ["configured_"]
