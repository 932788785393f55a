"""Time of widths that look at the input: whole blocks and layers against the dense one and a static cut.

    python benchmarks/adaptive.py
    python benchmarks/adaptive.py --structure blocks
    python benchmarks/adaptive.py --structure network
    python benchmarks/adaptive.py --structure training

Paired in one loop, float32, eval mode. Every variant does the same work per sample on average: `static` is the
library's cut of the block's inner channels, `nested` gives half of a batch half of that width and half a wider one, so that the
mean MACs are those of the cut (at batch 1 a call for one sample of each is timed together, for all variants), `uniform` gives all the one width (what grouping itself costs
is the difference), `masked` multiplies masks. Looking at the input is part of `nested`. Ratios are over the
dense block's time next to it; the target is nested <= 1.15 x static. Feed-forward layers also run in `blocks` of
128 and 256 neurons that every token chooses with gates at random, a share of all on average, beside a static cut to that share.
`network`: whole networks at 224x224 with one width per input, whose speed-up is told over the MACs that it saves (target: 0.8), in eager mode and,
exported by `swan.export`, in onnxruntime. `training`: two steps of SGD (`sandwich_loss` alternates the widest and the narrowest width, each with
one at random) over two of the dense network, both without a teacher (target: 1.5).
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
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
from torchvision.models import resnet18, resnet50, vit_b_16
from torchvision.models.resnet import Bottleneck
from torchvision.ops import MLP

import swan_surgery as swan
from swan_surgery.exporting import OnnxSession
from swan_surgery.models import Inputs


THEMES = {
    "nested": "adaptive",
    "blocks": "adaptive_blocks",
    "network": "adaptive_network",
    "training": "adaptive_training",
}
SHARES = (0.5, 0.25)
STEPS = 64  # widths that the wider one is chosen among
SIZES = (128, 256)


class GatedUnit(nn.Module):
    """A feed-forward layer as language models have it."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, tokens, width]."""
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


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


