"""Time of widths that look at the input: whole blocks and layers against the dense one and a static cut.

    python benchmarks/adaptive.py

Paired in one loop, float32, eval mode. Every variant does the same work per sample on average: `static` is the
library's cut of the block's inner channels, `nested` gives half of a batch one width and half another with
that mean (at batch 1 a call for one sample of each is timed together, for all variants), `uniform` gives all the one width (what grouping itself costs
is the difference), `masked` multiplies masks. Looking at the input is part of `nested`. Ratios are over the
dense block's time next to it; the target is nested <= 1.15 x static.
"""

from collections.abc import Callable
from typing import Any

import torch
from _measure import (
    arguments,
    console,
    environment,
    output_path,
    paired,
    progress_bar,
    ratio,
    report,
    wall,
    write,
)
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck
from torchvision.ops import MLP

import swan_surgery as swan


# Two widths around each share, with that mean.
AROUND = {0.5: (0.25, 0.75), 0.25: (0.125, 0.375)}


class OneBlock(nn.Module):
    """A model that is one block, so that nothing else takes time."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """As the block."""
        return self.block(x)


def subjects(*, smoke: bool) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Blocks, and the shape of one sample."""
    if smoke:
        return {"bottleneck 64/16 at 7": (Bottleneck(64, 16), (64, 7, 7))}
    return {
        "bottleneck 1024/256 at 14": (Bottleneck(1024, 256), (1024, 14, 14)),
        "bottleneck 256/64 at 56": (Bottleneck(256, 64), (256, 56, 56)),
        "ViT-B MLP": (MLP(768, [3072, 768], activation_layer=nn.GELU), (197, 768)),
    }


def variants(
    block: nn.Module, x: Tensor, share: float, batch: int
) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    low, high = AROUND[share]
    model = OneBlock(block).eval()
    adapted = swan.adapt(model, x[:2], widths=(low, share, high, 1.0)).eval()
    looks: Any = adapted.blocks()["block"].effort
    # Thresholds at the median effort, so that samples really look, and halves take two widths.
    nn.init.normal_(looks.weight)
    _halve_(adapted, x)
    parts = x.split(batch)
    small = swan.compact(adapted, verify=False)
    masked = swan.compact(adapted, execution="masked", verify=False)
    static = adapted.at(share).eval()

    def uniform() -> None:
        with small.holding(1):
            on_all(small)

    def on_all(own: nn.Module) -> None:
        for part in parts:
            own(part)

    return {
        "dense": lambda: on_all(model),
        "static": lambda: on_all(static),
        "nested": lambda: on_all(small),
        "uniform": uniform,
        "masked": lambda: on_all(masked),
    }


def _halve_(adapted: swan.AdaptiveModel, x: Tensor) -> None:
    """Half of the samples at level 0, half at level 2."""
    looks: Any = adapted.blocks()["block"].effort
    with torch.no_grad():
        efforts = adapted.taken(x).efforts["block"]
        middle = efforts.sort().values[len(efforts) // 2 - 1 :][:2].mean()
        looks.thresholds.copy_(torch.tensor([float(middle), float(middle), torch.inf]))


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.smoke:
        options.batches, options.repeats = [2], 2
    torch.set_num_threads(options.threads)
    path = output_path("adaptive", options)
    result: dict[str, Any] = {"theme": "adaptive", "environment": environment(), "rows": []}
    terminal = console()
    found = subjects(smoke=options.smoke)
    with progress_bar(terminal) as bar:
        task = bar.add_task("blocks", total=len(found) * len(options.batches) * len(AROUND))
        for name, (block, shape) in found.items():
            for batch in options.batches:
                generator = torch.Generator().manual_seed(0)
                x = torch.randn(max(batch, 2), *shape, generator=generator)
                for share in AROUND:
                    row = measure(name, block, x, (share, batch), options.repeats)
                    result["rows"].append(row | {"threads": options.threads})
                    write(path, result)
                    bar.advance(task)
                    bar.console.print(described(row))
    report(path, terminal)


def measure(
    name: str, block: nn.Module, x: Tensor, case: tuple[float, int], repeats: int
) -> dict[str, Any]:
    """One row: milliseconds of every variant, and ratios to the dense and the static one."""
    share, batch = case
    with torch.no_grad():
        samples = paired(variants(block, x, share, batch), repeats=repeats)
    calls = len(x) // batch
    ms = {key: 1e3 * wall(own)["median"] / calls for key, own in samples.items()}
    # CPU seconds of one thread hardly notice who else is on the machine.
    over_dense = {key: ratio(own, samples["dense"], clock=1) for key, own in samples.items()}
    over_static = {key: ratio(own, samples["static"], clock=1) for key, own in samples.items()}
    return {
        "macs_over_static": macs_over_static(block, x, share),
        "block": name,
        "batch": batch,
        "share": share,
        "ms": ms,
        "over_dense": over_dense,
        "over_static": over_static,
    }


def macs_over_static(block: nn.Module, x: Tensor, share: float) -> float:
    """What two widths cost over one with their mean: a layer between two inner ones grows with the square."""
    low, high = AROUND[share]
    adapted = swan.adapt(OneBlock(block).eval(), x[:2], widths=(low, share, high, 1.0))
    (blocks,) = adapted.costs.blocks.values()
    around = adapted.costs.fixed + float(blocks[0] + blocks[2]) / 2
    return around / (adapted.costs.fixed - adapted.costs.looking + float(blocks[1]))


def described(row: dict[str, Any]) -> str:
    ratios = " ".join(f"{key} {own['median']:.2f}" for key, own in row["over_dense"].items())
    nested = row["over_static"]["nested"]["median"]
    return (
        f"{row['block']}, batch {row['batch']}, {row['share']:.0%}: dense {row['ms']['dense']:.1f} ms; "
        f"of dense: {ratios}; nested / static {nested:.2f}"
    )


if __name__ == "__main__":
    main()
