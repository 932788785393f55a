"""What `swan.compensate` costs: seconds and memory, on random images, at half the MACs by weight magnitude.

    python benchmarks/compensation_cost.py

ResNet-50 and ViT-B/16 of torchvision, images of 64x64, two threads, each in a process of its own. Weights are
random: the work does not depend on them. Memory is what the peak of the process grows by while it runs, beside the
size of both models and that of the largest thing a layer reads for all images (float32).
"""

import argparse
import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import torchvision
from _measure import arguments, console, environment, output_path, report, write
from torch import Tensor, nn

import swan_surgery as swan


MODELS: dict[str, dict[str, Any]] = {"resnet50": {}, "vit_b_16": {"image_size": 64}}
TARGETS = {"resnet50": 60, "vit_b_16": 120}
MIB = 2**20


def measure(name: str, images: int, batch: int, threads: int) -> dict[str, Any]:
    """One model, in this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    dense = torchvision.models.get_model(name, weights=None, **MODELS[name]).eval()
    example = torch.randn(1, 3, 64, 64)
    gated = swan.swanify(dense, example)
    small = swan.prune_by_score(gated, swan.importance(gated, "magnitude"), macs=0.5)
    if any(isinstance(module, nn.BatchNorm2d) for module in small.modules()):
        swan.calibrate(small, [torch.randn(batch, 3, 64, 64)])
    batches = list(torch.randn(images, 3, 64, 64).split(batch))
    largest = largest_input(small, example) * images
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    done = swan.compensate(small, dense, batches)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    size = sum(p.numel() * p.element_size() for m in (dense, small) for p in m.parameters())
    return {
        "model": name,
        "images": images,
        "threads": threads,
        "seconds": done.seconds,
        "target_seconds": TARGETS[name],
        "peak_growth_mib": grown / 1024,
        "models_mib": size / MIB,
        "largest_input_mib": largest / MIB,
        "layers": len(done.layers),
    }


def largest_input(model: nn.Module, example: Tensor) -> int:
    """Bytes that one sample gives the layer that reads most."""
    sizes: list[int] = []

    def note(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        sizes.append(args[0].numel() * args[0].element_size())

    kinds = (nn.Conv2d, nn.Linear)
    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        model(example)
    for hook in hooks:
        hook.remove()
    return max(sizes)


def parse() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args()
    if options.smoke:
        options.images, options.batch, options.models = 8, 4, ["resnet50"]
    return options


def main() -> None:
    options = parse()
    screen, rows = console(), {}
    for name in options.models:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            own = pool.submit(measure, name, options.images, options.batch, options.threads)
            rows[name] = row = own.result()
        screen.print(
            f"{name}: {row['seconds']:.1f} s (aim: {row['target_seconds']}), {row['layers']} layers, peak grows by "
            f"{row['peak_growth_mib']:.0f} MiB (both models {row['models_mib']:.0f}, the largest input of a layer "
            f"{row['largest_input_mib']:.0f})"
        )
    out = output_path("compensation_cost", options)
    write(out, {"theme": "compensation_cost", "environment": environment(), "rows": rows})
    report(out, screen)


if __name__ == "__main__":
    main()