def by_token(*, smoke: bool) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Feed-forward layers, and the shape of one sample."""
    if smoke:
        return {"MLP 16/1024": (MLP(16, [1024, 16], activation_layer=nn.GELU), (3, 16))}
    return {
        "ViT-B MLP": (MLP(768, [3072, 768], activation_layer=nn.GELU), (197, 768)),
        "gated 2048/8192, one token": (GatedUnit(2048, 8192), (1, 2048)),
    }


def token_variants(
    block: nn.Module, x: Tensor, share: float, size: int
) -> dict[str, Callable[[], object]]:
    """What is timed of blocks of neurons, by name."""
    model = OneBlock(block).eval()
    adapted = swan.adapt(model, x[:2], structure="blocks", block_size=size).eval()
    looks: Any = adapted.blocks()["block"].effort
    nn.init.normal_(looks.weight)
    logits = F.linear(x.flatten(0, -2), looks.weight)
    with torch.no_grad():
        looks.bias.fill_(-float(logits.flatten()[: 2**20].quantile(1 - share)))
    small = swan.compact(adapted, verify=False)
    masked = swan.compact(adapted, execution="masked", verify=False)
    count = len(looks.bias)
    static = adapted.at(torch.arange(count) < round(share * count)).eval()
    return {
        "dense": lambda: model(x),
        "static": lambda: static(x),
        "blocks": lambda: small(x),
        "masked": lambda: masked(x),
    }


def variants(
    block: nn.Module, x: Tensor, share: float, batch: int
) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    model = OneBlock(block).eval()
    return nested_variants(model, x, share, batch)[1]


def nested_variants(
    model: nn.Module, x: Tensor, share: float, batch: int
) -> tuple[swan.AdaptiveModel, dict[str, Callable[[], object]]]:
    """The adaptive model, and what is timed, by name; the first block looks for all."""
    adapted = swan.adapt(model, x[:2], per="network", widths=around(model, x, share)).eval()
    looks: Any = next(iter(adapted.blocks().values())).effort
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

    return adapted, {
        "dense": lambda: on_all(model),
        "static": lambda: on_all(static),
        "nested": lambda: on_all(small),
        "uniform": uniform,
        "masked": lambda: on_all(masked),
    }


def around(model: nn.Module, x: Tensor, share: float) -> tuple[float, ...]:
    """Half of a share, the share, and the width with which the half costs as much on average.

    A layer between two inner ones grows with the square of the width.
    """
    low = share / 2
    wider = [step / STEPS for step in range(int(share * STEPS) + 1, STEPS)]
    adapted = swan.adapt(model, x[:2], widths=(low, share, *wider, 1.0))
    macs = torch.stack([*adapted.costs.blocks.values()]).sum(0)
    high = int((macs[2:-1] - (2 * macs[1] - macs[0])).abs().argmin())
    return low, share, wider[high], 1.0


def _halve_(adapted: swan.AdaptiveModel, x: Tensor) -> None:
    """Half of the samples at level 0, half at level 2."""
    name, block = next(iter(adapted.blocks().items()))
    looks: Any = block.effort
    with torch.no_grad():
        efforts = adapted.taken(x).efforts[name]
        middle = efforts.sort().values[len(efforts) // 2 - 1 :][:2].mean()
        looks.thresholds.copy_(torch.tensor([float(middle), float(middle), torch.inf]))


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--structure", choices=[*THEMES], default="nested")
    options = parser.parse_args()
    if options.smoke:
        options.batches, options.repeats = [2], 2
    torch.set_num_threads(options.threads)
    theme = THEMES[options.structure]
    path = output_path(theme, options)
    result: dict[str, Any] = {"theme": theme, "environment": environment(), "rows": []}
    terminal = console()
    found = subjects(smoke=options.smoke) if options.structure == "nested" else {}
    others = {"blocks": of_tokens, "network": of_networks, "training": of_training}
    with progress_bar(terminal) as bar:
        total = len(found) * len(options.batches) * len(SHARES)
        task = bar.add_task("blocks", total=total or None)
        for name, (block, shape) in found.items():
            for batch in options.batches:
                generator = torch.Generator().manual_seed(0)
                x = torch.randn(max(batch, 2), *shape, generator=generator)
                for share in SHARES:
                    row = measure(name, block, x, (share, batch), options.repeats)
                    result["rows"].append(row | {"threads": options.threads})
                    write(path, result)
                    bar.advance(task)
                    bar.console.print(described(row))
        if options.structure in others:
            for row in others[options.structure](options):
                result["rows"].append(row | {"threads": options.threads})
                write(path, result)
                bar.advance(task)
                bar.console.print(described(row))
    report(path, terminal)


def networks(*, smoke: bool, size: int = 224) -> dict[str, nn.Module]:
    """Whole networks, untrained."""
    if smoke:
        return {"resnet18": resnet18()}
    return {"resnet50": resnet50(), "vit_b_16": vit_b_16(image_size=size)}


def of_networks(options: Any) -> Iterator[dict[str, Any]]:
    """Rows of whole networks: what time falls to beside what MACs fall to."""
    for name, model in networks(smoke=options.smoke).items():
        for batch in options.batches:
            size = 32 if options.smoke else 224
            x = torch.randn(
                max(batch, 2), 3, size, size, generator=torch.Generator().manual_seed(0)
            )
            for share in SHARES[: 1 if options.smoke else None]:
                with torch.no_grad():
                    adapted, timed = nested_variants(model.eval(), x, share, batch)
                    del timed["masked"]
                    macs = float(adapted.taken(x).macs.double().mean()) / adapted.costs.dense
                    samples = paired(timed, repeats=options.repeats)
                    with TemporaryDirectory() as folder:
                        made = {
                            "dense": model,
                            "static": adapted.at(share).eval(),
                            "nested": swan.compact(adapted, verify=False),
                        }
                        exported = in_onnxruntime(made, x, batch, Path(folder))
                        onnx = paired(exported, repeats=options.repeats)
                own = {
                    "onnxruntime": ratios(onnx),
                    "block": name,
                    "batch": batch,
                    "share": share,
                    "macs_share": macs,
                    "static_macs_share": swan.count_macs(adapted.at(share), x[:1])
                    / adapted.costs.dense,
                    "ms": {
                        key: 1e3 * wall(times)["median"] * batch / len(x)
                        for key, times in samples.items()
                    },
                }
                yield own | ratios(samples)


def of_training(options: Any) -> Iterator[dict[str, Any]]:
    """Rows of training steps, over the dense network's."""
    for name, model in networks(smoke=options.smoke, size=64).items():
        for batch in options.batches:
            size = 32 if options.smoke else 64
            x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
            labels = torch.arange(batch) % 1000
            adapted = swan.adapt(model, x[:2]).train()
            generator = torch.Generator().manual_seed(0)

            def loss(own: nn.Module, x: Tensor = x, labels: Tensor = labels) -> Tensor:
                return F.cross_entropy(own(x), labels)

            def sandwich(
                step: int, adapted: Any = adapted, loss: Any = loss, generator: Any = generator
            ) -> Tensor:
                return swan.sandwich_loss(adapted, loss, step=step, generator=generator)

            dense = copy.deepcopy(model).train()
            timed = {
                "dense": two_steps(dense, lambda _, dense=dense, loss=loss: loss(dense)),
                "nested": two_steps(adapted, sandwich),
            }
            samples = paired(timed, repeats=options.repeats)
            over = {key: ratio(own, samples["dense"], clock=1) for key, own in samples.items()}
            ms = {key: 1e3 * wall(own)["median"] / 2 for key, own in samples.items()}
            yield {"block": name, "batch": batch, "ms": ms, "over_dense": over}


