"""Tables in README.md and TABLES.md, made from the result files.

    python benchmarks/tables.py            # rewrite the tables
    python benchmarks/tables.py --check    # exit code 1 if one is stale or has no results

A table stands between `<!-- table:NAME -->` and `<!-- /table:NAME -->`; NAME is a theme (demo,
latency, overhead, speed, zoo_timm, ...) and stands for all of `results/*_<theme>.json`, oldest first; a later row
for the same thing replaces an earlier one. NAME may be a theme with `_totals`: what its table says in a sentence.
"""

import argparse
import json
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tables_activations
import tables_adaptive
import tables_compensation
import tables_gpu
import tables_routing


ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "docs" / "guide.md",
    ROOT / "benchmarks" / "TABLES.md",
    ROOT / "recipes" / "README.md",
]
MARKED = re.compile(r"(<!-- table:(\w+) -->\n)(.*?)(<!-- /table:\2 -->)", re.DOTALL)
Result = Mapping[str, Any]
Cells = tuple[list[str], list[list[str]]]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; all columns but the first are aligned right."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(stats: Mapping[str, float], digits: int = 3) -> str:
    """`1.021 [1.013, 1.030]`: median and quartiles."""
    median, low, high = (f"{stats[key]:.{digits}f}" for key in ("median", "q1", "q3"))
    return f"{median} [{low}, {high}]"


def source_line(results: Sequence[Result]) -> str:
    """Where the numbers come from."""
    where = results[-1]["environment"]
    packages = where["packages"]
    return (
        f"{where['processor']}, {where['cpus']} cores, torch {packages['torch']}, "
        f"{where['started'][:10]}; `{where['command']}`"
    )


# --- zoo -------------------------------------------------------------------------------------


def cost_is_exact(cut: Mapping[str, Any]) -> bool:
    """Predicted equals counted: MACs as counted in a run, by torch's counter where it runs, and parameters."""
    by_torch = cut["torch_counter_macs"]
    return bool(
        cut["hard_macs"] == cut["counted_macs"]
        and (isinstance(by_torch, str) or by_torch == cut["hard_macs"])
        and cut["predicted_params"] == cut["counted_params"]
    )


def gated_share(ours: Mapping[str, Any]) -> float:
    """Gated output channels of conv and linear layers over all but the model's own outputs, in %."""
    inner = ours["channels"] - ours["output_channels"]
    return 100 * ours["gated_channels"] / inner if inner else 0.0


def zoo_row(name: str, row: Mapping[str, Any]) -> list[str]:
    """One model's cells."""
    ours, peer = row["swan"], row["torch_pruning"]
    verdict = ours["verdict"] + (" (float32)" if ours.get("dtype") == "float32" else "")
    if "cuts" not in ours or "units" not in ours:
        return [name, f"{verdict}: {ours.get('detail', '')}", *[""] * 9, peer_cell(peer)]
    cuts = ours["cuts"]
    exact = "yes" if all(cost_is_exact(cut) for cut in cuts) else "**no**"
    return [
        name,
        verdict,
        str(ours["layers"]),
        str(ours["units"]),
        f"{gated_share(ours):.1f}",
        f"{ours['seconds']['map']['cpu']:.2f}",
        f"{ours['seconds']['swanify']['cpu']:.2f}",
        f"{max((cut['seconds']['cpu'] for cut in cuts), default=0):.2f}",
        f"{ours['peak_gib']:.1f}",
        f"{max((cut['error'] for cut in cuts), default=0):.0e}",
        exact,
        peer_cell(peer),
    ]


def peer_cell(peer: Mapping[str, Any]) -> str:
    """Torch-Pruning's verdict; it may be exact in eval mode and broken in train mode."""
    broken = peer["verdict"] == "exact" and peer.get("trains", "yes") != "yes"
    return peer["verdict"] + (" (train mode raises)" if broken else "")


def zoo_cells(rows: Mapping[str, Any]) -> Cells:
    """Header and rows."""
    header = ["model", "closed equals cut", "layers", "units", "gated %", "map s", "swanify s"]
    header += ["prune s", "peak GiB", "cut error", "cost exact", "Torch-Pruning"]
    return header, [zoo_row(name, rows[name]) for name in sorted(rows)]


