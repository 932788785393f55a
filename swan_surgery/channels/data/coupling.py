"""A picture of which layers' channels live and die together: a line for each group, a dot for each of its layers."""

from collections.abc import Iterable
from html import escape
from typing import NamedTuple


_ROW, _COLUMN, _LETTER = 18, 14, 7
_COLOURS = ("#2463b4", "#1c7c4a", "#b4552d", "#8a4fb0", "#a8861d", "#2a8c9c")


class Row(NamedTuple):
    """One layer: its name, what is said beside it, whether it has gates, and whom it shares them with."""

    name: str
    remark: str
    is_gated: bool
    coupled: tuple[str, ...]


def coupling_svg(layers: Iterable[Row]) -> str:
    """Layers from top to bottom in order of execution; those on one line share gates. No scripts."""
    rows = list(layers)
    groups = _groups(rows)
    columns = _columns(groups)
    left = _COLUMN * (max(columns, default=0) + 1) + 8
    marks = []
    for number, (members, column) in enumerate(zip(groups, columns, strict=True)):
        colour = _COLOURS[number % len(_COLOURS)] if rows[members[0]].is_gated else "#9aa4ae"
        x, heights = column * _COLUMN + 8, [member * _ROW + _ROW / 2 for member in members]
        told = ", ".join(rows[member].name for member in members)
        marks.append(
            f'<g stroke="{colour}" fill="{colour}"><title>{escape(told)}</title>'
            f'<line x1="{x}" x2="{x}" y1="{heights[0]}" y2="{heights[-1]}" stroke-width="2"/>'
            + "".join(f'<circle cx="{x}" cy="{y}" r="4"/>' for y in heights)
            + "</g>"
        )
    texts = [f"{row.name}: {row.remark}" for row in rows]
    marks += [
        f'<text x="{left}" y="{index * _ROW + 13}">{escape(text)}</text>'
        for index, text in enumerate(texts)
    ]
    wide = left + _LETTER * max(map(len, texts), default=0)
    tall = _ROW * len(rows)
    return (
        f'<svg class="coupling" viewBox="0 0 {wide} {tall}" width="{wide}" height="{tall}" role="img" '
        f'aria-label="which layers share gates" font-size="12" font-family="sans-serif" '
        f'fill="currentColor">{"".join(marks)}</svg>'
    )


def _groups(rows: list[Row]) -> list[list[int]]:
    """Layers that share gates, also through a third one, in order."""
    place = {row.name: index for index, row in enumerate(rows)}
    lead = list(range(len(rows)))

    def root(index: int) -> int:
        while lead[index] != index:
            index = lead[index]
        return index

    for index, row in enumerate(rows):
        for other in row.coupled:
            if other in place:
                one, two = sorted((root(index), root(place[other])))
                lead[two] = one
    found: dict[int, list[int]] = {}
    for index in range(len(rows)):
        found.setdefault(root(index), []).append(index)
    return list(found.values())


def _columns(groups: list[list[int]]) -> list[int]:
    """The first column that is free where a group begins."""
    ends: list[int] = []
    columns = []
    for members in groups:
        column = next((i for i, end in enumerate(ends) if end < members[0]), len(ends))
        if column == len(ends):
            ends.append(0)
        ends[column] = members[-1]
        columns.append(column)
    return columns


__all__ = ["Row", "coupling_svg"]
