"""Charts as inline SVG: bars, histograms of probabilities, a scatter of runs, samples in order. No scripts."""

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


def bar(value: float, most: float, label: str) -> str:
    """One bar, out of `most`."""
    wide = 100 * value / most if most > 0 else 0.0
    return (
        f'<svg class="bars" viewBox="0 0 100 8" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}"><rect class="now" width="{wide:.2f}" height="8"/></svg>'
    )


# Of the chart of samples in order: width, height, and what is kept free for text on the left and above.
_PLOT, _TALL, _LEFT, _TOP = 400, 150, 72, 24


def ordered(
    title: str, bins: Sequence[tuple[float, float, float]], mark: float, labels: tuple[str, str]
) -> str:
    """A value of samples that stand in an order: its median, in a band, and a line where they are parted.

    Args:
        title: below the chart.
        bins: lower end, median and upper end of the band, from the first samples to the last.
        mark: share of the samples in front of the line.
        labels: of the axis below, and of the line.
    """
    wide, bottom = _PLOT - _LEFT - 8, _TOP + _TALL
    top = max((high for _, _, high in bins), default=0.0) or 1.0
    step = wide / max(len(bins), 1)

    def line(column: int) -> list[str]:
        return [
            f"{_LEFT + step * (index + 0.5):.1f},{bottom - _TALL * values[column] / top:.1f}"
            for index, values in enumerate(bins)
        ]

    place = _LEFT + wide * mark
    anchor = "start" if mark < 0.5 else "end"
    ticks = "".join(
        f'<text x="{_LEFT + wide * part:.1f}" y="{bottom + 16}" text-anchor="{side}">{part:.0%}</text>'
        for part, side in ((0.0, "start"), (0.5, "middle"), (1.0, "end"))
    )
    ticks += "".join(
        f'<text x="{_LEFT - 6}" y="{height}" text-anchor="end">{value:.3g}</text>'
        for value, height in ((0.0, bottom), (top, _TOP + 8))
    )
    band = " ".join([*line(0), *reversed(line(2))])
    return (
        f'<figure><svg class="plot" viewBox="0 0 {_PLOT} {bottom + 38}" role="img" '
        f'aria-label="{escape(title)}"><polygon class="was" points="{band}"/>'
        f'<polyline class="median" points="{" ".join(line(1))}"/>'
        f'<line class="axis" x1="{_LEFT}" x2="{_LEFT + wide}" y1="{bottom}" y2="{bottom}"/>'
        f'<line class="axis" x1="{_LEFT}" x2="{_LEFT}" y1="{_TOP}" y2="{bottom}"/>'
        f'<line class="mark" x1="{place:.1f}" x2="{place:.1f}" y1="{_TOP}" y2="{bottom}"/>'
        f'<text x="{place:.1f}" y="{_TOP - 8}" text-anchor="{anchor}">{escape(labels[1])}</text>{ticks}'
        f'<text x="{_LEFT + wide / 2:.1f}" y="{bottom + 33}" text-anchor="middle">{escape(labels[0])}</text>'
        f"</svg><figcaption>{escape(title)}</figcaption></figure>"
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