def zoo_totals(rows: Mapping[str, Any]) -> str:
    """What the table says, in one paragraph."""
    ours = [row["swan"] for row in rows.values()]
    good = [row for row in ours if row["verdict"] == "exact"]
    cuts = [cut for row in good for cut in row["cuts"]]
    costs = sum(all(cost_is_exact(cut) for cut in row["cuts"]) for row in good)
    errors = [c["error"] for row in good if row["bound"] <= 1e-9 for c in row["cuts"]]
    shares = [gated_share(row) for row in good]
    classified = [gated_share(row) for row in good if row["kind"] == "classification"]
    verdicts = Counter(row["torch_pruning"]["verdict"] for row in rows.values())
    peer = ", ".join(f"{count} {name}" for name, count in verdicts.most_common())
    beside = "" if set(verdicts) == {"not run"} else f" Torch-Pruning on the same models: {peer}."
    of_these = f" (classification {sum(classified) / len(classified):.1f} %)" if classified else ""
    forgotten = sum(row["forgotten_channels"] for row in good)
    return (
        f"{len(rows)} models: closed equals cut on {len(good)} ({len(cuts)} cuts, worst relative "
        f"error in float64 {max(errors, default=0):.0e}), cost exact on {costs}; mean gated share "
        f"{sum(shares) / max(len(shares), 1):.1f} %{of_these}; channels neither gated nor pinned with "
        f"a reason: {forgotten}.{beside}"
    )


def totals_markdown(results: Sequence[Result]) -> str:
    """The totals of a suite or of what is shipped, alone."""
    rows: dict[str, Any] = {}
    for result in results:
        rows |= result["rows"]
    return shipping_totals(rows) if "shipping" in results[-1]["theme"] else zoo_totals(rows)


def zoo_reasons(rows: Mapping[str, Any]) -> str:
    """Why channels are pinned: over all models, the most frequent reasons."""
    channels: Counter[str] = Counter()
    models: Counter[str] = Counter()
    for row in rows.values():
        for reason, count in row["swan"].get("pinned_channels", {}).items():
            channels[reason] += count
            models[reason] += 1
    cells = [
        [reason, str(count), str(models[reason])] for reason, count in channels.most_common(12)
    ]
    return markdown(["pinned because", "channels", "models"], cells) if cells else ""


def zoo_markdown(results: Sequence[Result]) -> str:
    """The table of one suite with its totals and the reasons of its pins."""
    rows: dict[str, Any] = {}
    for result in results:
        rows |= result["rows"]
    parts = [zoo_totals(rows), markdown(*zoo_cells(rows)), zoo_reasons(rows), source_line(results)]
    return "\n\n".join(part for part in parts if part)


# --- the timing benchmarks -------------------------------------------------------------------


def merged(results: Sequence[Result], *keys: str) -> list[Mapping[str, Any]]:
    """All rows; a later one replaces an earlier one with the same keys."""
    found = {
        tuple(row.get(key) for key in keys): row for result in results for row in result["rows"]
    }
    return list(found.values())


def speed_markdown(results: Sequence[Result]) -> str:
    """CPU seconds of map, swanify and prune per model, and the peak of its process's memory."""
    header = ["model", "layers", "map s", "map ms / layer", "swanify s", "swanify ms / layer"]
    header += ["prune s", "prune ms / layer", "GiB with model", "GiB after map", "GiB at most"]
    cells = []
    for row in merged(results, "model"):
        own = [row["model"], str(row["layers"])]
        for what in ("map", "swanify", "prune"):
            # Files of before prune was measured have two of the three.
            seconds = row.get(what, {}).get("cpu")
            share = f"{1e3 * seconds['median'] / row['layers']:.1f}" if seconds else ""
            own += [spread(seconds, 2) if seconds else "", share]
        gib = row.get("gib", {})
        own += [f"{gib[key]:.2f}" if gib else "" for key in ("built", "map", "all")]
        cells.append(own)
    slopes = ", ".join(f"{what} {slope:.2f}" for what, slope in results[-1]["slopes"].items())
    said = f"Slope of log time over log layers (1 is linear): {slopes}."
    return f"{markdown(header, cells)}\n\n{said}\n\n{source_line(results)}"


