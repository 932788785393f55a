"""The tables of `adaptive.py` and `adaptive_accuracy.py`: time and accuracy of widths that look at the input."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any


Result = Mapping[str, Any]
Cells = tuple[list[str], list[list[str]]]
_METHODS = {
    "dense": "the dense network",
    "static": "static cut, one-shot Fisher",
    "static-compensated": "static cut, compensated",
    "static-longer": "static cut, compensated, trained twice as long",
    "nested-block": "nested, per block",
    "uniform-block": "the same model, one width for all",
    "untrained-block": "the same before training",
    "learnt": "nested, per block, trained on under its choices, efforts too",
    "nested-network": "nested, per network",
    "uniform-network": "the same model, one width for all",
    "free": "free units, per block",
    "ftwt": "the same by the strongest activations (FTWT)",
    "fbs": "a fixed share, by saliencies that multiply (FBS)",
}


def speed_cells(
    results: Sequence[Result], spread: Callable[[Mapping[str, float], int], str]
) -> Cells:
    """Per block, batch and share: the time of each variant over the dense block's."""
    header = [
        "block",
        "batch",
        "mean share %",
        "dense ms",
        "static",
        "nested",
        "one width",
        "masked",
    ]
    header += ["nested / static", "their MACs"]
    rows = []
    for result in results:
        for row in result["rows"]:
            over = row["over_dense"]
            rows.append(
                [
                    row["block"],
                    str(row["batch"]),
                    f"{100 * row['share']:g}",
                    f"{row['ms']['dense']:.1f}",
                    *(
                        f"{over[key]['median']:.2f}"
                        for key in ("static", "nested", "uniform", "masked")
                    ),
                    spread(row["over_static"]["nested"], 2),
                    f"{row['macs_over_static']:.2f}",
                ]
            )
    return header, rows


def network_cells(
    results: Sequence[Result], spread: Callable[[Mapping[str, float], int], str]
) -> Cells:
    """Whole networks with one width per input: time over the dense network's, and MACs over time of nested and static."""
    header = ["network", "batch", "mean share %", "dense ms", "static", "nested", "one width"]
    header += ["nested / static", "MACs, static", "MACs, nested", "static: MACs over time"]
    header += ["nested: MACs over time", "in onnxruntime: static", "nested", "nested / static"]
    rows = []
    for result in results:
        for row in result["rows"]:
            over = {key: own["median"] for key, own in row["over_dense"].items()}
            there = row.get("onnxruntime")
            told = ["", "", ""]
            if there is not None:
                told = [f"{there['over_dense'][key]['median']:.2f}" for key in ("static", "nested")]
                told.append(spread(there["over_static"]["nested"], 2))
            rows.append(
                [
                    row["block"],
                    str(row["batch"]),
                    f"{100 * row['share']:g}",
                    f"{row['ms']['dense']:.0f}",
                    *(f"{over[key]:.2f}" for key in ("static", "nested", "uniform")),
                    spread(row["over_static"]["nested"], 2),
                    f"{row['static_macs_share']:.2f}",
                    f"{row['macs_share']:.2f}",
                    f"{row['static_macs_share'] / over['static']:.2f}",
                    f"{row['macs_share'] / over['nested']:.2f}",
                    *told,
                ]
            )
    return header, rows


def training_cells(
    results: Sequence[Result], spread: Callable[[Mapping[str, float], int], str]
) -> Cells:
    """A training step's time over the dense network's."""
    header = ["network", "batch", "dense ms", "nested, two widths a step"]
    rows = [
        [
            row["block"],
            str(row["batch"]),
            f"{row['ms']['dense']:.0f}",
            spread(row["over_dense"]["nested"], 2),
        ]
        for result in results
        for row in result["rows"]
    ]
    return header, rows


def token_cells(
    results: Sequence[Result], spread: Callable[[Mapping[str, float], int], str]
) -> Cells:
    """Feed-forward layers whose tokens run blocks of neurons of their own: time over the dense layer's."""
    header = ["layer", "batch", "neurons in a block", "mean share %", "dense ms"]
    header += ["static", "blocks", "masked", "blocks / static"]
    rows = [
        [
            row["block"],
            str(row["batch"]),
            str(row["size"]),
            f"{100 * row['share']:g}",
            f"{row['ms']['dense']:.1f}",
            *(f"{row['over_dense'][key]['median']:.2f}" for key in ("static", "blocks", "masked")),
            spread(row["over_static"]["blocks"], 2),
        ]
        for result in results
        for row in result["rows"]
    ]
    return header, rows


_TOKENS = {
    "dense": "the dense network",
    "blocks": "blocks of neurons, by token",
    "nested": "nested widths, by image and layer; one model for all three",
    "static": "static cut, one-shot Fisher",
    "static, compensated": "static cut, compensated",
}


def token_accuracy_cells(
    results: Sequence[Result], shown: Callable[[Sequence[float]], str]
) -> Cells:
    """Test accuracy at the MACs that test images cost on average, before and after training."""
    header = ["MACs asked for %", "what", "seeds", "mean MACs %", "as it is %", "after training %"]
    rows = [row for result in results for row in result["rows"].values()]
    found = []
    for share in sorted({row["share"] for row in rows}, reverse=True):
        for method, name in _TOKENS.items():
            own = [row for row in rows if (row["share"], row["method"]) == (share, method)]
            if own:
                after = [row["after"] for row in own if "after" in row]
                found.append(
                    [
                        f"{100 * share:g}",
                        name,
                        str(len(own)),
                        f"{100 * sum(row['macs_share'] for row in own) / len(own):.1f}",
                        shown([row["before"] for row in own]),
                        shown(after) if after else "",
                    ]
                )
    return header, found


def accuracy_cells(results: Sequence[Result], shown: Callable[[Sequence[float]], str]) -> Cells:
    """Per network and method: test accuracy at the MACs that test images cost on average."""
    header = ["network", "what", "asked for or width", "seeds", "mean MACs %", "test accuracy %"]
    header += ["entropy, bits", "rank correlation with the dense loss"]
    rows = [row for result in results for row in result["rows"].values()]
    found = []
    for network in sorted({row["network"] for row in rows}):
        for method, name in _METHODS.items():
            here = [r for r in rows if r["network"] == network and r["method"] == method]
            for budget in sorted({row["budget"] for row in here}, reverse=True):
                own = [row for row in here if row["budget"] == budget]
                entropies = [max(r["entropies"].values()) for r in own if "entropies" in r]
                hard = [r["hardness"] for r in own if r.get("hardness") is not None]
                found.append(
                    [
                        network,
                        name,
                        "" if method == "dense" else f"{budget:g}",
                        str(len(own)),
                        f"{100 * sum(r['macs_share'] for r in own) / len(own):.1f}",
                        shown([r["test"] for r in own]),
                        shown(entropies) if entropies else "",
                        shown(hard) if hard else "",
                    ]
                )
    return header, found
