"""Models that know how to save themselves, as transformers' do: theirs does not hold the widths of a cut."""

import warnings
from functools import partial
from typing import Any

from torch import nn

from swan_surgery.errors import SwanWarning
from swan_surgery.models.configurations import misfit


def warn_on_save_pretrained_(model: nn.Module) -> nn.Module:
    """Let the model's own `save_pretrained` say where its own `from_pretrained` cannot rebuild it; returns it.

    Trainers call it for their checkpoints, of which they read the weights alone: so it still saves.
    """
    if hasattr(type(model), "save_pretrained") and hasattr(type(model), "from_pretrained"):
        vars(model)["save_pretrained"] = partial(_save_pretrained, model)
    return model


def _save_pretrained(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    kind, why = type(model).__name__, misfit(model)
    if why is not None:
        warnings.warn(
            f"{kind}.from_pretrained builds all layers as wide as the configuration says, and cannot load "
            f"this pruned model ({why}). Either cut with uniform=True, which leaves widths that a "
            f"configuration can say; or keep this one with swan.save(model, file) or "
            f"swan.save_pretrained(model, folder), and rebuild it with swan.load(..., model={kind}(config))",
            SwanWarning,
            stacklevel=2,
        )
    own: Any = type(model)
    return own.save_pretrained(model, *args, **kwargs)