def planning_markdown(results: Sequence[Result]) -> str:
    """Seconds and memory of mapping models that exist on `meta` alone."""
    header = ["model", "parameters", "layers", "units", "gated %", "wall s", "CPU s"]
    header += ["GiB before the map", "GiB at most"]
    cells = [
        [
            row["model"],
            f"{row['params'] / 1e9:.1f} billion",
            str(row["layers"]),
            f"{row['units']:,}",
            f"{row['gated_percent']:.2f}",
            *(spread(row[key], 1) for key in ("wall_seconds", "cpu_seconds")),
            *(f"{row[key]['median']:.2f}" for key in ("before_gib", "peak_gib")),
        ]
        for row in merged(results, "model")
    ]
    return f"{markdown(header, cells)}\n\n{source_line(results)}"


_VIT = {
    "dense_start": "dense, where both start",
    "dense": "dense, trained as long",
    "pruned": "pruned, right after the cut",
    "finetuned": "pruned, fine-tuned",
}


def vit_markdown(results: Sequence[Result]) -> str:
    """Losses, accuracies and MACs of the vision transformer recipe, per data set."""
    header = [
        "data",
        "seeds",
        "network",
        "train loss",
        "test loss",
        "test accuracy %",
        "MACs left %",
    ]
    cells = []
    for row in merged(results, "data", "num_train"):
        left = [result["macs_left"] for result in row["results"]]
        for stage, text in _VIT.items():
            own = row["summary"][stage]
            scores = [
                f"{own[key]['mean']:.{digits}f}"
                + ("" if own[key]["stdev"] is None else f" +- {own[key]['stdev']:.{digits}f}")
                for key, digits in (("train_loss", 3), ("test_loss", 3), ("test_accuracy", 2))
            ]
            share = 100.0 if stage.startswith("dense") else 100 * sum(left) / len(left)
            data = f"{row['data']}, {row['num_train']:,} images"
            cells.append([data, str(len(left)), text, *scores, f"{share:.1f}"])
    return f"{markdown(header, cells)}\n\n{source_line(results)}"


def overhead_markdown(results: Sequence[Result]) -> str:
    """Training-step time of gated models over ungated ones."""
    header = ["model", "gates", "ungated step s", "folded", "explicit multiply"]
    header += ["folded, with optimizer", "explicit, with optimizer"]
    cells = [
        [
            row["model"],
            row["mode"],
            spread(row["ungated_step_seconds"]),
            *(spread(row["ratios"][key]) for key in _OVERHEADS),
        ]
        for row in merged(results, "model", "mode")
    ]
    return f"{markdown(header, cells)}\n\n{source_line(results)}"


def launches_markdown(results: Sequence[Result]) -> str:
    """Operations of a training step, and how many of them are the gates'."""
    header = ["model", "gates", "ungated", "gated", "with objective", "added"]
    cells = [
        [
            row["model"],
            "in place" if row["in_place"] else "in the graph",
            *(str(row[key]) for key in ("ungated", "gated", "with_objective")),
            str(row["with_objective"] - row["ungated"]),
        ]
        for row in merged(results, "model")
    ]
    return f"{markdown(header, cells)}\n\n{source_line(results)}"


_OVERHEADS = ("folded", "explicit", "folded_with_optimizer", "explicit_with_optimizer")


