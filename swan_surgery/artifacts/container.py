"""The file: safetensors whose metadata holds a JSON header, with a SHA-256 of all the rest.

Any safetensors tool can read the weights. The digest covers every byte of the file with its own 64
characters taken as zeros, so that a flipped bit, a cut or a swapped header is seen before anything
is used.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from swan_surgery.environment.writing import replacing
from swan_surgery.errors import ArtifactError


# 1 knew of cuts alone (`models.provenance`); it is still read.
VERSION = 2
_HEADER, _DIGEST = "swan_surgery", "sha256"
# What other readers of safetensors ask for: transformers 4 and Accelerate refuse a file without it.
_FORMAT = ("format", "pt")
_EMPTY = "0" * 64
_CHUNK = 1 << 22
# What safetensors itself accepts as the length of a header.
_LONGEST_HEADER = 100_000_000


# What files end in that cannot be opened, and headers of another shape.
_UNREADABLE = (OSError, SafetensorError)
_MALFORMED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


def write(path: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a file whole or not at all; an older one stays until the new one is complete.

    Raises:
        WritingError: the folder is missing or read-only, the disk is full.
    """
    full = {_DIGEST: _EMPTY, "format": VERSION, **header}
    text = json.dumps(full, separators=(",", ":"))
    with replacing(path) as temporary:
        save_file(dict(tensors), temporary, {_HEADER: text, _FORMAT[0]: _FORMAT[1]})
        start = _format_last(_parts(temporary)[0])
        with temporary.open("r+b") as file:
            file.write(start)
        place = start.index(_EMPTY.encode())
        digest = _digest(temporary, place)
        with temporary.open("r+b") as file:
            file.seek(place)
            file.write(digest.encode())


def _format_last(start: bytes) -> bytes:
    """The start of a file with the two entries of its metadata in one order: safetensors writes them in any."""
    entry = b'"%s":"%s",' % tuple(map(str.encode, _FORMAT))
    before, found, after = start.partition(b"{" + entry)
    if not found:
        return start
    _, end = json.JSONDecoder().raw_decode(after.decode("latin-1"), len(_HEADER) + 3)
    return before + b"{" + after[:end] + b"," + entry[:-1] + after[end:]


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file that is whole.

    Raises:
        ArtifactError: no such file, not one of ours, damaged, or written by a newer version.
    """
    try:
        if not path.is_file():
            raise ArtifactError(f"{path}: no such file")
        return _read(path)
    except (*_UNREADABLE, *_MALFORMED) as err:
        if isinstance(err, ArtifactError):
            raise
        raise ArtifactError(
            f"{path} is not a whole file written by swan.save ({type(err).__name__}: {err})"
        ) from err


def file_in(path: Path, name: str) -> Path:
    """The path itself, or the file of a name in it where it is a folder."""
    try:
        return path / name if path.is_dir() else path
    except OSError:  # `read` says what is wrong with it
        return path


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    start, metadata = _parts(path)
    header = json.loads(metadata[_HEADER])
    digest = header.pop(_DIGEST)
    if len(digest) != len(_EMPTY) or _digest(path, start.index(digest.encode())) != digest:
        raise ArtifactError(f"{path} is damaged: its checksum does not fit; get it anew")
    if header["format"] > VERSION:
        raise ArtifactError(
            f"{path} is of format {header['format']}, written by swan_surgery "
            f"{header.get('library')}; this version reads up to {VERSION}: upgrade it"
        )
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    return header, tensors


def _parts(path: Path) -> tuple[bytes, dict[str, str]]:
    """The length and header of a safetensors file as bytes, and its metadata."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        if len(first) < 8:
            raise ValueError("it is too short")
        (length,) = struct.unpack("<Q", first)
        if length > min(size - 8, _LONGEST_HEADER):
            raise ValueError("its header is longer than the file")
        header = file.read(length)
    metadata = json.loads(header)["__metadata__"]
    return first + header, dict(metadata)


def _digest(path: Path, place: int) -> str:
    """Of the file with the 64 characters at `place` taken as zeros."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        found.update(file.read(place))
        found.update(_EMPTY.encode())
        file.seek(place + len(_EMPTY))
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()
