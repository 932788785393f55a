"""Folders in the manner of the Hugging Face Hub: weights, a readable summary, a model card."""

import copy
import json
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from swan_surgery.artifacts.container import file_in, read, write
from swan_surgery.artifacts.saving import contents
from swan_surgery.environment.writing import as_path, replacing
from swan_surgery.errors import ArtifactError, WritingError
from swan_surgery.models.configurations import misfit
from swan_surgery.models.subclasses import own_class
from swan_surgery.reporting import Report


WEIGHTS = "model.safetensors"
_BUFFERS = "buffers.safetensors"
_SUMMARY = "swan.json"
_CARD = "README.md"


def save_pretrained(
    model: nn.Module, folder: str | PathLike[str], *, report: Report | None = None
) -> None:
    """Write a folder that can be pushed to the Hugging Face Hub as it is.

    `model.safetensors` is what `swan.save` writes, `swan.json` a readable summary, `README.md` the
    model card, with the report if one is given; a transformers model's `config.json` lies beside them.
    `swan.load(folder, model=...)` reads it, and so does the class's own `from_pretrained`, where the
    configuration says the widths that the model has (`swan.prune(..., uniform=True)`); buffers that are
    no part of its state dict (rotary tables) then lie in `buffers.safetensors`.

    Args:
        model: as for `swan.save`.
        folder: made if it does not exist; files of these names are replaced, others stay.
        report: from `swan.report(before, after, ...)`.

    Raises:
        ModelError, InputError: as `swan.save`.
        WritingError: the folder cannot be written to.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> gated = swan.swanify(net, torch.zeros(1, 3))
        >>> gated.close("0", [1, 3, 5, 7])
        >>> small = swan.prune(gated)
        >>> found = swan.report(net, small, torch.zeros(1, 3))
        >>> swan.save_pretrained(small, folder / "hub", report=found)
        >>> sorted(path.name for path in (folder / "hub").iterdir())
        ['README.md', 'model.safetensors', 'swan.json']
    """
    header, tensors = contents(model)
    folder = as_path(folder, "swan.save_pretrained(model, folder)")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise WritingError(f"cannot make the folder {folder}: {err.strerror}") from err
    summary = {key: header[key] for key in ("library", "torch", "kind", "class", "params", "macs")}
    config: Any = getattr(model, "config", None)
    has_configuration = hasattr(config, "to_json_string")
    loads_itself = has_configuration and misfit(model) is None
    own = tensors.keys() - model.state_dict().keys() - set(header["aliases"].values())
    beside = {name: tensors.pop(name) for name in sorted(own)} if loads_itself else {}
    if beside:
        write(folder / _BUFFERS, {"kind": "buffers"}, beside)
    write(folder / WEIGHTS, {**header, "beside": list(beside)}, tensors)
    if not beside:
        (folder / _BUFFERS).unlink(missing_ok=True)
    _write_text(folder / _SUMMARY, json.dumps(summary, indent=2) + "\n")
    _write_text(folder / _CARD, _card(summary, report, loads_itself=loads_itself))
    if has_configuration:
        config = copy.deepcopy(config)
        config.architectures = [own_class(model).__name__]  # other libraries' loaders ask for it
        _write_text(folder / "config.json", config.to_json_string())
    generation: Any = getattr(model, "generation_config", None)
    if loads_itself and hasattr(generation, "to_json_string"):
        _write_text(folder / "generation_config.json", generation.to_json_string())


def read_with_buffers(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file, or of that in a folder, and of the buffers beside it where it says so.

    Raises:
        ArtifactError: as `container.read`, or the buffers are others.
    """
    path = file_in(path, WEIGHTS)
    header, tensors = read(path)
    wanted = header.get("beside", [])
    if wanted:
        _, more = read(path.with_name(_BUFFERS))
        if sorted(more) != wanted:
            raise ArtifactError(
                f"{path.with_name(_BUFFERS)} holds {len(more)} buffers, and not the {len(wanted)} that "
                f"{path.name} was written with; get both files anew"
            )
        tensors |= more
    return header, tensors


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _card(summary: dict[str, Any], report: Report | None, *, loads_itself: bool) -> str:
    name = str(summary["class"]).rpartition(".")[2]
    macs = summary["macs"]
    how = (
        [f"from transformers import {name}", "", f"model = {name}.from_pretrained(folder)"]
        if loads_itself
        else [
            "import swan_surgery as swan",
            "",
            f"model = swan.load(folder, model={name}(...))  # {summary['class']}, built as before pruning",
        ]
    )
    lines = [
        "---",
        "library_name: swan-surgery",
        "tags: [pruning, structured-pruning, swan-surgery]",
        "---",
        "",
        f"# {name}, pruned with swan_surgery" if macs else f"# {name}",
        "",
        f"{summary['params']:,} parameters."
        + (
            f" {macs['after']:,} of {macs['before']:,} MACs ({macs['after'] / macs['before']:.1%}) at "
            f"inputs of {', '.join('x'.join(map(str, shape)) for shape in macs['input_shapes'])}."
            if macs
            else ""
        ),
        "",
        "```python",
        *how,
        "```",
        "",
    ]
    if report is not None:
        lines.append(report.to_markdown())
    return "\n".join(lines)
