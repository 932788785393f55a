"""The table of `routing.py`: accuracy over mean MACs and milliseconds, for every way of deciding and for static cuts."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any


Rows = Mapping[str, Mapping[str, Any]]  # of one seed, by name
_WAYS = {
    "static": "a static cut",
    "margin": "switched by the light branch's own margin",
    "predicted": "switched by a prediction",
    "random": "switched at random",
    "oracle": "switched by an oracle",
}


def cells(
    results: Sequence[Mapping[str, Any]], shown: Callable[[Sequence[float]], str]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: per setting and target; milliseconds are CPU time per image over the dense network's.

    Args:
        results: of the result files.
        shown: writes a mean and its deviation.
    """
    header = ["network, switch behind, light branch", "epochs", "what", "seeds", "mean MACs %"]
    header += ["test accuracy %", "time over dense, batch 1", "batch 8", "batch 32"]
    settings: dict[str, list[Rows]] = {}
    for result in results:
        for key, rows in result["rows"].items():
            settings.setdefault(key.rpartition("/")[0], []).append(rows)
    found = []
    for setting, seeds in sorted(settings.items()):
        network, after, light, epochs = setting.split("/")
        place = [f"{network}, {after}, {100 * float(light):g} % of the rest", epochs]
        for name, told in _names(seeds):
            own = [rows[name] for rows in seeds if name in rows]
            share = f"{100 * statistics.fmean(row['macs'] for row in own):.1f}"
            times = [_over_dense(seeds, name, batch) for batch in ("1", "8", "32")]
            found.append(
                [*place, told, str(len(own)), share, shown([row["test"] for row in own]), *times]
            )
    return header, found


def certificates(results: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: how many of the resampled certificates did not hold."""
    header = ["network, switch behind, light branch", "epochs", "seed", "decided by"]
    header += [
        "broken, harm known",
        "broken, on the other half",
        "of",
        "mean share %",
        "worst harm %",
    ]
    found = []
    for result in results:
        for key, rows in sorted(result["rows"].items()):
            network, after, light, epochs, seed = key.split("/")
            place = [f"{network}, {after}, {100 * float(light):g} % of the rest", epochs, seed]
            for way, row in rows.get("certificate", {}).items():
                numbers = [str(row[name]) for name in ("drawn", "halves", "of")]
                found.append(
                    [
                        *place,
                        way,
                        *numbers,
                        f"{100 * row['share']:.1f}",
                        f"{100 * row['worst']:.2f}",
                    ]
                )
    return header, found


def _names(seeds: Sequence[Rows]) -> list[tuple[str, str]]:
    names = {name for rows in seeds for name, row in rows.items() if "test" in row}
    found = [("dense", "the dense network"), ("light", "the light branch for all")]
    for target in sorted({name.split("/")[1] for name in names if "/0" in name}, reverse=True):
        found += [
            (f"{way}/{target}", told) for way, told in _WAYS.items() if f"{way}/{target}" in names
        ]
    return found


def _over_dense(seeds: Sequence[Rows], name: str, batch: str) -> str:
    ratios = [
        rows[name]["ms"][batch]["ms_per_image"] / rows["dense"]["ms"][batch]["ms_per_image"]
        for rows in seeds
        if "ms" in rows.get(name, {})
    ]
    return f"{statistics.median(ratios):.2f}" if ratios else ""
