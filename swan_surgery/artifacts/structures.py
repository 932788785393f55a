"""What a header holds besides plain JSON: nested arguments of a model, and long texts, packed."""

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from swan_surgery.channels import ChannelMap
from swan_surgery.errors import ArtifactError


_PLAIN = (bool, int, float, str, type(None))


def encode(value: Any) -> tuple[Any, list[Tensor]]:
    """JSON of nested tuples, lists, dicts and plain values; None where it holds anything else."""
    tensors: list[Tensor] = []
    try:
        return _encoded(value, tensors), tensors
    except TypeError:
        return None, []


def _encoded(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value)
        return ["tensor", len(tensors) - 1]
    if type(value) in _PLAIN:
        return ["value", value]
    if type(value) in (tuple, list):
        return [type(value).__name__, [_encoded(item, tensors) for item in value]]
    if isinstance(value, dict) and all(type(key) is str for key in value):
        return ["dict", {key: _encoded(item, tensors) for key, item in value.items()}]
    raise TypeError(type(value).__name__)


def decode(structure: Any, tensors: Sequence[Tensor]) -> Any:
    """What `encode` was given.

    Raises:
        ArtifactError: not a structure that `encode` makes.
    """
    try:
        kind, content = structure
        if kind == "tensor":
            return tensors[content]
        if kind == "value" and type(content) in _PLAIN:
            return content
        if kind in ("tuple", "list"):
            items = [decode(item, tensors) for item in content]
            return items if kind == "list" else tuple(items)
        if kind == "dict" and isinstance(content, Mapping):
            return {str(key): decode(item, tensors) for key, item in content.items()}
    except (TypeError, ValueError, IndexError) as err:
        raise ArtifactError(f"the example inputs in the file cannot be read: {err}") from err
    raise ArtifactError(f"the example inputs in the file hold {kind!r}")


# Descriptions of models are 4 to 11 times as long as packed (5,000 linear layers, densenet201); zlib
# goes to 1,000 times, so that a few bytes could ask for all memory.
_LONGEST_RATIO, _SHORT_TEXT = 64, 1 << 20


def pack(text: str) -> str:
    """A long text as a short one: zlib, then base64."""
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def unpack(packed: str) -> str:
    """What `pack` was given.

    Raises:
        ArtifactError: not a packed text, or one that is longer than any description of a model.
    """
    try:
        reader = zlib.decompressobj()
        longest = _SHORT_TEXT + _LONGEST_RATIO * len(packed)
        data = reader.decompress(base64.b64decode(packed, validate=True), longest)
        if not reader.eof:
            raise ArtifactError("a text in the file is cut off, or longer than can be")
        return data.decode()
    except (ValueError, TypeError, zlib.error) as err:
        if isinstance(err, ArtifactError):
            raise
        raise ArtifactError(f"a text in the file cannot be unpacked: {err}") from err


def map_digest(channels: ChannelMap) -> str:
    """Names which units lie where."""
    text = json.dumps([[e.tensor, e.axis, e.units] for e in channels.tensors])
    return hashlib.sha256(text.encode()).hexdigest()