def latency_markdown(results: Sequence[Result]) -> str:
    """Speed-up beside the MACs that are left, and the multiples that were measured."""
    header = ["model", "MACs left %", "runtime", "batch", "threads", "dense ms", "pruned ms"]
    header += ["latency ratio", "speed-up / MAC ratio", "parameters left %"]
    every = [row for row in merged(results, *_LATENCY) if "kept" in row]
    rows = [row for row in every if row["budget"].startswith("macs")]
    cells = [
        [
            row["model"],
            f"{100 * row['macs_ratio']:.1f}",
            row["runtime"],
            str(row["batch"]),
            str(row["threads"]),
            f"{1e3 * row['dense']['median']:.1f}",
            f"{1e3 * row['pruned']['median']:.1f}",
            spread(row["latency_ratio"]),
            spread(row["kept"], 2),
            f"{100 * row['params_ratio']:.1f}",
        ]
        for row in rows
    ]
    multiples = {row["model"]: (row["multiples"], row["round_to"]) for row in rows}
    found = sorted({int(m) for own, _ in multiples.values() for m in own})
    per_mac = [
        [name, *(milliseconds_per_mac(own, str(m)) for m in found), str(best)]
        for name, (own, best) in multiples.items()
    ]
    said = "Milliseconds per MAC at half the MACs, of those at multiples of 1 (`round_to=1`):"
    timed = [
        [row["model"], "50", spread({k: 100 * v for k, v in row["latency_ratio"].items()}, 1)]
        for row in every
        if row["budget"].startswith("latency")
    ]
    tables = (
        markdown(header, cells),
        "Budgets in milliseconds (eager, batch 1), in % of the dense network's time:",
        markdown(["model", "asked for", "measured"], timed),
        said,
        markdown(["widths are multiples of", *map(str, found), "taken"], per_mac),
        source_line(results),
    )
    return "\n\n".join(tables)


def milliseconds_per_mac(multiples: Mapping[str, Mapping[str, float]], which: str) -> str:
    """Relative to the least multiple measured; empty where widths are no such multiples."""
    per_mac = {m: own["milliseconds"] / own["macs_share"] for m, own in multiples.items()}
    least = min(per_mac, key=int, default="")
    return f"{per_mac[which] / per_mac[least]:.3f}" if which in per_mac else ""


_LATENCY = ("model", "budget", "runtime", "batch", "threads")


def shipping_cells(rows: Mapping[str, Any]) -> Cells:
    """Per model: size of its file, whether it came back bitwise, and its exports."""
    header = [
        "model",
        "parameters left %",
        "file MB",
        "over the weights %",
        "over plain safetensors %",
        "load s",
        "loaded",
    ]
    header += ["ONNX", "torch.export"]
    cells = []
    for name, row in rows.items():
        if "file_bytes" not in row:
            cells.append([name, *[""] * 5, row.get("detail", "fails"), "", ""])
            continue
        over = row["file_bytes"] / row["weight_bytes"] - 1
        is_same = row["bitwise"] and row["same_class"]
        cells.append(
            [
                f"{name} ({row['suite']})",
                f"{100 * row['pruned_params'] / row['params']:.1f}",
                f"{row['file_bytes'] / 1e6:.1f}",
                f"{100 * over:.2f}",
                f"{100 * (row['file_bytes'] / row['plain_bytes'] - 1):.2f}",
                f"{row['load_seconds']:.2f}",
                "bitwise" if is_same else "**differs**",
                *(export_cell(row.get(suffix, {})) for suffix in (".onnx", ".pt2")),
            ]
        )
    return header, cells


def export_cell(facts: Mapping[str, Any]) -> str:
    """Its error; refusals are told below the table."""
    if "relative_error" not in facts:
        return "refused"
    fixed = "" if len(facts["batches"]) > 1 else ", fixed batch"
    return f"{facts['relative_error']:.0e}{fixed}"


def shipping_totals(rows: Mapping[str, Any]) -> str:
    """What the table says, in one sentence."""
    good = [row for row in rows.values() if "file_bytes" in row]
    same = sum(row["bitwise"] and row["same_class"] for row in good)
    over = {
        base: max((row["file_bytes"] / row[f"{base}_bytes"] - 1 for row in good), default=0)
        for base in ("weight", "plain")
    }
    within = sum(row["file_bytes"] <= 1.01 * row["weight_bytes"] for row in good)
    said = (
        f"{len(rows)} models: {same} come back bitwise; {within} files are within 1 % of the bytes of "
        f"the weights, the others up to {100 * over['weight']:.2f} % (small models: safetensors' own table "
        f"of names); over a plain safetensors file of the same weights at most {100 * over['plain']:.2f} %"
    )
    for suffix, text in _EXPORTS.items():
        errors = [row[suffix]["relative_error"] for row in good if "refused" not in row[suffix]]
        said += (
            f"; {len(errors)} export to {text}, worst relative error {max(errors, default=0):.0e}"
        )
    return f"{said}."


