"""What the library says of its arguments, in the words of the command line."""

import inspect
import re
from collections.abc import Callable, Mapping
from contextvars import ContextVar

from typer.models import OptionInfo


# Arguments of the library -> parameters of commands, where they are called otherwise.
_OTHERWISE = {"example_inputs": "shapes", "finetune": "steps"}
_INPUTS = "give the shapes that it takes by --input, or name a factory that returns (model, inputs)"
_CUT = "cut it first: swan-surgery prune MODEL --weights FILE -o SMALL"
# What to do in Python -> what to do here.
_ADVICE = (
    (r"pass (real tensors|example_inputs[^;]*)", _INPUTS),
    (
        r"pass model= as it was before swanify, a new (\S+)",
        r"name the model as it was before: a \1",
    ),
    (r"pass model= a routed model .*", "name the model as it was before"),
    (r"train it, or swan\.unswanify\(model\) first", _CUT),
    (r"(export|measure) what swan\.prune\(gated\) returns", _CUT),
    (r", and those of swan\.register_activation", ""),
    (r"[,;:]? ?(pass )?latency_table=swan\.measure_latency_table\(gated\)", ""),
    (r"; pass a loss\(model, batch\)", ""),
    (r"pass a loss\(model, batch\)", "take --labels"),
    (
        r"swan\.report takes the model before the cut first, swan\.report\([^)]*\)",
        "name the larger one first",
    ),
    (
        r"Train them \(swan\.Objective\), score the .*, or call swan\.compress\([^)]*\)",
        "Train them (swan-surgery train), or cut without the gated file: by --score, or by swan-surgery compress",
    ),
    (r"written by swan\.save", "written by swan-surgery"),
    (r"and keep the module out with ignore=\(('[^']*'),\) meanwhile", r"with its module \1"),
    (r"(Without|without) strict=True ", r"\1 that "),
)
_OPTIONS: ContextVar[Mapping[str, str]] = ContextVar("options")


def speak_for(declared: Callable[..., None]) -> None:
    """From now on arguments are called as this command calls them."""
    known = {}
    for name, parameter in inspect.signature(declared).parameters.items():
        for info in getattr(parameter.annotation, "__metadata__", ()):
            if isinstance(info, OptionInfo):
                # What is given first is a default to typer, and a name where it is an annotation.
                given = (info.default, *(info.param_decls or ()))
                said = [own for own in given if isinstance(own, str) and own.startswith("--")]
                known[name] = said[0] if said else f"--{name.replace('_', '-')}"
    own = {name: known[at] for name, at in _OTHERWISE.items() if at in known}
    _OPTIONS.set(known | own)


def spoken(text: str) -> str:
    """A message of the library for somebody who has a command line and no Python."""
    options = _OPTIONS.get({})
    for pattern, advice in _ADVICE:
        text = re.sub(pattern, advice, text)
    if not options:
        return text
    if re.search(r"example inputs|float\d+\[", text) and not re.search(r"--input|--data", text):
        text = f"{text}; {_INPUTS}"
    if "--input" not in options.values():
        text = text.replace(_INPUTS, "they are the first sample of --data")
    names = "|".join(map(re.escape, options))

    def option(found: re.Match[str]) -> str:
        return options[found[1]]

    text = re.sub(rf"(?<![\w./\-])({names})=True", option, text)
    text = re.sub(rf"(?<![\w./\-])({names})=", lambda found: f"{option(found)} ", text)
    # At the beginning, and where nothing but an argument is written so.
    text = re.sub(rf"^({names})(?= (?:must|is|are|and|gives|names)\b)", option, text)
    text = re.sub(rf"(?<=\band )({names})(?= must\b)", option, text)
    scored = "|".join(name for name in options if "_" in name)
    return re.sub(rf"(?<![\w./\-])({scored})(?![\w=])", option, text) if scored else text


__all__ = ["speak_for", "spoken"]
