"""What notebooks show: small tables of HTML, in the page's own colours."""

from collections.abc import Iterable, Sequence
from html import escape


_CELL = "text-align:left;padding:2px 12px 2px 0;font-variant-numeric:tabular-nums"


def html_table(
    title: str,
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    notes: Iterable[str] = (),
    heat: Sequence[Sequence[float | None]] = (),
) -> str:
    """A titled table.

    Args:
        title: shown above.
        header: one text per column.
        rows: as many texts each.
        notes: shown below, one line each.
        heat: per row and column how strongly its cell is shaded, in [0, 1]; None and what is missing is not.
    """
    lines = [f"<table><caption>{escape(title)}</caption><thead><tr>"]
    lines += [f'<th style="{_CELL}">{escape(text)}</th>' for text in header]
    lines.append("</tr></thead><tbody>")
    for index, row in enumerate(rows):
        shades = [*heat[index]] if index < len(heat) else []
        shades += [None] * (len(row) - len(shades))
        cells = (
            f'<td style="{_CELL}{_shade(shade)}">{escape(text)}</td>'
            for text, shade in zip(row, shades, strict=True)
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    lines.append("</tbody></table>")
    lines += [f"<div><small>{escape(note)}</small></div>" for note in notes]
    return "".join(lines)


def _shade(strength: float | None) -> str:
    return "" if strength is None else f";background:rgba(214,84,56,{0.7 * strength:.2f})"


__all__ = ["html_table"]