_EXPORTS = {".onnx": "ONNX", ".pt2": "torch.export"}


def refused_too(facts: Mapping[str, Any]) -> str:
    """Whether the cut is to blame."""
    return " (the dense model as well)" if facts.get("dense_refused") else " (not the dense model)"


def shipping_markdown(results: Sequence[Result]) -> str:
    """The table, its totals, and what could not be exported and why."""
    rows: dict[str, Any] = {}
    for result in results:
        rows |= result["rows"]
    reasons = [
        f"- {name}, {text}{refused_too(row[suffix])}: {row[suffix]['refused']}"
        for suffix, text in _EXPORTS.items()
        for name, row in rows.items()
        if "refused" in row.get(suffix, {})
    ]
    refused = "Refused, nothing was written:\n\n" + "\n".join(reasons) if reasons else ""
    cells = markdown(*shipping_cells(rows))
    parts = [shipping_totals(rows), cells, refused, source_line(results)]
    return "\n\n".join(part for part in parts if part)


METHODS = {
    "dense_start": "dense, where all begin",
    "dense": "dense, trained as long",
    "one_shot_cut": "one-shot by magnitude, right after the cut",
    "one_shot": "one-shot by magnitude, fine-tuned",
    "swan_hard": "SWAN, hard gates",
    "swan_cut": "SWAN, right after the cut",
    "swan": "SWAN, fine-tuned",
}


def demo_markdown(results: Sequence[Result]) -> str:
    """Test accuracy and MACs of every network of the demo; the newest result alone."""
    study = results[-1]["study"]
    header = ["network", "test accuracy %", "MMACs per image", "MACs left %"]
    cells = [
        [
            METHODS.get(method, method),
            f"{row['test_mean']:.2f} +- {row['test_stdev']:.2f}",
            f"{row['macs_mean'] / 1e6:.3f}",
            f"{100 * row['macs_share']:.1f}",
        ]
        for method, row in study["summary"].items()
    ]
    seeds = f"{len(study['results'])} seeds"
    return f"{markdown(header, cells)}\n\n{seeds}; {source_line(results)}"


_QUALITY = {
    "dense": "dense, trained as long",
    "ours": "gates that learn by curvature (default)",
    "ours-additive": "gates that learn by curvature, additive scores",
    "ours-gradient": "gates that learn by the gradient",
    "hard-concrete": "gates that learn by the gradient, hard-concrete samples",
    "annealed": "gates that learn by the gradient, soft, annealed",
    "normalised": "gates that learn by the gradient, normalised steps",
    "paper": "soft gates, the paper's penalties",
    "score-fisher": "one-shot by our Fisher score per MAC",
    "score-fisher-additive": "one-shot by our Fisher score per MAC, additive",
    "score-magnitude": "one-shot by magnitude per MAC",
    "score-fisher-compensated": "one-shot by our Fisher score, compensated",
    "tp-l2-compensated": "Torch-Pruning's L2 mask as units, compensated",
    "tp-taylor-compensated": "Torch-Pruning's Taylor mask as units, compensated",
    "random-compensated": "random channels, compensated",
    "score-magnitude-additive": "one-shot by magnitude per MAC, additive",
    "tp-l2": "Torch-Pruning, group L2",
    "tp-taylor": "Torch-Pruning, group Taylor",
    "tp-bn-sparse": "Torch-Pruning, batch-norm scales with sparse training",
    "tp-l2-global": "Torch-Pruning, group L2, global ranking",
    "tp-taylor-global": "Torch-Pruning, group Taylor, global ranking",
    "tp-bn-sparse-global": "Torch-Pruning, batch-norm scales, sparse training, global",
    "random": "random channels",
    "random-per-cost": "random channels, ranked per MAC: dear layers close first",
    "thin": "uniformly thinner, from scratch, trained as long",
}


