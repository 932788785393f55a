"""A sample of the zoo: one model for each mechanism, measured exactly as `benchmarks/zoo.py` does."""

from collections.abc import Callable
from typing import Any

import pytest
import torchvision
import zoo_timm
import zoo_torchvision
import zoo_transformers
import zoo_work
from torch import nn
from torchvision.models import ConvNeXt, SwinTransformer, VisionTransformer
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.video.resnet import (
    BasicBlock,
    BasicStem,
    Conv3DNoTemporal,
    Conv3DSimple,
    VideoResNet,
)

import swan_surgery as swan
from swan_surgery.channels import channel_map
from swan_surgery.gates import conversion


# (suite, model, least share of gated channels in %); what is missing is pinned with a reason.
SAMPLE = [
    ("torchvision", "convnext_tiny", 99),  # LayerNorm2d, layer scale
    ("torchvision", "vit_b_32", 99),  # attention, class token, position embedding
    ("torchvision", "swin_t", 99),  # windows, rolls, relative position tables
    ("torchvision", "fasterrcnn_mobilenet_v3_large_320_fpn", 97),  # lists of images, proposals
    ("torchvision", "mc3_18", 99),  # video
    ("timm", "mobileone_s1", 99),  # branches that are summed
    ("timm", "levit_128s", 99),  # attention with batch-norm
    ("timm", "efficientformer_l1", 99),
    ("timm", "cspnext_tiny", 99),  # channel attention, cross-stage splits
    ("timm", "nextvit_small", 99),
    ("timm", "res2next50", 99),  # splits that feed one another
    *(("transformers", name, 98) for name in zoo_transformers.MODELS),
]

# The same code with fewer blocks; the models as published are in `make thorough`.
SMALLER: dict[str, Callable[..., nn.Module] | dict[str, Any]] = {
    "convnext_tiny": lambda **_: ConvNeXt([CNBlockConfig(24, 48, 1), CNBlockConfig(48, None, 2)]),
    "vit_b_32": lambda **_: VisionTransformer(64, 32, 2, 4, hidden_dim=72, mlp_dim=128),
    "swin_t": lambda **_: SwinTransformer([4, 4], 24, [2, 2], [2, 4], window_size=[7, 7]),
    "mc3_18": lambda **_: VideoResNet(
        BasicBlock, [Conv3DSimple, *[Conv3DNoTemporal] * 3], [1, 1, 1, 1], BasicStem
    ),
    "levit_128s": {"depth": (1, 1, 1)},
    "efficientformer_l1": {
        "depths": (1, 1, 1, 2), "embed_dims": (16, 32, 48, 64), "img_size": 224
    },
    "nextvit_small": {"depths": (1, 1, 5, 1)},
    "res2next50": {"layers": [2, 1, 1, 1]},
    "segformer": {"depths": [1, 1, 1, 1]},
}  # fmt: skip
# Built as BERT and Llama are.
LIKE_OTHERS = {"roberta", "distilbert", "mistral", "qwen2"}
# Their mechanisms are also among the others, the random blocks or the rules' examples.
THOROUGH = {
    *("nextvit_small", "mobileone_s1", "levit_128s", "efficientformer_l1", "mc3_18", "res2next50"),
    *("segformer", "whisper", "dinov2", "gemma", "clip", "gpt2"),
}
CASES = [
    *(
        pytest.param(
            *own, own[1] in SMALLER, marks=[pytest.mark.thorough] if own[1] in THOROUGH else []
        )
        for own in SAMPLE
        if own[1] not in LIKE_OTHERS
    ),
    *(
        pytest.param(*own, False, marks=pytest.mark.thorough, id=f"whole-{own[1]}")
        for own in SAMPLE
        if own[1] in SMALLER or own[1] in LIKE_OTHERS
    ),
]


def make_smaller(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The suites build a model of this name with fewer blocks."""
    own = SMALLER[name]
    monkeypatch.setattr(zoo_torchvision, "CLIPS", {"*": (4, 32)})
    if callable(own):
        monkeypatch.setitem(torchvision.models._api.BUILTIN_MODELS, name, own)
    elif name in zoo_transformers.MODELS:
        kind, options, *rest = zoo_transformers.MODELS[name]
        monkeypatch.setitem(zoo_transformers.MODELS, name, (kind, options | own, *rest))
    else:
        entry = zoo_timm._chosen()[name]
        smaller = {**entry, "options": entry["options"] | own}
        monkeypatch.setattr(zoo_timm, "_chosen", lambda: {name: smaller})


def map_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """`swanify` takes over the map that the benchmark has made of the same model just before."""
    made: list[swan.ChannelMap] = []

    def noting(*args, **options) -> swan.ChannelMap:
        made.append(channel_map(*args, **options))
        return made[-1]

    monkeypatch.setattr(swan, "channel_map", noting)
    monkeypatch.setattr(conversion, "channel_map", lambda *args, **options: made[-1])
    monkeypatch.setattr(zoo_work, "PATIENCE", 0)  # once: how long it takes does not matter here


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("suite", "name", "least", "smaller"), CASES, ids=str)
def test_closed_equals_cut_at_exact_cost(
    suite: str, name: str, least: int, smaller: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts: list[dict] = []
    map_once(monkeypatch)
    if smaller:
        make_smaller(name, monkeypatch)
    zoo_work.work_swan(suite, name, facts.append)
    last = facts[-1]
    assert last["verdict"] == "exact", last["detail"]
    assert last["forgotten_channels"] == 0
    assert 100 * last["gated_channels"] >= least * (last["channels"] - last["output_channels"])
    for cut in last["cuts"]:
        assert cut["error"] <= 1e-9
        assert cut["hard_macs"] == cut["counted_macs"] == cut["torch_counter_macs"]
        assert cut["predicted_params"] == cut["counted_params"]
