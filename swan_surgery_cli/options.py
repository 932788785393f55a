"""Parameters that several commands share."""

from pathlib import Path
from typing import Annotated

import typer


Name = Annotated[
    str,
    typer.Argument(
        help="A torchvision name (resnet50, torchvision:fcn_resnet50), timm:NAME, or "
        "package.module:factory, as it was before pruning."
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(help="Weights to start from: of swan.save, safetensors, or a checkpoint (.pth)."),
]
Before = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        help="The model before: a file of swan.save, say of an earlier cut, or a checkpoint. By default the named model.",
    ),
]
Saved = Annotated[Path, typer.Argument(help="What swan.save or `prune` wrote.")]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--input", help="Input shape, like 1,3,224,224; once per input. Guessed by default."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Of torch; default: its own choice.")]
RoundTo = Annotated[
    str,
    typer.Option(
        help="Widths become multiples of this number; auto measures which one is the fastest."
    ),
]
Runtime = Annotated[str, typer.Option(help="That latencies are measured in: eager or onnxruntime.")]
Data = Annotated[
    str,
    typer.Option(
        help="What to work with: a safetensors file or a folder of them ('inputs', samples first, and 'labels' if there "
        "are any; or several inputs by name), a folder of images, a torchvision dataset's root, or sklearn:digits."
    ),
]
Reading = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="How data is read, like size=224, batch=32, mean=[0.5], std=[0.5] (those two for images where "
        "nothing else is said); `train --template` lists all.",
    ),
]
Macs = Annotated[float | None, typer.Option(help="Share of the multiply-adds to keep.")]
Params = Annotated[float | None, typer.Option(help="Share of the parameters to keep.")]
