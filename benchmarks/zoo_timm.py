"""The smallest model of every architecture module of timm.

    python benchmarks/zoo_timm.py       # choose them again: after an update of timm, minutes

The choice (fewest parameters; the smallest image that runs in both modes and leaves at least two
by two positions) is kept in `timm_smallest.json`. timm's own `test_*` models are no candidates.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from zoo_models import Case, image_draw


SMOKE = "resnet10t"
CHOSEN = Path(__file__).with_name("timm_smallest.json")
LARGE = 300_000_000  # parameters: in float64 the copies do not fit into the memory limit
IMAGE_SIZES = (64, 96, 128, 160, 192, 224, 256)


def _chosen() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(CHOSEN.read_text())["models"]
    return found


def names() -> list[str]:
    """One model of each module, in alphabetical order of the modules."""
    return list(_chosen())


def raw_case(name: str) -> Case:
    """A model as timm initialises it."""
    entry = _chosen()[name]
    model = timm.create_model(name, pretrained=False, **entry["options"])
    dtype = torch.float32 if entry["params"] > LARGE else torch.float64
    return Case(model, image_draw(entry["image_size"], dtype=dtype), dtype, kind=entry["kind"])


# --- the choice ------------------------------------------------------------------------------


def smallest(module: str) -> tuple[str, int]:
    """The model with the fewest parameters, and their number."""
    sizes = {}
    for name in timm.list_models(module=module):
        if not name.startswith("test_"):
            with torch.device("meta"):
                model = timm.create_model(name, pretrained=False)
            sizes[name] = sum(p.numel() for p in model.parameters())
    best = min(sizes, key=lambda name: sizes[name])
    return best, sizes[best]


def sized(name: str) -> dict[str, Any]:
    """Options and image size: the smallest that the model accepts."""
    own = timm.create_model(name, pretrained=False).pretrained_cfg
    last = own["input_size"][-1]
    stride = last / own["pool_size"][-1] if own.get("pool_size") else 1
    for size in (*(s for s in IMAGE_SIZES if 2 * stride <= s < last), last):
        for options in ({"img_size": size}, {}):
            if runs(name, options, size):
                kind = "classification" if own["num_classes"] else "features"
                return {"options": options, "image_size": size, "kind": kind}
    raise LookupError(f"{name} runs at no image size")


def runs(name: str, options: dict[str, Any], size: int) -> bool:
    """One sample in eval mode, two in train mode."""
    try:
        model = timm.create_model(name, pretrained=False, **options).eval()
        with torch.no_grad():
            model(torch.randn(1, 3, size, size))
            model.train()(torch.randn(2, 3, size, size))
    except Exception:  # noqa: BLE001 - models refuse a size in all sorts of ways
        return False
    return isinstance(model, nn.Module)


def main() -> None:
    warnings.simplefilter("ignore")
    models = {}
    for module in timm.list_modules():
        name, params = smallest(module)
        models[name] = {"module": module, "params": params} | sized(name)
        print(module, name, models[name], file=sys.stderr)
    CHOSEN.write_text(json.dumps({"timm": timm.__version__, "models": models}, indent=1) + "\n")


if __name__ == "__main__":
    main()
