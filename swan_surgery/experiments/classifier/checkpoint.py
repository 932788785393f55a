"""Where a run stands, in one file: safetensors with a checksum, as `swan.save` writes; no pickle."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from swan_surgery.artifacts.container import read, write
from swan_surgery.artifacts.structures import decode, encode
from swan_surgery.errors import ArtifactError, InputError


_KIND = "swan-surgery train"
# What makes no difference to the result, or none that was asked for.
_MAY_CHANGE = ("device", "threads", "workers", "save_every")


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write nested dicts, lists, tuples, plain values and tensors, whole or not at all.

    Raises:
        InputError: the state holds anything else.
        WritingError: the file could not be written.
    """
    structure, tensors = encode(_texts(state))
    if structure is None:
        raise InputError("the state of the training holds what cannot be kept in a file")
    own = {str(index): tensor.detach().cpu().contiguous() for index, tensor in enumerate(tensors)}
    distinct = {name: tensor.clone() for name, tensor in own.items()}  # tied weights: each its own
    write(path, {"kind": _KIND, "state": structure}, distinct)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `write_checkpoint` was given.

    Raises:
        ArtifactError: damaged, or another kind of file.
    """
    header, tensors = read(path)
    if header.get("kind") != _KIND:
        raise ArtifactError(f"{path} is no checkpoint of {_KIND}")
    ordered: list[Tensor] = [tensors[str(index)] for index in range(len(tensors))]
    state = _numbers(decode(header["state"], ordered))
    assert isinstance(state, dict)  # noqa: S101 - that is what `write_checkpoint` takes
    return state


def check_same_run(kept: Mapping[str, Any], own: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with a run of other settings.

    Raises:
        InputError: names the settings that differ.
    """
    changed = [name for name in own if kept.get(name) != own[name] and name not in _MAY_CHANGE]
    if changed:
        raise InputError(
            f"{folder} holds a run with other settings ({', '.join(changed)}); go on with "
            f"those, take another --out, or start anew with --fresh"
        )


def _texts(value: Any) -> Any:
    """Whole-number keys, as optimizers have them, as texts."""
    if isinstance(value, Mapping):
        return {f"#{k}" if isinstance(k, int) else k: _texts(own) for k, own in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_texts(own) for own in value)
    return value


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {int(k[1:]) if k.startswith("#") else k: _numbers(own) for k, own in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_numbers(own) for own in value)
    return value
