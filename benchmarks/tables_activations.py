"""The tables of `activations.py` and `activations_training.py`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any


Row = Mapping[str, Any]
Cells = tuple[list[str], list[list[str]]]
_NETWORKS = {"resnet8": "ResNet-8", "vit": "ViT, 4 layers"}
_GIVEN = {"resnet8": "ReLU, as given", "vit": "GELU, as given"}
_PARTS = {
    "scratch": "from scratch",
    "retrofit": "trained on",
    "cut-25": "cut to 25 %, trained on",
    "cut-10": "cut to 10 %, trained on",
}
_METHODS = {
    "given": "as given",
    "silu": "SiLU",
    "starrelu": "StarReLU",
    "acon-c": "ACON-C",
    "fles": "FleS",
    "fles-dg": "FleS-DG (no statistics)",
    "fles-pn": "FleS-P&N (all entries)",
    "ap": "AP (a quarter of the channels, those dead most often)",
}


def sections(rows: Sequence[Row]) -> list[tuple[str, Cells | None]]:
    """What is said, and the table under it: identity, sizes, times."""
    found: list[tuple[str, Cells | None]] = []
    identity = [row for row in rows if row["kind"] == "identity"]
    if identity:
        swapped = sum(row["swapped"] for row in identity)
        calls = sum(row["calls"] for row in identity)
        worst = max(row["output_error"] for row in identity)
        gradient = max(row["gradient_error"] for row in identity)
        said = (
            f"Identity: {len(identity)} models, {swapped} activations swapped for FleS, of causal models per token ({calls} of them calls or "
            f"several runs of one module); largest difference in float64, of outputs {worst:.1e}, of gradients "
            f"of the given models' parameters {gradient:.1e}, relative to the largest value."
        )
        header = [
            "model",
            "activation",
            "swapped",
            "calls",
            "stay",
            "outputs",
            "gradients",
            "swap s",
        ]
        cells = [
            [
                f"{row['suite']}: {row['model']}",
                row["activation"],
                str(row["swapped"]),
                str(row["calls"]),
                str(row["num_kept"]),
                f"{row['output_error']:.0e}" if row["output_error"] else "0",
                f"{row['gradient_error']:.0e}" if row["gradient_error"] else "0",
                f"{row['cpu_seconds']:.1f}",
            ]
            for row in identity
        ]
        found.append((said, (header, cells)))
    sizes = [row for row in rows if row["kind"] == "size"]
    if sizes:
        header = ["model", "M params", "with FleS", "paper", "GMACs", "with FleS"]
        cells = [
            [
                row["model"],
                *(f"{count / 1e6:.1f}" for count in row["params"]),
                " -> ".join(f"{own:.1f}" for own in row["paper_millions"]),
                *(f"{count / 1e9:.3f}" for count in row["macs"]),
            ]
            for row in sizes
        ]
        found.append(("Size, 1,000 classes, 224x224; *paper*: its Table 3:", (header, cells)))
    times = [row for row in rows if row["kind"] == "cost"]
    if times:
        header = ["model", "batch", "given, CPU s", "with FleS", "ratio"]
        cells = [
            [
                row["model"],
                str(row["batch"]),
                f"{row['given_cpu_seconds']['median']:.3f}",
                f"{row['swapped_cpu_seconds']['median']:.3f}",
                "{median:.2f} [{q1:.2f}, {q3:.2f}]".format(**row["cpu_ratio"]),
            ]
            for row in times
        ]
        found.append(("Time of a forward pass, eager, one thread, in turns:", (header, cells)))
    blocks = [row for row in rows if row["kind"] == "block"]
    if blocks:
        header = ["block", "run", "batch", "passes", "with FleS", "FleS / given", "SiLU / given"]
        cells = [
            [
                row["model"],
                row["how"],
                str(row["batch"]),
                *(str(row["passes"][name]) for name in ("given", "fles")),
                *(
                    "{median:.2f} [{q1:.2f}, {q3:.2f}]".format(**row["cpu_ratio"][name])
                    if name in row["cpu_ratio"]
                    else ""
                    for name in ("fles", "silu")
                ),
            ]
            for row in blocks
        ]
        said = (
            "Blocks, one thread, in turns; *passes*: how often a tensor of at least a quarter of the block's input is "
            "read or written in eager mode; *SiLU*: in place of ReLU, without any scales:"
        )
        found.append((said, (header, cells)))
    return found


def training(rows: Sequence[Row], shown: Callable[[Sequence[float]], str]) -> Cells:
    """Accuracy from scratch, put into a trained network, and after a cut; at the rate that validation chose."""
    header = [
        "network",
        "how",
        "activation",
        "seeds",
        "learning rate",
        "before training %",
        "accuracy %",
        "on training images %",
        "params",
        "kMACs",
        "CPU s",
    ]
    cells = []
    places = dict.fromkeys((row["network"], row["part"]) for row in rows)
    for network, part in sorted(places, key=lambda own: (own[0], list(_PARTS).index(own[1]))):
        here = [row for row in rows if (row["network"], row["part"]) == (network, part)]
        for method, name in _METHODS.items():
            own = [row for row in here if row["method"] == method]
            first = [row for row in own if row["seed"] == 0]
            if not first:
                continue
            rate = max(first, key=lambda row: float(row["validation"]))["lr"]
            own = [row for row in own if row["lr"] == rate]
            before = [row["before"] for row in own if row["before"] is not None]
            cells.append(
                [
                    _NETWORKS[network],
                    _PARTS[part],
                    _GIVEN[network] if method == "given" else name,
                    str(len(own)),
                    f"{rate:g}",
                    shown(before) if before else "",
                    shown([(row["test"] + row["validation"]) / 2 for row in own]),
                    shown([row["train"] for row in own]),
                    f"{own[0]['params']:,}",
                    f"{own[0]['macs'] / 1e3:,.0f}",
                    f"{sum(row['cpu_seconds'] for row in own) / len(own):.0f}",
                ]
            )
    return header, cells
