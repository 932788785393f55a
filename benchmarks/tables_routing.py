"""The table of `routing.py`: accuracy over mean MACs and milliseconds, for every way of deciding and for static cuts."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any


Rows = Mapping[str, Mapping[str, Any]]  # of one seed, by name
# What `recipes/route_audio.py` tells: the paper's figure, and what it is of one kind of segments.
_HEARD: tuple[tuple[str, str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("on the light path %", "80 / 30", lambda own: f"{100 * own['light_share']:.1f}"),
    ("latency saved %", "26.5 / 9.9", lambda own: f"{100 * own['latency_saving']:.1f}"),
    (
        "mixed over full, spectral distance %",
        "(aim: 1)",
        lambda own: (
            f"{100 * (own['mixed_spectral_distance'] / own['full_spectral_distance'] - 1):+.1f}"
        ),
    ),
    (
        "mixed / full, SI-SDR dB",
        "",
        lambda own: f"{own['mixed_si_sdr_db']:.2f} / {own['full_si_sdr_db']:.2f}",
    ),
    (
        "mixed / full, ViSQOL",
        "4.30 / 4.30",
        lambda own: f"{own['mixed_visqol']:.3f} / {own['full_visqol']:.3f}",
    ),
    (
        "mixed / full, ViSQOL's similarity",
        "",
        lambda own: f"{own['mixed_similarity']:.3f} / {own['full_similarity']:.3f}",
    ),
)
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
        place = [f"{network}, {after}, {_branch(light)}", epochs]
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
            place = [f"{network}, {after}, {_branch(light)}", epochs, seed]
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


def _branch(light: str) -> str:
    return "an early exit" if light == "exit" else f"{100 * float(light):g} % of the rest"


def _names(seeds: Sequence[Rows]) -> list[tuple[str, str]]:
    names = {name for rows in seeds for name, row in rows.items() if "test" in row}
    whole = {
        "dense": "the dense network",
        "full": "the full branch for all",
        "light": "the light branch for all",
        "auto/harm": "switched as `auto` found, harm at most 1 %",
    }
    found = [(name, told) for name, told in whole.items() if name in names]
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


def audio_cells(
    results: Sequence[Mapping[str, Any]],
    shown: Callable[[Sequence[float]], str],  # noqa: ARG001 - seed by seed
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: figures of `recipes/route_audio.py`, seed by seed, beside the paper's Table 1."""
    runs = [own for result in results for own in result["rows"].values()]
    seeds = ", ".join(str(own["settings"]["seed"]) for own in runs)
    header = [f"seeds {seeds}", "paper, silence / speech", "here, silence", "here, speech"]
    rows = []
    for name, paper, tell in _HEARD:
        told = ["", ""]
        for place, kind in enumerate(("silence", "speech")):
            try:
                told[place] = ", ".join(tell(own[kind]) for own in runs)
            except KeyError:  # ViSQOL hears speech alone
                told[place] = ""
        rows.append([name, paper, *told])
    for name, paper, key in (
        ("light encoder: times fewer MACs", "12.3", "light_fewer_macs"),
        ("light encoder: times fewer parameters", "20.9", "light_fewer_params"),
    ):
        rows.append([name, paper, ", ".join(f"{own[key]:.1f}" for own in runs), "the same"])
    return header, rows
