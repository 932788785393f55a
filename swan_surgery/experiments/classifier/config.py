"""Settings as TOML or YAML, read and written; reading what was written gives the same settings."""

import difflib
import json
import textwrap
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from swan_surgery.environment.extras import needed_from
from swan_surgery.environment.writing import replacing
from swan_surgery.errors import InputError
from swan_surgery.experiments.classifier.settings import TrainSettings, help_of


with needed_from("cli"):
    import tomli_w
    import yaml

_YAML = (".yaml", ".yml")
_DEFAULTS = {own.name: own.default for own in fields(TrainSettings)}


def read_settings(path: Path | None, assignments: Sequence[str] = ()) -> TrainSettings:
    """The defaults, overridden by a file, overridden by `key=value` assignments (values as in TOML).

    Args:
        path: ends in .toml, .yaml or .yml.
        assignments: such as `macs=0.3` and `optimizer="sgd"`; quotes may be left out.

    Raises:
        InputError: no such file, neither TOML nor YAML, unknown names, values of another type.
    """
    given = {} if path is None else _read(path)
    for assignment in assignments:
        name, sign, text = assignment.partition("=")
        if not sign:
            raise InputError(f"--set {assignment!r}: write it like macs=0.3")
        given[name.strip()] = _value(text.strip())
    return settings_of(given)


def settings_of(given: Mapping[str, Any]) -> TrainSettings:
    """Settings from plain data.

    Raises:
        InputError: unknown names, or values of another type; says which.
    """
    for name in given:
        if name not in _DEFAULTS:
            near = difflib.get_close_matches(str(name), _DEFAULTS, n=3, cutoff=0.6)
            known = near or sorted(_DEFAULTS)
            raise InputError(f"there is no setting {name!r}; there is {', '.join(known)}")
    return TrainSettings(**{name: _checked(name, value) for name, value in given.items()})


def write_settings(settings: TrainSettings, path: Path) -> None:
    """Write settings as TOML or YAML, by the suffix, each with what it means.

    Raises:
        InputError: another suffix.
        WritingError: the file could not be written.
    """
    text = text_of(settings, as_yaml=_is_yaml(path))
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def text_of(settings: TrainSettings, *, as_yaml: bool = False) -> str:
    """The text of a config file: every setting, behind a comment that says what it means."""
    values = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(settings).items()
    }
    # In TOML a table takes in whatever follows it.
    names = sorted(values, key=lambda name: isinstance(values[name], dict))
    parts = []
    for name in names:
        note = textwrap.wrap(help_of(name), 96, break_on_hyphens=False)
        written = _yaml if as_yaml else _toml
        parts.append("".join(f"# {line}\n" for line in note) + written(name, values[name]))
    return "\n".join(parts)


def _toml(name: str, value: Any) -> str:
    # Arrays of numbers and texts read the same in JSON, on one line.
    text = f"{name} = {json.dumps(value)}\n" if isinstance(value, list) else None
    return text or tomli_w.dumps({name: value})


def _yaml(name: str, value: Any) -> str:
    if isinstance(value, list):  # on one line
        return f"{name}: {yaml.safe_dump(value, default_flow_style=True, width=10_000)}"
    return str(yaml.safe_dump({name: value}))


def _is_yaml(path: Path) -> bool:
    if path.suffix not in (".toml", *_YAML):
        raise InputError(f"{path}: a config ends in .toml, .yaml or .yml")
    return path.suffix in _YAML


def _read(path: Path) -> dict[str, Any]:
    is_yaml = _is_yaml(path)
    try:
        text = path.read_text(encoding="utf-8")
        data = yaml.safe_load(text) if is_yaml else tomllib.loads(text)
    except OSError as err:
        raise InputError(f"cannot read {path}: {err.strerror}") from err
    except (tomllib.TOMLDecodeError, yaml.YAMLError, UnicodeDecodeError) as err:
        kind = "YAML" if is_yaml else "TOML"
        raise InputError(f"{path} is not {kind}: {' '.join(str(err).split())}") from err
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise InputError(f"{path} holds no settings, but {type(data).__name__}")
    return data


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a word without its quotes


def _number(value: Any) -> Any:
    """As a float, where it is one; YAML 1.1 takes 1e-3 for a text."""
    try:
        return value if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return value


def _checked(name: str, value: Any) -> Any:
    """The value in the type of the setting's default."""
    default = _DEFAULTS[name]
    if name == "min_width":
        fits = type(value) in (int, float, dict)
    elif isinstance(default, tuple):
        kinds = (str,) if name == "ignore" else (int, float)
        value = [value] if type(value) in kinds else value  # one for all channels
        fits = isinstance(value, (list, tuple)) and all(type(own) in kinds for own in value)
        value = tuple(value) if fits else value
    elif isinstance(default, float):
        value = _number(value)
        fits = type(value) is float
    else:
        fits = type(value) is type(default)
    if not fits:
        shown = list(default) if isinstance(default, tuple) else default
        raise InputError(f"{name} is like {shown!r}; got {value!r}")
    return value
