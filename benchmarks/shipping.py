"""Do pruned models survive the way out? Saved, loaded and exported, 25 models of the zoo.

    python benchmarks/shipping.py                   # continues where it stopped
    python benchmarks/shipping.py --models 'resnet*' --again

Half of the units are closed at random and cut, in float32. The file of `swan.save` is loaded into a
model that was built anew, and outputs are compared bitwise. `swan.export` to ONNX (onnxruntime runs it) and
torch.export compares with the pruned model itself, and refuses above 1e-4. One process per model.
"""

import argparse
import fnmatch
from typing import Any

from _measure import (
    arguments,
    commit,
    console,
    output_path,
    progress_bar,
    report,
    source_hash,
    write,
)
from rich.table import Table
from tables import shipping_cells
from zoo import load, spawn


MODELS = {
    "torchvision": (
        *("alexnet", "vgg16_bn", "resnet18", "resnet50", "resnext50_32x4d", "densenet121"),
        *("mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "googlenet", "inception_v3"),
        *("shufflenet_v2_x1_0", "squeezenet1_1", "mnasnet1_0", "regnet_y_400mf", "convnext_tiny"),
        *("vit_b_16", "swin_t", "swin_v2_t", "maxvit_t", "fcn_resnet50", "r3d_18"),
        *("ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"),
    ),
    "timm": ("resnet10t", "vit_tiny_patch16_224", "gmlp_ti16_224"),
    "transformers": ("bert", "vit", "gpt2", "llama"),
}
SMOKE = {"torchvision": ("squeezenet1_1",)}


def wanted(options: argparse.Namespace) -> list[tuple[str, str]]:
    models = SMOKE if options.smoke else MODELS
    every = [(suite, name) for suite, names in models.items() for name in names]
    patterns = options.models or ["*"]
    return [own for own in every if any(fnmatch.fnmatch(own[1], p) for p in patterns)]


def show(rows: dict[str, Any]) -> Table:
    header, cells = shipping_cells(rows)
    table = Table(*header)
    for row in cells:
        table.add_row(*row)
    return table


def parse() -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.add_argument("--models", nargs="+", metavar="PATTERN", help="names or glob patterns")
    parser.add_argument("--again", action="store_true", help="measure models already in the file")
    parser.add_argument("--limit", type=int, default=900, help="seconds per model")
    parser.add_argument("--memory", type=float, default=12.0, help="GiB per model")
    return parser.parse_args()


def main() -> None:
    options = parse()
    terminal = console()
    path = output_path("shipping", options)
    result = load(path, "shipping")
    due = [own for own in wanted(options) if options.again or own[1] not in result["rows"]]
    with progress_bar(terminal) as bar:
        task = bar.add_task("shipping", total=len(due))
        for suite, name in due:
            facts = spawn("ship", suite, name, options)
            row = {"suite": suite, "commit": commit(), "source": source_hash(), **facts}
            result["rows"][name] = row
            write(path, result)
            bar.console.print(" | ".join(shipping_cells({name: row})[1][0]))
            bar.advance(task)
    terminal.print(show(result["rows"]))
    report(path, terminal)


if __name__ == "__main__":
    main()
