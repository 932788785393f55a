"""The tables of `gpu.py`'s results; a part that was not reached has none."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any


Row = Mapping[str, Any]
Cells = list[list[str]]
_METHODS = {
    "dense": "dense",
    "dense-longer": "dense, trained as long",
    "fisher-compensated": "our Fisher score per MAC, compensated",
    "staged-compensated": "our Fisher score per MAC, compensated, in stages",
    "ours": "gates that learn by curvature",
    "ours-compensated": "gates that learn by curvature, compensated",
    "paper": "soft gates, the paper's penalties",
    "score-fisher": "one-shot by our Fisher score per MAC",
    "tp-l2": "Torch-Pruning, group L2, uniform",
    "tp-l2-compensated": "Torch-Pruning, group L2, uniform, with our compensation",
    "dropout": "dropout, as read from the paper",
}
_TITLES = {
    "figure5": "Test accuracy on CIFAR-10, every method from the same dense network for the same epochs:",
    "longer": "Longer schedules, from pretrained weights:",
}


def rows_of(results: Sequence[Mapping[str, Any]]) -> dict[str, Row]:
    """The rows of all files; later files replace earlier ones."""
    rows: dict[str, Row] = {}
    for result in results:
        rows |= result["rows"]
    return rows


def right_sentence(rows: Mapping[str, Row]) -> str:
    """What was right on the device, in one paragraph; empty where it was not asked."""
    subjects = {k: row for k, row in rows.items() if k.startswith("right/") and k != "right/tests"}
    tests = rows.get("right/tests")
    said = []
    if tests is not None:
        failed = tests.get("failed", {})
        said.append(
            f"Tests on {tests['device']}: {tests['passed']} passed, {len(failed)} failed, "
            f"{tests['skipped']} skipped{': ' + ', '.join(failed) if failed else ''}."
            if "passed" in tests
            else f"Tests on {tests['device']}: not finished."
        )
    for precision in ("float64", "float32", "float32_tf32"):
        own = [row[precision] for row in subjects.values() if precision in row]
        if not own:
            continue
        errors = [max(one["open_error"], one["cut_error"]) for one in own]
        costs = sum(one["hard_macs"] == one["counted_macs"] for one in own)
        bound = own[0]["bound"]
        within = sum(bound is not None and error <= bound for error in errors)
        held = f", {within} within {bound:.0e}" if bound is not None else ""
        said.append(
            f"{precision}: {len(own)} models, worst error {max(errors):.0e}{held}, cost exact on {costs}."
        )
    broken = [key.removeprefix("right/") for key, row in subjects.items() if "fails" in row]
    if broken:
        said.append(f"Fails: {', '.join(broken)}.")
    missed = rows.get("right", {}).get("not_reached", [])
    if missed:
        said.append(f"Not reached: {', '.join(missed)}.")
    return " ".join(said)


def accuracy_cells(rows: Mapping[str, Row], part: str) -> Cells:
    """Per network, budget and method, over its seeds; larger budgets first."""
    groups: dict[tuple[str, float, str, int], list[Row]] = {}
    for row in rows.values():
        if row.get("part") == part:
            where = (row["network"], row["budget"], row["method"], row["epochs"])
            groups.setdefault(where, []).append(row)
    order = list(_METHODS)
    cells = []
    for where in sorted(groups, key=lambda w: (w[0], -w[1], order.index(w[2]), w[3])):
        network, budget, method, epochs = where
        own = groups[where]
        raw = [row["cut_test"] for row in own if "cut_test" in row]
        cells.append(
            [
                network,
                f"{100 * budget:.3g}",
                _METHODS[method],
                str(own[0]["dense_epochs"] if method == "dense" else epochs),
                str(len(own)),
                _mean(raw) if raw else "",
                _mean([row["test"] for row in own]),
                f"{100 * statistics.fmean(row['macs_share'] for row in own):.2f}",
            ]
        )
    return cells


def _mean(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} +- {statistics.stdev(values):.2f}"


def training_cells(rows: Mapping[str, Row]) -> Cells:
    """A training step with gates over one without."""
    return [
        [
            row["model"],
            f"{one['runtime']}, batch {one['batch']}",
            f"{1e3 * one['ungated']['median']:.1f}",
            *(
                _spread(one["ratios"][which]) if which in one["ratios"] else ""
                for which in ("gated", "gated with objective")
            ),
        ]
        for row, one in _measurements(rows, "train", "train-compile")
    ]


def latency_cells(rows: Mapping[str, Row]) -> Cells:
    """Speed-up beside the MACs that are left."""
    return [
        [
            row["model"],
            f"{100 * one['macs_share']:.1f}",
            one["runtime"],
            str(one["batch"]),
            one["dtype"],
            f"{1e3 * one['dense']['median']:.2f}",
            f"{1e3 * one['pruned']['median']:.2f}",
            _spread(one["latency_ratio"]),
            _spread(one["kept"], 2),
        ]
        for row, one in _measurements(rows, "latency", "latency-compile")
    ]


def multiple_cells(rows: Mapping[str, Row]) -> tuple[list[str], Cells]:
    """Milliseconds per MAC at half the MACs, of those at multiples of 1, and the multiple with the fewest."""
    taken: dict[tuple[str, str], dict[int, float]] = {}
    for row, one in _measurements(rows, "multiples"):
        where = (row["model"], f"{one['dtype']}, batch {one['batch']}, {one['runtime']}")
        taken.setdefault(where, {})[one["multiple"]] = one["per_macs"]["median"]
    found = sorted({multiple for own in taken.values() for multiple in own})
    cells = []
    for (model, where), own in taken.items():
        least = own.get(1, math.nan)
        shares = [f"{own[m] / least:.3f}" if m in own else "" for m in found]
        cells.append([model, where, *shares, str(min(own, key=lambda m: own[m]))])
    return [str(multiple) for multiple in found], cells


def _measurements(rows: Mapping[str, Row], *kinds: str) -> list[tuple[Row, Row]]:
    return [
        (row, one)
        for row in rows.values()
        if row.get("part") == "speed" and row["kind"] in kinds
        for one in row["measurements"]
    ]


def _spread(stats: Mapping[str, float], digits: int = 3) -> str:
    median, low, high = (f"{stats[key]:.{digits}f}" for key in ("median", "q1", "q3"))
    return f"{median} [{low}, {high}]"


def source_sentence(results: Sequence[Mapping[str, Any]], rows: Mapping[str, Row]) -> str:
    """Where the numbers come from."""
    where = results[-1]["environment"]
    devices = sorted({str(row["device"]) for row in rows.values() if "part" in row})
    return (
        f"{', '.join(devices) or where['processor']}, torch {where['packages']['torch']}, "
        f"{where['started'][:10]}; `{where['command']}`"
    )


def sections(
    results: Sequence[Mapping[str, Any]],
) -> list[tuple[str, list[str] | None, Cells]]:
    """What the page shows, in order: a sentence alone, or a title with a table's header and rows."""
    rows = rows_of(results)
    accuracy = ["network", "FLOPs asked %", "method", "epochs", "seeds", "right after the cut %"]
    accuracy += ["at the end %", "MACs left %"]
    latency = ["model", "MACs left %", "runtime", "batch", "type", "dense ms", "pruned ms"]
    latency += ["latency ratio", "speed-up / MAC ratio"]
    step = ["model", "step", "ungated ms", "gated", "gated, with objective"]
    found, multiples = multiple_cells(rows)
    tables: list[tuple[str, list[str] | None, Cells]] = [
        *((_TITLES[part], accuracy, accuracy_cells(rows, part)) for part in _TITLES),
        ("A training step with gates over one without, bf16:", step, training_cells(rows)),
        ("Latency of cuts:", latency, latency_cells(rows)),
        (
            "Milliseconds per MAC at half the MACs, of those at multiples of 1:",
            ["model", "widths are multiples of", *found, "fewest"],
            multiples,
        ),
    ]
    shown = [table for table in tables if table[2]]
    said = right_sentence(rows)
    start = [(said, None, [])] if said else []
    return [*start, *shown, (source_sentence(results, rows), None, [])]
