"""Charts as inline SVG: bars of widths, histograms of probabilities, a scatter of runs. No scripts."""

from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray


_BINS = 20
# Width and height of a histogram's drawing area, in SVG units.
_WIDE, _HIGH = 200, 64
# Of a label of the scatter: width that is kept free, and height of a line.
_LABEL, _LINE = 130, 15


def bars(before: int, after: int, most: int) -> str:
    """Two bars on top of each other: what was there, and what is left, out of `most`."""
    old, new = (100 * value / max(most, 1) for value in (before, after))
    return (
        f'<svg class="bars" viewBox="0 0 100 8" preserveAspectRatio="none" role="img" '
        f'aria-label="{after} of {before}">'
        f'<rect class="was" width="{old:.2f}" height="8"/>'
        f'<rect class="now" width="{new:.2f}" height="8"/></svg>'
    )


def histogram(title: str, values: NDArray[np.float64]) -> str:
    """How many gates have which probability, in 20 bins from 0 to 1."""
    counts, _ = np.histogram(values, bins=_BINS, range=(0, 1))
    top = max(int(counts.max(initial=0)), 1)
    step = _WIDE / _BINS
    boxes = "".join(
        f'<rect class="now" x="{index * step + 1:.1f}" y="{_HIGH * (1 - count / top):.1f}" '
        f'width="{step - 2:.1f}" height="{_HIGH * count / top:.1f}"><title>{count} gates with p from '
        f"{index / _BINS:.2f} to {(index + 1) / _BINS:.2f}</title></rect>"
        for index, count in enumerate(counts.tolist())
    )
    return (
        f'<figure><svg viewBox="0 -4 {_WIDE} {_HIGH + 22}" role="img" aria-label="{escape(title)}">'
        f'{boxes}<line class="axis" x1="0" x2="{_WIDE}" y1="{_HIGH}" y2="{_HIGH}"/>'
        f'<text x="0" y="{_HIGH + 14}">0</text>'
        f'<text x="{_WIDE / 2}" y="{_HIGH + 14}" text-anchor="middle">p</text>'
        f'<text x="{_WIDE}" y="{_HIGH + 14}" text-anchor="end">1</text></svg>'
        f"<figcaption>{escape(title)}: {len(values)} gates, largest bar {top}</figcaption></figure>"
    )


def scatter(points: Sequence[tuple[str, float, float]]) -> str:
    """Accuracy over the share of MACs; runs that no other one beats in both are joined by a line."""
    x = np.array([share for _, share, _ in points])
    y = np.array([accuracy for _, _, accuracy in points])
    low, high = float(y.min()), float(y.max())
    room = (high - low or 1) * 0.1
    low, high = low - room, high + room
    wide, tall, left, top = 520, 260, 56, 12

    right = max(1.0, float(x.max()))

    def place(share: float, accuracy: float) -> tuple[float, float]:
        return left + wide * share / right, top + tall * (high - accuracy) / (high - low)

    marks = []
    places = [place(share, accuracy) for _, share, accuracy in points]
    for (name, share, accuracy), (px, py), down in zip(points, places, _apart(places), strict=True):
        label = f"{escape(name)}: {accuracy:.4g} at {share:.1%} of the MACs"
        marks.append(
            f'<circle class="now" cx="{px:.1f}" cy="{py:.1f}" r="5"><title>{label}</title></circle>'
            f'<text x="{px + 9:.1f}" y="{py + 4 + down:.1f}">{escape(name)}</text>'
        )
    front = [
        i for i in range(len(x)) if not any((x <= x[i]) & (y > y[i]) | (x < x[i]) & (y >= y[i]))
    ]
    front.sort(key=lambda i: x[i])
    line = " ".join("{:.1f},{:.1f}".format(*place(x[i], y[i])) for i in front)
    bottom = top + tall
    ticks = "".join(
        f'<text x="{left - 8}" y="{place(0, value)[1] + 4:.1f}" text-anchor="end">{value:.4g}</text>'
        for value in (low + room, high - room)
    )
    ticks += "".join(
        f'<text x="{left + wide * part:.1f}" y="{bottom + 18}" text-anchor="middle">'
        f"{100 * part * right:.0f} %</text>"
        for part in (0.0, 0.25, 0.5, 0.75, 1.0)
    )
    return (
        f'<svg class="scatter" viewBox="0 0 {wide + left + 120} {tall + 60}" role="img" '
        f'aria-label="accuracy over the share of MACs">'
        f'<polyline class="front" points="{line}"/>'
        f'<line class="axis" x1="{left}" x2="{left + wide}" y1="{bottom}" y2="{bottom}"/>'
        f'<line class="axis" x1="{left}" x2="{left}" y1="{top}" y2="{bottom}"/>{ticks}'
        f'<text x="{left + wide}" y="{bottom + 36}" text-anchor="end">share of the MACs</text>'
        f"{''.join(marks)}</svg>"
    )


def _apart(places: Sequence[tuple[float, float]]) -> list[float]:
    """How far down to move the label of each point, so that no label lies on another."""
    taken: list[tuple[float, float]] = []
    found = []
    for px, py in places:
        down = 0.0
        while any(abs(px - x) < _LABEL and abs(py + down - y) < _LINE for x, y in taken):
            down += _LINE
        taken.append((px, py + down))
        found.append(down)
    return found
