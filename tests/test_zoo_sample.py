"""A sample of the zoo: one model for each mechanism, measured exactly as `benchmarks/zoo.py` does."""

import pytest
from zoo_transformers import MODELS
from zoo_work import work_swan

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
    *(("transformers", name, 98) for name in MODELS),
]


def map_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """`swanify` takes over the map that the benchmark has made of the same model just before."""
    made: list[swan.ChannelMap] = []

    def noting(*args, **options) -> swan.ChannelMap:
        made.append(channel_map(*args, **options))
        return made[-1]

    monkeypatch.setattr(swan, "channel_map", noting)
    monkeypatch.setattr(conversion, "channel_map", lambda *args, **options: made[-1])


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("suite", "name", "least"), SAMPLE, ids=str)
def test_closed_equals_cut_at_exact_cost(
    suite: str, name: str, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts: list[dict] = []
    map_once(monkeypatch)
    work_swan(suite, name, facts.append)
    last = facts[-1]
    assert last["verdict"] == "exact", last["detail"]
    assert last["forgotten_channels"] == 0
    assert 100 * last["gated_channels"] >= least * (last["channels"] - last["output_channels"])
    for cut in last["cuts"]:
        assert cut["error"] <= 1e-9
        assert cut["hard_macs"] == cut["counted_macs"] == cut["torch_counter_macs"]
        assert cut["predicted_params"] == cut["counted_params"]
