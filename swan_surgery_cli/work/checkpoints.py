"""Weights as people have them: safetensors, and checkpoints of `torch.save` without the code in them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from swan_surgery.errors import InputError


TORCH_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".th", ".tar")
# Where trainers put the weights, in the order in which they are looked for.
_NAMES = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params")
# What wrappers put before every name.
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")


def read_weights(path: Path, known: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state dict out of a file, by its suffix.

    Args:
        path: safetensors, or what `torch.save` wrote (`.pth`, `.pt`, `.ckpt`, `.bin`, `.th`, `.tar`); of the
            latter tensors and plain data alone are read (`weights_only=True`), no code runs.
        known: the model's own names: prefixes that wrappers add are taken off where that makes them fit.

    Raises:
        InputError: no such content; says what there is.
    """
    if path.suffix not in TORCH_SUFFIXES:
        try:
            return load_file(path)
        except SafetensorError as err:
            raise InputError(
                f"{path} is not a safetensors file ({err}); what torch.save wrote is read from "
                f"{', '.join(TORCH_SUFFIXES)}"
            ) from err
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 - people have these
    except Exception as err:
        told = str(err).splitlines()[0] if str(err) else type(err).__name__
        raise InputError(
            f"{path} holds more than tensors and plain data, or is damaged, and code out of a file is never "
            f"run ({told}); save model.state_dict() alone, or as safetensors"
        ) from err
    return _without_prefix(_state_in(found, path), known)


def _state_in(found: object, path: Path) -> dict[str, Tensor]:
    seen: list[str] = []
    while isinstance(found, Mapping):
        tensors = {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
        if tensors and len(tensors) == len(found):
            return tensors
        seen = [str(name) for name in found]
        inner = next((found[n] for n in _NAMES if isinstance(found.get(n), Mapping)), None)
        if inner is None and tensors:
            return tensors  # a state dict with plain values beside its tensors
        found = inner
    there = f"it holds {', '.join(seen[:8])}" if seen else f"it holds {type(found).__name__}"
    raise InputError(f"{path}: no state dict was found; {there}")


def _without_prefix(state: dict[str, Tensor], known: Mapping[str, Any]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state) and not set(state) & set(known):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


__all__ = ["TORCH_SUFFIXES", "read_weights"]
