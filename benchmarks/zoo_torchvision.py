"""Every float model of torchvision, at sizes that keep a sweep short."""

import fnmatch
from typing import Any

import torch
import torchvision
from zoo_models import Case, Draw, image_draw, tensor_draw


SMOKE = "squeezenet1_1"
KINDS = ("segmentation", "detection", "video", "optical_flow")

# 600 M parameters: three float64 copies do not fit beside others. RAFT makes float32 coordinates.
# The MViTs are for speed.
FLOAT32 = ("regnet_y_128gf", "vit_h_14", "raft_*", "mvit_*")
SIZES = {"inception_v3": 299, "maxvit_t": 224, "vit_h_14": 56}  # 64 elsewhere
CLIPS = {"s3d": (16, 224), "mvit_*": (16, 224), "swin3d_*": (8, 64)}  # (8, 64) elsewhere

# Random weights score every class about alike, below the usual thresholds. A few proposals per
# image are enough to compare, and keep non-maximum suppression short.
PROPOSALS = {
    "min_size": 64,
    "max_size": 64,
    "box_score_thresh": 0.0,
    "rpn_pre_nms_top_n_test": 100,
    "rpn_post_nms_top_n_test": 20,
}
DENSE = {"score_thresh": 0.0, "topk_candidates": 50}
DETECTION: dict[str, dict[str, Any]] = {
    "*rcnn*": PROPOSALS,
    # At 64 pixels the smallest map is 1x1, where torch refuses a GroupNorm of one channel per group.
    "fcos*": DENSE | {"min_size": 256, "max_size": 256},
    "retinanet*_v2": DENSE | {"min_size": 256, "max_size": 256},
    "retinanet*": DENSE | {"min_size": 64, "max_size": 64},
    "ssd*": DENSE,
}


def names() -> list[str]:
    """Classification first, then the rest by kind."""
    models = torchvision.models
    found = models.list_models(module=models)
    for kind in KINDS:
        found += models.list_models(module=getattr(models, kind))
    return found


def kind_of(name: str) -> str:
    """`classification` or the submodule that has the builder."""
    return next(
        (k for k in KINDS if hasattr(getattr(torchvision.models, k), name)), "classification"
    )


def raw_case(name: str) -> Case:
    """A model as torchvision initialises it."""
    kind = kind_of(name)
    options: dict[str, Any] = {"weights": None}
    if kind in ("segmentation", "detection"):
        options["weights_backbone"] = None
    if kind == "detection":
        options |= _matching(name, DETECTION, {})
    if name in ("inception_v3", "googlenet"):
        options["init_weights"] = False  # scipy's truncated normal takes a minute
    if name.startswith("vit_"):
        options["image_size"] = SIZES.get(name, 64)
    model = torchvision.models.get_model(name, **options)
    dtype = torch.float32 if any(fnmatch.fnmatch(name, p) for p in FLOAT32) else torch.float64
    return Case(model, _draw(name, kind, dtype), dtype, kind)


def _draw(name: str, kind: str, dtype: torch.dtype) -> Draw:
    if kind == "detection":
        return _image_lists(dtype)
    if kind == "optical_flow":
        frame = image_draw(128, dtype=dtype)
        return lambda generator, batch: (frame(generator, batch), frame(generator, batch))
    if kind == "video":
        frames, size = _matching(name, CLIPS, (8, 64))
        return tensor_draw(3, frames, size, size, dtype=dtype)
    return image_draw(SIZES.get(name, 64), dtype=dtype)


def _image_lists(dtype: torch.dtype) -> Draw:
    def draw(generator: torch.Generator, batch: int) -> tuple[list[torch.Tensor]]:
        images = torch.rand(batch, 3, 64, 64, generator=generator, dtype=dtype)
        return (list(images.unbind()),)

    return draw


def _matching(name: str, table: dict[str, Any], default: Any) -> Any:
    return next((value for p, value in table.items() if fnmatch.fnmatch(name, p)), default)
