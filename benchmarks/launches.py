"""How many operations gates add to a training step: on a GPU each one has to be launched, and short ones wait for that.

    python benchmarks/launches.py
    python benchmarks/launches.py --models resnet50

A step is forward and backward under bf16 autocast, batch 2. ATen operations are counted, but for views and
allocations, which launch nothing; gates learn by curvature to half the MACs. The objective prices as many
prefixes at once as on a GPU. Counts, not times: they are the same on every machine with this torch.
"""

import argparse
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torchvision
from _measure import arguments, console, environment, output_path, report, write
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import swan_surgery as swan
from swan_surgery.selection import widest_mask


MODELS = {"resnet50": 64, "vgg16_bn": 64, "vit_b_16": 224}  # and pixels
# Operations without a kernel, beside those that torch marks as views.
_FREE = ("detach", "_unsafe_view", "_local_scalar_dense", "alias", "lift_fresh")
_PREFIXES_ON_A_GPU = 64


class Counting(TorchDispatchMode):
    """Counts what launches something."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run it, and count it."""
        name = func.overloadpacket.__name__
        self.found += not (func.is_view or name in _FREE or "empty" in name)
        return func(*args, **(kwargs or {}))


def operations(
    model: nn.Module, images: Tensor, objective: Callable[[float], Tensor] | None = None
) -> int:
    """Of one training step; one was made before, so that nothing is made for the first time."""
    labels = torch.zeros(len(images), dtype=torch.int64)
    for step in range(2):
        model.zero_grad(set_to_none=True)
        with Counting() as counting:
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), labels)
            if objective is not None:
                loss = loss + objective(float(step))
            loss.backward()
    return counting.found


def measure(name: str, size: int) -> dict[str, Any]:
    """A model's row."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).train()
    images = torch.randn(2, 3, size, size)
    gated = swan.swanify(model, images).train()
    objective = swan.Objective(gated, macs=0.5)
    with patch.object(widest_mask, "_prefixes_at_once", lambda *_: _PREFIXES_ON_A_GPU):
        return {
            "model": name,
            "in_place": gated.runs_in_place,
            "ungated": operations(model, images),
            "gated": operations(gated, images),
            "with_objective": operations(gated, images, objective),
        }


def parse() -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    return parser.parse_args()


def main() -> None:
    options = parse()
    terminal = console()
    sizes = {"resnet18": 32} if options.smoke else {name: MODELS[name] for name in options.models}
    path = output_path("launches", options)
    result: dict[str, Any] = {"theme": "launches", "environment": environment()}
    result["rows"] = [measure(name, size) for name, size in sizes.items()]
    write(path, result)
    table = Table("model", "ungated", "gated", "with objective")
    for row in result["rows"]:
        table.add_row(row["model"], *(str(row[k]) for k in ("ungated", "gated", "with_objective")))
    terminal.print(table)
    report(path, terminal)


if __name__ == "__main__":
    main()
