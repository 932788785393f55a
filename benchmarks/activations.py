"""Other activations in models of the zoo: identity at the start, and what FleS costs.

    python benchmarks/activations.py
    python benchmarks/activations.py --identity

Identity: all activations of each model are swapped for FleS that starts as what was there, in float64;
the largest difference of an output, and of a gradient of the given model's parameters, relative to the largest
value. Cost: parameters and MACs with and without (beside the paper's numbers where it has them), and the time of
a forward pass, in turns; of single blocks too, eager and compiled, beside the plain function that FleS scales, with
the times that a tensor as large as what the activation is given goes through memory. Rows that are in the result
file already are not measured again.
"""

import itertools
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torchvision
import zoo_models
from _measure import arguments, console, cpu, environment, output_path, paired, ratio, report, write
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import swan_surgery as swan


# Small models of the zoo, with random numbers for all parameters.
IDENTITY = {
    "torchvision": (
        "alexnet",
        "vgg11_bn",
        "resnet18",
        "resnet50",
        "mobilenet_v2",
        "mobilenet_v3_small",
        "efficientnet_b0",
        "mnasnet0_5",
        "shufflenet_v2_x1_0",
        "squeezenet1_1",
        "regnet_y_400mf",
        "convnext_tiny",
    ),
    "timm": (
        "convnext_zepto_rms",
        "deit_tiny_patch16_224",
        "edgenext_xx_small",
        "efficientvit_b0",
        "fasternet_t0",
        "ghostnet_050",
        "mobilenetv2_035",
        "pit_ti_224",
        "pvt_v2_b0",
        "resnet10t",
        "starnet_s050",
    ),
    "transformers": (
        "bert",
        "roberta",
        "distilbert",
        "gpt2",
        "llama",
        "t5",
        "vit",
        "dinov2",
        "clip",
        "whisper",
        "segformer",
    ),
}
# model -> millions of parameters before and after, in the paper's Table 3 (ImageNet, 1,000 classes).
PAPER = {
    "resnet50": (25.6, 28.1),
    "swin_t": (28.3, 31.7),
    "vit_b_16": (86.6, 97.4),
}


def build(name: str, classes: int = 1000) -> nn.Module:
    """A model with random weights, in eval mode."""
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, num_classes=classes).eval()


def _error(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max() / one.abs().max().clamp(min=1e-300))


def identity(suite: str, name: str) -> dict[str, Any]:
    """Outputs and gradients of a model and its swapped copy."""
    case = zoo_models.build(suite, name)
    model, started = case.model, time.process_time()
    activation, refused = "fles", ""
    try:
        swapped = swan.swap_activations(model, activation, case.example)
    except swan.InputError as err:
        activation, refused = "fles-token", str(err)
        swapped = swan.swap_activations(model, activation, case.example)
    seconds = time.process_time() - started
    done = swan.swaps(swapped)
    inputs = case.draw(torch.Generator().manual_seed(2), 2)
    one, two = (
        [t for t in zoo_models.tensors_of(zoo_models.call(m, inputs)) if t.is_floating_point()]
        for m in (model.eval(), swapped.eval())
    )
    for outputs in (one, two):
        sum(t.square().sum() for t in outputs if t.requires_grad).backward()
    gradients = [
        _error(p.grad, swapped.get_parameter(n).grad)
        for n, p in model.named_parameters()
        if p.grad is not None
    ]
    return {
        "kind": "identity",
        "suite": suite,
        "model": name,
        "activation": activation,
        "refused": refused,
        "swapped": len(done.swapped),
        "calls": sum(place.is_call for place in done.swapped),
        "kept": sorted({own.why for own in done.kept}),
        "num_kept": len(done.kept),
        "output_error": max(
            _error(own.detach(), other.detach()) for own, other in zip(one, two, strict=True)
        ),
        "gradient_error": max(gradients),
        "num_gradients": len(gradients),
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


class Passes(TorchDispatchMode):
    """Counts how often a tensor of at least a size is read or written; views are free."""

    def __init__(self, numel: int) -> None:
        """`numel`: of the tensors that count."""
        super().__init__()
        self.numel, self.count = numel, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run it, and count what it is given and gives."""
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            whole = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            self.count += sum(t.numel() >= self.numel for t in whole)
        return out


class Block(nn.Module):
    """One block of a model: a bottleneck of ResNet-50, or the MLP of ViT-B."""

    def __init__(self, name: str) -> None:
        """`name`: as in `BLOCKS`."""
        super().__init__()
        model, _, inside = name.partition(".")
        self.block = build(model).get_submodule(inside)

    def forward(self, x: Tensor) -> Tensor:
        """What the block computes."""
        out: Tensor = self.block(x)
        return out


# Block -> what one sample of it is given.
BLOCKS = {
    "resnet50.layer1.1": (256, 56, 56),
    "resnet50.layer3.1": (1024, 14, 14),
    "vit_b_16.encoder.layers.encoder_layer_0.mlp": (197, 768),
}


@torch.no_grad()
def block(name: str, batch: int, repeats: int, how: str) -> dict[str, Any]:
    """Time of a block with its activations, with FleS, and with the function that FleS scales."""
    model, x = Block(name).eval(), torch.randn(batch, *BLOCKS[name])
    variants: dict[str, nn.Module] = {"given": model}
    variants["fles"] = swan.swap_activations(model, "fles", x).eval()
    if name.startswith("resnet"):
        variants["silu"] = swan.swap_activations(model, "silu", x, start="fresh").eval()
    passes = {}
    for own, variant in variants.items():
        with Passes(x.numel() // 4) as counted:
            variant(x)
        passes[own] = counted.count
    run = {n: torch.compile(m) if how == "compiled" else m for n, m in variants.items()}
    timed = {n: lambda own=own: own(x) for n, own in run.items()}
    samples = paired(timed, repeats=repeats, warmup=3)
    return {
        "kind": "block",
        "model": name,
        "batch": batch,
        "how": how,
        "passes": passes,
        "cpu_ratio": {n: ratio(samples[n], samples["given"], clock=1) for n in run},
        "cpu_seconds": {n: cpu(samples[n]) for n in run},
    }


def jobs_of(*, smoke: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """What there is to run, by name."""
    jobs: dict[str, Callable[[], dict[str, Any]]] = {}
    for suite, names in ({"torchvision": ("squeezenet1_1",)} if smoke else IDENTITY).items():
        jobs |= {f"identity/{suite}/{name}": partial(identity, suite, name) for name in names}
    if smoke:
        return jobs
    jobs |= {f"size/{name}": partial(size, name) for name in PAPER}
    for batch, repeats in ((1, 15), (8, 5)):
        for name in ("resnet50", "vit_b_16"):
            jobs[f"cost/{name}/fles/{batch}"] = partial(cost, name, batch, repeats, "fles")
    for how, name, (batch, repeats) in itertools.product(
        ("eager", "compiled"), BLOCKS, ((1, 31), (8, 11))
    ):
        jobs[f"block/{name}/{how}/{batch}"] = partial(block, name, batch, repeats, how)
    return jobs


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="+", help="jobs that start so: identity, size/swin_t, ...")
    parser.add_argument(
        "--identity", dest="only", action="store_const", const=["identity"], help="only these"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    out = output_path("activations", options)
    rows: dict[str, dict[str, Any]] = {}
    if out is not None and out.exists():
        rows = {row["job"]: row for row in json.loads(out.read_text())["rows"]}
    screen = console()
    for job, run in jobs_of(smoke=options.smoke).items():
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