Comparison = tuple[str, str, float, bool]  # network, schedule, share of the MACs, distilled


def quality_rows(results: Sequence[Result]) -> list[Mapping[str, Any]]:
    """The rows of all files; later files replace earlier ones."""
    rows: dict[str, Mapping[str, Any]] = {}
    for result in results:
        rows |= result["rows"]
    return list(rows.values())


def chosen_runs(
    rows: Iterable[Mapping[str, Any]],
) -> dict[tuple[Comparison, str], list[Mapping[str, Any]]]:
    """The seeds of each method: at the learning rate that validation accuracy chose, of several."""
    groups: dict[tuple[Comparison, str, float], list[Mapping[str, Any]]] = {}
    for row in rows:
        where = (row["network"], row["schedule"], row["budget"], row["distil"])
        groups.setdefault((where, row["method"], row["lr"]), []).append(row)
    best: dict[tuple[Comparison, str], list[Mapping[str, Any]]] = {}
    for (where, method, _), own in groups.items():
        known = best.get((where, method), [])
        ahead = (len(own), statistics.fmean(r["validation"] for r in own))
        if not known or ahead > (len(known), statistics.fmean(r["validation"] for r in known)):
            best[where, method] = own
    return best


def by_comparison(where: Comparison) -> tuple[str, str, float, bool]:
    """Networks and schedules by name, larger budgets first."""
    return (where[0], where[1], -where[2], where[3])


def quality_totals_markdown(results: Sequence[Result]) -> str:
    """Test accuracy at the end: gates, our one-shot score, the best of Torch-Pruning, side by side."""
    runs = chosen_runs(quality_rows(results))
    header = ["network, schedule", "dense", "MACs %", "distilled", "gates that learn"]
    header += ["one-shot Fisher", "Torch-Pruning's best", "thinner, trained as long"]
    cells = []
    for where in sorted({where for where, _ in runs}, key=by_comparison):
        network, schedule, budget, distil = where
        ours = _ends(runs, where, "ours")
        if not ours:
            continue
        one_shot = _ends(runs, where, "score-fisher")
        peers = {method: _ends(runs, where, method) for method in _PEERS}
        peers = {method: values for method, values in peers.items() if len(values) > 2}
        peer = max(peers, key=lambda method: statistics.fmean(peers[method]), default=None)
        dense = _ends(runs, (network, schedule, 1.0, False), "dense")
        thin = _ends(runs, where, "thin")
        cells.append(
            [
                f"{network}, {schedule}",
                mean_and_deviation(dense) if dense else "",
                f"{100 * budget:g}",
                "yes" if distil else "no",
                mean_and_deviation(ours),
                mean_and_deviation(one_shot) if one_shot else "",
                f"{mean_and_deviation(peers[peer])} ({_PEERS[peer]})" if peer else "",
                mean_and_deviation(thin) if len(thin) > 2 else "",
            ]
        )
    return f"{markdown(header, cells)}\n\n{_quality_source(results)}"


_PEERS = {"tp-l2": "L2", "tp-taylor": "Taylor", "tp-bn-sparse": "batch-norm scales"}


def _ends(
    runs: Mapping[tuple[Comparison, str], Sequence[Mapping[str, Any]]],
    where: Comparison,
    method: str,
) -> list[float]:
    return [row["test"] for row in runs.get((where, method), [])]


