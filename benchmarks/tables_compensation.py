"""The table of `quality.py --schedule cut`: what is left right after a cut, without any training."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any


Row = Mapping[str, Any]
_NAMES = {
    "dense": "the dense network",
    "score-fisher": "ours, one-shot Fisher",
    "score-fisher-correlated": "the same widths, channels chosen together (benchmark only)",
    "tp-l2": "Torch-Pruning L2",
    "tp-taylor": "Torch-Pruning Taylor",
    "random": "random channels",
}


def cells(
    rows: Sequence[Row], shown: Callable[[Sequence[float]], str]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: test accuracy bare, recalibrated and compensated, per network, budget and mask.

    Args:
        rows: of the result files.
        shown: writes a mean and its deviation.
    """
    header = ["network", "MACs %", "whose mask", "seeds", "as cut", "batch-norm recalibrated"]
    header += ["compensated", "seconds"]
    found = []
    places = sorted({(row["network"], -row["budget"]) for row in rows})
    for network, budget in places:
        for method, name in _NAMES.items():
            here = [r for r in rows if (r["network"], -r["budget"]) == (network, budget)]
            plain = [r for r in here if r["method"] == method]
            mended = [r for r in here if r["method"] == f"{method}-compensated"]
            own = mended or plain
            if not own:
                continue
            found.append(
                [
                    network,
                    f"{-100 * budget:g}",
                    name,
                    str(len(own)),
                    shown([r["bare_test"] for r in own]),
                    shown([r["cut_test"] for r in plain]) if plain else "",
                    shown([r["cut_test"] for r in mended]) if mended else "",
                    _median(mended),
                ]
            )
    return header, found


def _median(rows: Sequence[Row]) -> str:
    seconds = [r["compensation_seconds"] for r in rows]
    return f"{statistics.median(seconds):.0f}" if seconds else ""


_TRAINED = {
    "score-fisher": "one cut by Fisher scores",
    "score-fisher-compensated": "one cut, compensated",
    "score-fisher-correlated-compensated": "one cut, channels chosen together, compensated",
    "staged-fisher-compensated": "in stages, compensated",
    "score-fisher-compensated+averaged": "one cut, compensated; weights averaged while training",
    "score-fisher-compensated+features": "one cut, compensated; blocks' outputs follow the dense network's",
    "score-fisher-compensated+factored": "one cut, compensated; closed channels' weights kept until the end",
    "tp-l2": "Torch-Pruning, uniform L2",
    "tp-l2-compensated": "Torch-Pruning's uniform L2 mask, compensated by us",
    "ours": "gates that learn",
    "ours-compensated": "gates that learn, then compensated",
    "cut-then-ours": "half of the way in one compensated cut, then gates that learn",
}


