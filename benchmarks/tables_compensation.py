"""The table of `quality.py --schedule cut`: what is left right after a cut, without any training."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any


Row = Mapping[str, Any]
_NAMES = {
    "dense": "the dense network",
    "score-fisher": "ours, one-shot Fisher",
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