def quality_markdown(results: Sequence[Result]) -> str:
    """Test accuracy after the cut and at the end per network, schedule, budget and method."""
    runs = chosen_runs(quality_rows(results))
    header = ["network, schedule", "MACs %", "method", "distilled", "seeds", "after the cut %"]
    header += ["at the end %", "MACs left %"]
    cells = []
    order = list(_QUALITY)
    for name in sorted(runs, key=lambda n: (by_comparison(n[0]), order.index(n[1]))):
        (network, schedule, budget, distil), method = name
        own = runs[name]
        cells.append(
            [
                f"{network}, {schedule}",
                f"{100 * budget:g}",
                _QUALITY[method],
                "yes" if distil else "no",
                str(len(own)),
                mean_and_deviation([row["cut_test"] for row in own]),
                mean_and_deviation([row["test"] for row in own]),
                f"{100 * statistics.fmean(row['macs_share'] for row in own):.2f}",
            ]
        )
    return f"{markdown(header, cells)}\n\n{_quality_source(results)}"


def _quality_source(results: Sequence[Result]) -> str:
    rows = quality_rows(results)
    devices = sorted({str(row["device"]) for row in rows})
    days = [str(row["date"]) for row in rows]
    where = results[-1]["environment"]
    return (
        f"{', '.join(devices)}, {where['cpus']} cores, torch {where['packages']['torch']}, "
        f"{' to '.join(sorted({min(days), max(days)}))}; a row by `python benchmarks/quality.py "
        "--data CIFAR10 --pretrained RESNETS --network resnet20 --schedule short --methods ours "
        "--budgets 0.5 --distil no --seeds 0 1 2`"
    )


def mean_and_deviation(values: Sequence[float]) -> str:
    """`70.12 +- 0.34`; one value alone has no deviation."""
    mean = f"{statistics.fmean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} +- {statistics.stdev(values):.2f}"


def all_rows(results: Sequence[Result]) -> list[Any]:
    """Of all files."""
    return [row for result in results for row in result["rows"].values()]


def plain(
    cells: Callable[..., Cells],
    rows: Callable[[Sequence[Result]], Any] = lambda results: results,
    shown: Callable[..., str] = mean_and_deviation,
) -> Callable[[Sequence[Result]], str]:
    """A table of what `cells` makes of the rows and where they come from; numbers are `shown` with their spread."""

    def made(results: Sequence[Result]) -> str:
        return f"{markdown(*cells(rows(results), shown))}\n\n{source_line(results)}"

    return made


def compensation_cost_markdown(results: Sequence[Result]) -> str:
    """Seconds and memory of compensation."""
    header, cells = tables_compensation.cost(all_rows(results))
    return f"{markdown(header, cells)}\n\n{source_line(results)}"


def routing_certificates_markdown(results: Sequence[Result]) -> str:
    """Certificates of harm on resampled calibration sets."""
    header, cells = tables_routing.certificates(results)
    return f"{markdown(header, cells)}\n\n{source_line(results)}"


def gated_compression_markdown(results: Sequence[Result]) -> str:
    """Negatives that end at a switch: per data and way of training, over digits and seeds."""
    cells: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for result in results:
        for key, rows in result["rows"].items():
            for how, row in rows.items():
                cells.setdefault((key.split("/")[0], how), []).append(row)
    columns = {
        "accuracy %": "test",
        "of the digit %": "recall",
        "negatives stopped %": "negatives_stopped",
        "positives stopped %": "positives_stopped",
        "harm %": "harm",
    }
    header = ["data", "what", "runs", *columns, "largest harm %", "mean MACs %"]
    lines = []
    for (data, how), own in cells.items():
        shown = [
            mean_and_deviation([row[key] for row in own]) if key in own[0] else ""
            for key in columns.values()
        ]
        most = f"{max(row['harm'] for row in own):.2f}" if "harm" in own[0] else ""
        macs = mean_and_deviation([100 * row["macs"] for row in own])
        lines.append([data, how, str(len(own)), *shown, most, macs])
    return f"{markdown(header, lines)}\n\n{source_line(results)}"


def activations_markdown(results: Sequence[Result]) -> str:
    """Other activations: identity at the start, sizes, times."""
    rows = [row for result in results for row in result["rows"]]
    parts = []
    for said, cells in tables_activations.sections(rows):
        parts += [said] if cells is None else [said, markdown(*cells)]
    return "\n\n".join([*parts, source_line(results)])