def trained(
    rows: Sequence[Row], shown: Callable[[Sequence[float]], str]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: right after the (last) cut and after training, at the rate that validation chose.

    The rate is that with the best validation accuracy of seed 0; other seeds count at that rate alone.
    """
    header = ["network, schedule", "MACs %", "method", "seeds", "learning rate"]
    header += ["right after the cut"]
    header += ["after training"]
    found = []
    places: dict[tuple[str, str, float], list[Row]] = {}
    for row in rows:
        schedule = f"{row['schedule']}, distilled" if row.get("distil") else row["schedule"]
        places.setdefault((row["network"], schedule, -row["budget"]), []).append(row)
    for (network, schedule, budget), there in sorted(places.items(), key=lambda own: own[0]):
        for method, name in _TRAINED.items():
            own = [row for row in there if row["method"] == method]
            first = [r for r in own if r["seed"] == 0]
            if not first:
                continue
            rate = max(first, key=lambda r: r["validation"])["lr"]
            here = [r for r in own if r["lr"] == rate]
            cut, end = ([r[key] for r in here] for key in ("cut_test", "test"))
            told = [f"{network}, {schedule}", f"{-100 * budget:g}", name, str(len(here))]
            found.append([*told, f"{rate:g}", shown(cut), shown(end)])
    return header, found


def cost(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: seconds and memory of compensation."""
    header = ["model", "images of 64x64", "threads", "seconds", "aim", "memory grows by MiB"]
    header += ["both models MiB", "largest input of a layer MiB"]
    sizes = ("peak_growth_mib", "models_mib", "largest_input_mib")
    return header, [
        [
            row["model"],
            str(row["images"]),
            str(row["threads"]),
            f"{row['seconds']:.0f}",
            f"{row['target_seconds']}",
            *(f"{row[size]:,.0f}" for size in sizes),
        ]
        for row in rows
    ]


_PRETRAINED_NETWORKS = {
    "tiny": "CREPE tiny",
    "full": "CREPE full",
    "rnet": "MTCNN R-Net",
    "onet": "MTCNN O-Net",
}
_PRETRAINED = {
    "dense": "as shipped",
    "ours": "`swan.compress`, no labels",
    "ours-uncompensated": "the same without compensation",
    "torch-pruning": "Torch-Pruning, best of four settings",
}


def pretrained(
    rows: Sequence[Row], shown: Callable[[Sequence[float]], str]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: pretrained networks, right after the cut and after the steps that all get alike."""
    header = ["network", "MACs %", "method", "seeds", "right after the cut", "after training"]
    header += [f"ms of {batch}, given -> small" for batch in ("1", "16")]
    found = []
    names = list(_PRETRAINED_NETWORKS)
    for name, share in sorted(
        {(row["network"], row["share"]) for row in rows},
        key=lambda own: (names.index(own[0]), -own[1]),
    ):
        for method, told_as in _PRETRAINED.items():
            key = (name, share, method)
            own = [r for r in rows if (r["network"], r["share"], r["method"]) == key]
            if not own:
                continue
            tuned = [r["tuned"] for r in own if "tuned" in r]
            steps = {r["steps"] for r in own if "tuned" in r}
            told = f"{shown(tuned)} ({max(steps)} steps)" if tuned else ""
            place = [_PRETRAINED_NETWORKS[name], f"{100 * share:g}", told_as, str(len(own))]
            times = [_taken(own, batch) for batch in ("1", "16")]
            found.append([*place, shown([r["cut"] for r in own]), told, *times])
    return header, found


_CURVE = {
    "score-fisher": ("ours, one-shot Fisher, batch-norm recalibrated", "cut_test"),
    "score-fisher-compensated": ("ours, compensated", "cut_test"),
    "tp-l2": ("Torch-Pruning L2, batch-norm recalibrated", "cut_test"),
    "ours-uncompensated": ("ours, no labels, not compensated", "cut"),
    "ours": ("`swan.compress`, no labels", "cut"),
    "torch-pruning": ("Torch-Pruning, best of four settings", "cut"),
}


def curve(
    rows: Sequence[Row], shown: Callable[[Sequence[float]], str]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: accuracy without any training, a column per budget; seconds that the cut took.

    Args:
        rows: of `quality.py --schedule cut` and of `pretrained.py --tune 0`.
        shown: writes a mean and its deviation.
    """
    budgets = sorted({_budget(row) for row in rows}, reverse=True)[1:]  # all but the whole network
    header = ["network", "method", "100 %", *(f"{100 * budget:g} %" for budget in budgets)]
    header.append("seconds")
    found = []
    for network in sorted({row["network"] for row in rows}, reverse=True):
        here = [row for row in rows if row["network"] == network]
        whole = [r.get("test", r.get("cut")) for r in here if r["method"] == "dense"]
        for method, (name, key) in _CURVE.items():
            own = [row for row in here if row["method"] == method]
            if not own:
                continue
            cells = []
            for budget in budgets:
                values = [row[key] for row in own if _budget(row) == budget]
                cells.append(shown(values) if values else "")
            seconds = [r.get("compensation_seconds", r.get("seconds")) for r in own]
            took = [value for value in seconds if value is not None]
            told = _PRETRAINED_NETWORKS.get(network, network)
            median = f"{statistics.median(took):.0f}" if took else ""
            found.append([told, name, shown(whole), *cells, median])
    return header, found


def _budget(row: Row) -> float:
    return float(row.get("budget", row.get("share")))  # type: ignore[arg-type]  # one of them is there


_VIT = {
    "dense": "the dense network",
    "ours": "ours, one-shot Fisher",
    "ours, compensated": "ours, compensated",
    "tp-l2": "Torch-Pruning, uniform L2",
    "tp-taylor": "Torch-Pruning, uniform Taylor",
}


def vit_cut(
    rows: Sequence[Row], shown: Callable[[Sequence[float]], str]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a small Vision Transformer as cut and after training, at the rate that validation chose."""
    header = ["MACs asked for %", "method", "seeds", "MACs %", "learning rate", "as cut"]
    header += ["after training", "seconds of the cut"]
    found = []
    for share in sorted({row["share"] for row in rows}, reverse=True):
        for method, name in _VIT.items():
            own = [row for row in rows if (row["share"], row["method"]) == (share, method)]
            first = [row for row in own if row["seed"] == 0]
            if not first:
                continue
            rate = max(first, key=lambda row: row.get("validation", 0))["lr"]
            here = [row for row in own if row["lr"] == rate]
            after = [row["after"] for row in here if "after" in row]
            found.append(
                [
                    f"{100 * share:g}",
                    name,
                    str(len(here)),
                    f"{100 * statistics.fmean(row['macs_share'] for row in here):.1f}",
                    f"{rate:g}" if after else "",
                    shown([row["before"] for row in here]),
                    shown(after) if after else "",
                    f"{statistics.median(row['cut_seconds'] for row in here):.0f}" if after else "",
                ]
            )
    return header, found


def _taken(rows: Sequence[Row], batch: str) -> str:
    """Of the runs with times, the one with the median ratio."""
    pairs = [row["milliseconds"][batch] for row in rows if batch in row.get("milliseconds", {})]
    if not pairs:
        return ""
    given, small = sorted(pairs, key=lambda pair: pair[1] / pair[0])[len(pairs) // 2]
    return f"{given:.3g} -> {small:.3g}"
