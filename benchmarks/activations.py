"""Other activations in models of the zoo: identity at the start, and what FleS costs.

    python benchmarks/activations.py

Identity: all activations of each model are swapped for FleS that starts as what was there, in float64;
the largest difference of an output, and of a gradient of the given model's parameters, relative to the largest
value. Cost: parameters and MACs with and without (beside the paper's numbers where it has them), and the time of
a forward pass, in turns. Rows that are in the result file already are not measured again.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
import torchvision
from _measure import arguments, console, cpu, environment, output_path, paired, ratio, report, write
from torch import Tensor, nn

import swan_surgery as swan


_TV = torchvision.models
# Models and the sizes of their images: small where the model takes that, so that float64 does not take long.
IDENTITY = {
    **dict.fromkeys(
        (
            "alexnet",
            "vgg11_bn",
            "resnet18",
            "resnet34",
            "resnet50",
            "resnext50_32x4d",
            "wide_resnet50_2",
            "mobilenet_v2",
            "mobilenet_v3_small",
            "mobilenet_v3_large",
            "efficientnet_b0",
            "efficientnet_v2_s",
            "mnasnet0_5",
            "shufflenet_v2_x1_0",
            "squeezenet1_1",
            "googlenet",
            "regnet_x_400mf",
            "regnet_y_400mf",
            "convnext_tiny",
            "swin_t",
            "swin_v2_t",
            "vit_b_32",
            "densenet121",
        ),
        96,
    ),
    **dict.fromkeys(
        (
            "timm:poolformer_s12",
            "timm:convnextv2_atto",
            "timm:mixer_s32_224",
            "timm:deit_tiny_patch16_224",
            "timm:resnet10t",
            "timm:ghostnet_050",
            "timm:repvgg_a0",
        ),
        224,
    ),
}
_OPTIONS: dict[str, dict[str, Any]] = {"googlenet": {"init_weights": False}}
# model -> millions of parameters before and after, in the paper's Table 3 (ImageNet, 1,000 classes).
PAPER = {
    "resnet50": (25.6, 28.1),
    "swin_t": (28.3, 31.7),
    "vit_b_16": (86.6, 97.4),
}


def build(name: str, classes: int = 10) -> nn.Module:
    """A model with random weights, in eval mode."""
    torch.manual_seed(0)
    if name.startswith("timm:"):
        return timm.create_model(name.removeprefix("timm:"), num_classes=classes).eval()
    return _TV.get_model(name, weights=None, num_classes=classes, **_OPTIONS.get(name, {})).eval()


def _error(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max() / one.abs().max().clamp(min=1e-300))


def identity(name: str, size: int) -> dict[str, Any]:
    """Outputs and gradients of a model and its swapped copy."""
    model = build(name).double()
    x = torch.randn(1, 3, size, size, dtype=torch.float64)
    started = time.process_time()
    swapped = swan.swap_activations(model, "fles", x)
    seconds = time.process_time() - started
    done = swan.swaps(swapped)
    one, two = model(x), swapped(x)
    one.square().sum().backward()
    two.square().sum().backward()
    gradients = [
        _error(p.grad, swapped.get_parameter(n).grad)
        for n, p in model.named_parameters()
        if p.grad is not None
    ]
    return {
        "kind": "identity",
        "model": name,
        "swapped": len(done.swapped),
        "calls": sum(place.is_call for place in done.swapped),
        "kept": sorted({own.why for own in done.kept}),
        "num_kept": len(done.kept),
        "output_error": _error(one.detach(), two.detach()),
        "gradient_error": max(gradients),
        "cpu_seconds": round(seconds, 1),
    }


def size(name: str) -> dict[str, Any]:
    """Parameters and MACs at 224x224 with 1,000 classes, beside the paper's."""
    model, x = build(name, 1000), torch.randn(1, 3, 224, 224)
    swapped = swan.swap_activations(
        model, "fles", torch.randn(1, 3, 64, 64) if name == "resnet50" else x
    )
    return {
        "kind": "size",
        "model": name,
        "params": [swan.count_params(model), swan.count_params(swapped)],
        "macs": [swan.count_macs(model, x), swan.count_macs(swapped, x)],
        "paper_millions": PAPER[name],
    }


@torch.no_grad()
def cost(name: str, batch: int, repeats: int, activation: str) -> dict[str, Any]:
    """Time with and without, in turns."""
    model, x = build(name, 1000), torch.randn(batch, 3, 224, 224)
    given = torch.randn(1, 3, 64, 64) if name == "resnet50" else x[:1]
    swapped = swan.swap_activations(model, activation, given).eval()
    samples = paired(
        {"given": lambda: model(x), "swapped": lambda: swapped(x)}, repeats=repeats, warmup=1
    )
    return {
        "kind": "cost",
        "model": name,
        "activation": activation,
        "batch": batch,
        "cpu_ratio": ratio(samples["swapped"], samples["given"], clock=1),
        "given_cpu_seconds": cpu(samples["given"]),
        "swapped_cpu_seconds": cpu(samples["swapped"]),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="+", help="jobs that start so: identity, size/swin_t, ...")
    options = parser.parse_args()
    torch.set_num_threads(1)
    out = output_path("activations", options)
    jobs: dict[str, Callable[[], dict[str, Any]]] = {}
    for name in () if options.smoke else PAPER:
        jobs[f"size/{name}"] = lambda name=name: size(name)
    for batch, repeats in () if options.smoke else ((1, 11), (8, 5)):
        for name in ("resnet50", "vit_b_16"):
            jobs[f"cost/{name}/fles/{batch}"] = lambda name=name, batch=batch, repeats=repeats: (
                cost(name, batch, repeats, "fles")
            )
    for name, pixels in [("squeezenet1_1", 64)] if options.smoke else IDENTITY.items():
        jobs[f"identity/{name}"] = lambda name=name, pixels=pixels: identity(name, pixels)
    rows: dict[str, dict[str, Any]] = {}
    if out is not None and out.exists():
        rows = {row["job"]: row for row in json.loads(out.read_text())["rows"]}
    screen = console()
    for job, run in jobs.items():
        if job in rows or (options.only and not job.startswith(tuple(options.only))):
            continue
        rows[job] = {"job": job, **run()}
        screen.print(rows[job], soft_wrap=True)
        write(
            out,
            {"theme": "activations", "environment": environment(), "rows": list(rows.values())},
        )
    report(out, screen)


if __name__ == "__main__":
    main()