def activations_training_markdown(results: Sequence[Result]) -> str:
    """Other activations trained from scratch."""
    rows = [row for result in results for row in result["rows"].values()]
    header, cells = tables_activations.training(rows, mean_and_deviation)
    return f"{markdown(header, cells)}\n\n{source_line(results)}"


def gpu_markdown(results: Sequence[Result]) -> str:
    """The tables of every part of `gpu.py` that has results."""
    parts = []
    for said, header, cells in tables_gpu.sections(results):
        parts += [said] if header is None else [said, markdown(header, cells)]
    return "\n\n".join(parts)


TABLES: Mapping[str, Callable[[Sequence[Result]], str]] = {
    "adaptive": plain(tables_adaptive.speed_cells, shown=spread),
    "adaptive_accuracy": plain(tables_adaptive.accuracy_cells),
    "adaptive_tokens_accuracy": plain(tables_adaptive.token_accuracy_cells),
    "adaptive_blocks": plain(tables_adaptive.token_cells, shown=spread),
    "adaptive_network": plain(tables_adaptive.network_cells, shown=spread),
    "adaptive_training": plain(tables_adaptive.training_cells, shown=spread),
    "activations": activations_markdown,
    "activations_training": activations_training_markdown,
    "audio": plain(tables_routing.audio_cells),
    "compensation": plain(tables_compensation.cells, quality_rows),
    "compensation_cost": compensation_cost_markdown,
    "curve": plain(tables_compensation.curve, all_rows),
    "demo": demo_markdown,
    "gated_compression": gated_compression_markdown,
    "pretrained": plain(tables_compensation.pretrained, all_rows),
    "stages": plain(tables_compensation.trained, quality_rows),
    "gpu": gpu_markdown,
    "latency": latency_markdown,
    "launches": launches_markdown,
    "overhead": overhead_markdown,
    "planning": planning_markdown,
    "quality": quality_markdown,
    "routing": plain(tables_routing.cells),
    "routing_totals": routing_certificates_markdown,
    "quality_totals": quality_totals_markdown,
    "shipping": shipping_markdown,
    "shipping_totals": totals_markdown,
    "speed": speed_markdown,
    "vit": vit_markdown,
    "vit_cut": plain(tables_compensation.vit_cut, all_rows),
    "zoo_libraries": zoo_markdown,
    "zoo_libraries_totals": totals_markdown,
    "zoo_timm": zoo_markdown,
    "zoo_timm_totals": totals_markdown,
    "zoo_torchvision": zoo_markdown,
    "zoo_torchvision_totals": totals_markdown,
    "zoo_transformers": zoo_markdown,
    "zoo_transformers_totals": totals_markdown,
}


# --- README ----------------------------------------------------------------------------------


def load(folder: Path, theme: str) -> list[Result]:
    """All results of a theme, oldest first."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"*_{theme}.json"))]


def renewed(text: str, folder: Path) -> str:
    """README text with every marked table made anew.

    Raises:
        LookupError: an unknown table, or one without results.
    """

    def table(match: re.Match[str]) -> str:
        name = match[2]
        if name not in TABLES:
            raise LookupError(f"there is a table {name!r}; known are {sorted(TABLES)}")
        results = load(folder, name.removesuffix("_totals"))
        if not results:
            raise LookupError(f"no results for table {name!r} in {folder}")
        return f"{match[1]}\n{TABLES[name](results)}\n\n{match[4]}"

    return MARKED.sub(table, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; 1 if a table is stale"
    )
    parser.add_argument("--pages", type=Path, nargs="+", default=PAGES)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    texts = {page: page.read_text() for page in options.pages}
    try:
        new = {page: renewed(text, options.results) for page, text in texts.items()}
    except LookupError as err:
        print(err, file=sys.stderr)
        return 1
    stale = [page for page in texts if new[page] != texts[page]]
    for page in stale:
        if options.check:
            print(f"tables in {page} are stale; run: python benchmarks/tables.py")
        else:
            page.write_text(new[page])
            print(f"tables in {page} rewritten")
    if not stale:
        print("tables are up to date")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
