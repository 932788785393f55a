"""Charts as inline SVG: bars, histograms of probabilities, a scatter of runs, samples in order. No scripts."""

from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


_Place = tuple[float, float]
_BINS = 20
# Width and height of a histogram's drawing area, in SVG units.
_WIDE, _HIGH = 200, 64
# The scatter: where its axes stand, how far they reach, how wide all of it is.
_LEFT, _TOP, _RIGHT, _TALL, _ALL = 64, 24, 500, 260, 700
# Of its labels: width of a letter, a wide one, and height of a line.
_LETTER, _LINE = 7.2, 15


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


def scatter(
    points: Sequence[tuple[str, float, float]],
    *,
    quality: str = "accuracy",
    cost: str = "share of the MACs",
) -> str:
    """Quality over the share of a cost; points that no other one beats in both are joined by a line."""
    x = np.array([share for _, share, _ in points])
    y = np.array([value for _, _, value in points])
    low, high = float(y.min()), float(y.max())
    room = (high - low or 1) * 0.1
    low, high = low - room, high + room
    right = max(1.0, float(x.max()))

    def place(share: float, value: float) -> tuple[float, float]:
        return _LEFT + _RIGHT * share / right, _TOP + _TALL * (high - value) / (high - low)

    places = [place(share, value) for _, share, value in points]
    front = [
        i for i in range(len(x)) if not any((x <= x[i]) & (y > y[i]) | (x < x[i]) & (y >= y[i]))
    ]
    front.sort(key=lambda i: x[i])
    line = " ".join("{:.1f},{:.1f}".format(*places[i]) for i in front)
    marks = []
    for (name, share, value), (px, py), at in zip(
        points,
        places,
        _labels([name for name, *_ in points], places, [places[i] for i in front]),
        strict=True,
    ):
        told = f"{escape(name)}: {escape(quality)} {value:.4g} at {share:.1%} {escape(cost)}"
        marks.append(
            f'<circle class="now" cx="{px:.1f}" cy="{py:.1f}" r="5"><title>{told}</title></circle>'
        )
        if at is not None:
            marks.append(f'<text x="{at[0]:.1f}" y="{at[1]:.1f}">{escape(name)}</text>')
    bottom = _TOP + _TALL
    ticks = "".join(
        f'<text x="{_LEFT - 8}" y="{place(0, value)[1] + 4:.1f}" text-anchor="end">{value:.6g}</text>'
        for value in _ticks(low, high)
    )
    ticks += "".join(
        f'<text x="{_LEFT + _RIGHT * part:.1f}" y="{bottom + 18}" text-anchor="middle">'
        f"{100 * part * right:.0f} %</text>"
        for part in (0.0, 0.25, 0.5, 0.75, 1.0)
    )
    return (
        f'<svg class="scatter" viewBox="0 0 {_ALL} {bottom + 48}" role="img" '
        f'aria-label="{escape(quality)} over {escape(cost)}">'
        f'<polyline class="front" points="{line}" fill="none" stroke="#1c7c4a"/>'
        f'<g stroke="#9aa4ae"><line class="axis" x1="{_LEFT}" x2="{_LEFT + _RIGHT}" y1="{bottom}" '
        f'y2="{bottom}"/><line class="axis" x1="{_LEFT}" x2="{_LEFT}" y1="{_TOP}" y2="{bottom}"/></g>'
        f'<g font-size="12" fill="#5d6670">{ticks}<text x="{_LEFT}" y="14">{escape(quality)}</text>'
        f'<text x="{_LEFT + _RIGHT}" y="{bottom + 38}" text-anchor="end">{escape(cost)}</text></g>'
        f'<g font-size="12" fill="#2463b4">{"".join(marks)}</g></svg>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between two others, three to seven of them."""
    rough = (high - low) / 5
    unit = 10.0 ** np.floor(np.log10(rough))
    step = next(own * unit for own in (1, 2, 5, 10) if own * unit >= rough)
    first, last = int(np.ceil(low / step)), int(np.floor(high / step))
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def _labels(
    names: Sequence[str], places: Sequence[_Place], line: Sequence[_Place]
) -> list[_Place | None]:
    """Where each label begins: beside its point, within the axes, on no label, no other point and not on the line.

    None where there is no such place; the point then says its name when it is pointed at.
    """
    taken = [(px - 5, py - 5, px + 5, py + 5) for px, py in places]
    taken += [(x, y, x + 1, y + 1) for x, y in _along(line)]
    found: list[_Place | None] = []
    for name, (px, py) in zip(names, places, strict=True):
        wide = _LETTER * len(name)
        found.append(None)
        for left, middle in _beside(px, py, wide):
            box = (left, middle - _LINE / 2, left + wide, middle + _LINE / 2)
            inside = box[0] > _LEFT and box[2] < _ALL and box[1] >= _TOP and box[3] <= _TOP + _TALL
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                found[-1] = (left, middle + 4)
                break
    return found


def _along(line: Sequence[_Place]) -> Iterator[_Place]:
    """Points on a line, closer together than a letter is high."""
    for (x, y), (to_x, to_y) in pairwise(line):
        steps = int(np.hypot(to_x - x, to_y - y) / 5) + 1
        yield from (
            (x + (to_x - x) * i / steps, y + (to_y - y) * i / steps) for i in range(steps + 1)
        )


def _beside(px: float, py: float, wide: float) -> Iterator[_Place]:
    """Left ends and middles of a label, the best first."""
    for left in (px + 9, px - 9 - wide):
        for step in (0, 1, 2, 3, -1, -2, -3):
            yield left, py + step * _LINE


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
