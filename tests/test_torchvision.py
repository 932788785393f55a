"""One torchvision network per mechanism, with random parameters, float64 and 64 x 64 pixels."""

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import DenseNet, MobileNetV2, ResNet, segmentation
from torchvision.models.resnet import Bottleneck

import swan_surgery as swan
from swan_surgery.channels import PINNED
from swan_surgery.cutting.verification import relative_error
from tests.closing import TOLERANCE, close_random_


# The mechanism each model stands for.
SAMPLE = {
    "alexnet": "flatten to linear, no batch-norm",
    "resnet18": "residual add",
    "resnext50_32x4d": "grouped convolution",
    "densenet121": "concat, one batch-norm per consumer",
    "googlenet": "branches, auxiliary heads in train mode",
    "mobilenet_v2": "depthwise convolution",
    "mobilenet_v3_small": "squeeze-excite, hardswish",
    "shufflenet_v2_x0_5": "channel shuffle and split",
    "squeezenet1_1": "fire modules, a convolution as the classifier",
    "lraspp_mobilenet_v3_large": "segmentation, dict output, resampling",
}
# The same classes with fewer and narrower blocks; whole networks of them are in `make thorough`.
SMALL: dict[str, Callable[[], nn.Module]] = {
    "resnext": lambda: ResNet(
        Bottleneck, [1, 2, 1, 1], num_classes=10, groups=32, width_per_group=4
    ),
    "densenet": lambda: DenseNet(8, (2, 3), 16, num_classes=10, memory_efficient=False),
    "mobilenet_v2": lambda: MobileNetV2(
        10, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 1, 2]]
    ),
}
# AlexNet's pattern is the zoo's "vgg"; MobileNetV3's blocks are also in LR-ASPP.
THOROUGH = {
    *("alexnet", "resnext50_32x4d", "densenet121", "mobilenet_v2", "mobilenet_v3_small"),
    *("googlenet", "shufflenet_v2_x0_5", "lraspp_mobilenet_v3_large"),
}


# ShuffleNet's repeated shuffles tie the whole trunk of a stage: one unit, which must stay.
GATED = {"shufflenet_v2_x0_5": 0.85}


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    """Random batch-norms whose statistics fit the data: a wrong channel cannot hide."""
    if name.startswith("small "):
        return prepared(SMALL[name.removeprefix("small ")]())
    options = {"weights": None, "num_classes": 10}
    if hasattr(segmentation, name):
        options["weights_backbone"] = None
    if name == "googlenet":
        options["init_weights"] = False  # scipy's truncated normal takes a minute
    return prepared(torchvision.models.get_model(name, **options))


def prepared(model: nn.Module) -> tuple[nn.Module, torch.Tensor]:
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.3)
    model = model.double().eval()
    if norms:
        swan.calibrate(model, [torch.randn(2, 3, 64, 64, dtype=torch.float64)])
    return model, torch.randn(2, 3, 64, 64, dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *(f"small {name}" for name in SMALL),
        *(pytest.param(n, marks=pytest.mark.thorough if n in THOROUGH else ()) for n in SAMPLE),
    ],
)
def test_closed_equals_cut_and_cost_is_exact(name: str) -> None:
    model, x = build(name)
    gated = swan.swanify(model, x).eval()
    channels = gated.channels
    assert channels.unknown_ops == ()
    assert channels.notes == ()
    widths = {
        layer: module.weight.shape[0]
        for layer, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }
    assert {layer.name: len(layer.out_units) for layer in channels.layers} == widths
    explained = channels.num_gated_channels
    outputs = 0
    for pin in channels.pins:
        assert pin.reason
        explained += len(pin.channels)
        outputs += len(pin.channels) if pin.op == "output" else 0
    assert explained >= 0.99 * sum(widths.values())
    assert channels.num_gated_channels >= GATED.get(name, 0.99) * (sum(widths.values()) - outputs)
    for layer in channels.layers:
        pinned = {c for pin in channels.pins if pin.layer == layer.name for c in pin.channels}
        assert all((unit == PINNED) == (i in pinned) for i, unit in enumerate(layer.out_units))
    total = swan.count_macs(model, x)
    assert sum(term.macs for term in channels.costs) == total
    for share in (0.3, 0.7):
        close_random_(gated, share, seed=round(10 * share))
        mask = gated.gates.open_mask()
        pruned = swan.prune(gated, verify=False)
        assert relative_error(gated, pruned, mask, gated.example_inputs) <= TOLERANCE
        assert swan.hard_macs(gated) == swan.count_macs(pruned, x) < total
        assert type(pruned) is type(model)
        assert pruned.state_dict().keys() == model.state_dict().keys()