def two_steps(model: nn.Module, loss: Callable[[int], Tensor]) -> Callable[[], None]:
    """Two steps of plain SGD."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def steps() -> None:
        for step in range(2):
            optimizer.zero_grad()
            loss(step).backward()
            optimizer.step()

    return steps


def in_onnxruntime(
    models: Mapping[str, nn.Module], x: Tensor, batch: int, folder: Path
) -> dict[str, Callable[[], object]]:
    """What is timed there, by name, on one thread."""

    def timed(name: str, own: nn.Module) -> Callable[[], object]:
        path = folder / f"{name}.onnx"
        swan.export(own, path, x)
        session = OnnxSession(path, threads=1)
        feeds = [session.feed(Inputs((part,), {})) for part in x.split(batch)]
        return lambda: [session.run(feed) for feed in feeds]

    return {name: timed(name, own) for name, own in models.items()}


def of_tokens(options: Any) -> Iterator[dict[str, Any]]:
    """Rows of blocks of neurons."""
    for name, (block, shape) in by_token(smoke=options.smoke).items():
        for batch in options.batches if shape[0] > 1 else (1,):
            x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
            for share in SHARES:
                for size in SIZES:
                    with torch.no_grad():
                        timed = token_variants(block, x, share, size)
                        samples = paired(timed, repeats=options.repeats)
                    yield {
                        "block": name,
                        "batch": batch,
                        "share": share,
                        "size": size,
                        "ms": {key: 1e3 * wall(own)["median"] for key, own in samples.items()},
                        **ratios(samples),
                    }


def ratios(samples: Any) -> dict[str, Any]:
    """Over the dense and the static variant: CPU seconds of one thread hardly notice who else is on the machine."""
    return {
        f"over_{base}": {key: ratio(own, samples[base], clock=1) for key, own in samples.items()}
        for base in ("dense", "static")
    }


def measure(
    name: str, block: nn.Module, x: Tensor, case: tuple[float, int], repeats: int
) -> dict[str, Any]:
    """One row: milliseconds of every variant, and ratios to the dense and the static one."""
    share, batch = case
    with torch.no_grad():
        samples = paired(variants(block, x, share, batch), repeats=repeats)
    calls = len(x) // batch
    ms = {key: 1e3 * wall(own)["median"] / calls for key, own in samples.items()}
    return {
        "macs_over_static": macs_over_static(block, x, share),
        "block": name,
        "batch": batch,
        "share": share,
        "ms": ms,
        **ratios(samples),
    }


def macs_over_static(block: nn.Module, x: Tensor, share: float) -> float:
    """What two widths cost over the one between them, looking at the input included."""
    model = OneBlock(block).eval()
    adapted = swan.adapt(model, x[:2], widths=around(model, x, share))
    (blocks,) = adapted.costs.blocks.values()
    mean = adapted.costs.fixed + float(blocks[0] + blocks[2]) / 2
    return mean / (adapted.costs.fixed - adapted.costs.looking + float(blocks[1]))


def described(row: dict[str, Any]) -> str:
    if "over_static" not in row:
        nested = row["over_dense"]["nested"]["median"]
        return f"{row['block']}, batch {row['batch']}: a step takes {nested:.2f} of the dense one's time"
    told = " ".join(f"{key} {own['median']:.2f}" for key, own in row["over_dense"].items())
    way = "nested" if "size" not in row else "blocks"
    nested = row["over_static"][way]["median"]
    if "macs_share" in row:
        told += f" of {row['macs_share']:.2f} of the MACs"
    return (
        f"{row['block']}, batch {row['batch']}, {row['share']:.0%}: dense {row['ms']['dense']:.1f} ms; "
        f"of dense: {told}; {way} / static {nested:.2f}"
    )


if __name__ == "__main__":
    main()
