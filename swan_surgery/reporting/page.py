"""The report as one HTML file: no script, no network, light and dark, wide and narrow screens."""

from collections.abc import Mapping, Sequence
from html import escape

from torch import Tensor

from swan_surgery.channels import ChannelMap
from swan_surgery.reporting import charts, rendering
from swan_surgery.reporting.figures import Figures, LayerChange


_STYLE = """
:root{--paper:#fcfcfb;--ink:#1d2126;--soft:#5d6670;--line:#d9dde1;--was:#cfd8e3;--now:#2463b4;--good:#1c7c4a}
@media (prefers-color-scheme:dark){:root{--paper:#14171a;--ink:#e8eaec;--soft:#9aa4ae;--line:#30363c;
--was:#3a4656;--now:#6fa8ee;--good:#62c793}}
*{box-sizing:border-box}
body{margin:0 auto;padding:24px 16px 64px;max-width:960px;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
h1{font-size:1.5rem;margin:0 0 4px}h2{font-size:1.1rem;margin:40px 0 8px}
p{margin:4px 0;color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:20px 0}
.tile{border:1px solid var(--line);border-radius:8px;padding:12px}
.tile b{display:block;font-size:1.5rem;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:.85rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:4px 10px 4px 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}
th{color:var(--soft);font-weight:500}
td.bar{width:34%;min-width:110px}
svg{display:block;max-width:100%}
svg text{fill:var(--soft);font-size:12px}
.bars{width:100%;height:10px;border-radius:2px}
.was{fill:var(--was)}.now{fill:var(--now)}
.scatter{min-width:600px}.coupling{max-width:none}
.plot{width:100%;max-width:440px}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(320px,1fr));gap:16px}
.median{fill:none;stroke:var(--now);stroke-width:2}
.mark{stroke:var(--good);stroke-width:1.5;stroke-dasharray:4 3}
.axis{stroke:var(--line)}.front{fill:none;stroke:var(--good);stroke-width:1.5}
.many{display:grid;grid-template-columns:repeat(auto-fill,minmax(200px,1fr));gap:16px}
figure{margin:0}figcaption,li{color:var(--soft);font-size:.85rem}
details{margin:8px 0}summary{cursor:pointer}
code{font-size:.9em}
@media (max-width:600px){table{font-size:.8rem}.summary td{white-space:normal}
.layers th{display:none}.layers tr{display:grid;grid-template-columns:repeat(3,1fr);padding:6px 0;border-bottom:1px solid var(--line)}
.layers td{border:0;padding:2px 8px 2px 0;text-align:left;white-space:normal;overflow-wrap:anywhere}
.layers td:first-child,.layers td.bar{grid-column:1/-1;width:auto}
.layers td[data-of]::before{content:attr(data-of);display:block;color:var(--soft)}}
"""


def page(
    title: str,
    shown: Sequence[tuple[str, str, str]],
    summary: rendering.Rows,
    layers: Sequence[LayerChange],
    notes: Sequence[str],
    *,
    channels: ChannelMap | None,
    probabilities: Mapping[str, Tensor] | None,
    runs: Sequence[tuple[str, float, float]],
    quality: str = "accuracy",
) -> str:
    """Put the page together.

    Args:
        title: what is compared.
        shown: label, number, remark of each tile.
        summary: rows of `rendering.SUMMARY_HEADER`.
        layers: widths before and after.
        notes: sentences for the end.
        channels: for coupled groups and pinned channels.
        probabilities: gate probabilities by the name of the moment they were taken at.
        runs: name, share of MACs in (0, 1], accuracy.
        quality: what the accuracies are, with their unit.
    """
    parts = [
        tiled(shown),
        table(rendering.SUMMARY_HEADER, summary),
        "<h2>Widths, layer by layer</h2>",
        "<p>Output channels: pale before, full after.</p>",
        _widths(layers),
    ]
    if probabilities:
        parts += ["<h2>Gate probabilities</h2>", '<div class="many">']
        parts += [
            charts.histogram(name, values.detach().double().cpu().numpy())
            for name, values in probabilities.items()
        ]
        parts.append("</div>")
    if runs:
        parts += [
            "<h2>Accuracy and MACs</h2>",
            "<p>The line joins the best runs: each is more accurate than every cheaper one.</p>",
            f'<div class="scroll">{charts.scatter(runs, quality=quality)}</div>',
        ]
    if channels is not None:
        parts += _coupling(channels)
    return document(title, [*parts, noted(notes)])


def document(title: str, parts: Sequence[str]) -> str:
    """One HTML file of a title and what stands below it."""
    body = "\n".join([f"<h1>{escape(title)}</h1>", *parts])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def tiles(old: Figures, new: Figures, unit: str) -> list[tuple[str, str, str]]:
    """Label, number and remark of what matters first; `unit` is that of the accuracies."""
    found = [
        ("MACs left", rendering.share(old.macs, new.macs), rendering.format_macs(new.macs)),
        (
            "parameters left",
            rendering.share(old.params, new.params),
            rendering.scaled(new.params).strip(),
        ),
    ]
    if old.latencies:
        first, then = old.latencies[0], new.latencies[0]
        gain = first.median_ms / then.median_ms
        now = f"{rendering.milliseconds(then.median_ms)} ms at batch {then.batch}"
        found.append(("faster" if gain >= 1 else "slower", f"{max(gain, 1 / gain):.2f} x", now))
    if old.accuracy is not None and new.accuracy is not None:
        change = rendering.accuracy_change(old.accuracy, new.accuracy, unit)
        now = rendering.with_unit(f"{new.accuracy:.4g}", unit)
        found.append(("accuracy", now, f"{change} against before"))
    return found


def tiled(tiles: Sequence[tuple[str, str, str]]) -> str:
    """Tiles of label, number and remark."""
    inner = "\n".join(
        f'<div class="tile"><span>{escape(label)}</span><b>{escape(number)}</b>'
        f"<span>{escape(remark)}</span></div>"
        for label, number, remark in tiles
    )
    return f'<div class="tiles">\n{inner}\n</div>'


def noted(notes: Sequence[str]) -> str:
    """Sentences at the end."""
    return "\n".join(
        ["<h2>Notes</h2>", "<ul>", *(f"<li>{escape(note)}</li>" for note in notes), "</ul>"]
    )


def table(header: Sequence[str], rows: rendering.Rows, *, bars: Sequence[str] = ()) -> str:
    """A table; `bars`: a chart for each row, behind its first cell."""
    head = [f"<th>{escape(cell)}</th>" for cell in header]
    lines = [[f"<td>{escape(cell)}</td>" for cell in row] for row in rows]
    if bars:
        head.insert(1, "<th></th>")
        for line, own in zip(lines, bars, strict=True):
            line.insert(1, f'<td class="bar">{own}</td>')
    written = "".join(f"<tr>{''.join(cells)}</tr>" for cells in (head, *lines))
    return f'<div class="scroll"><table class="summary">{written}</table></div>'


def _widths(layers: Sequence[LayerChange]) -> str:
    known = [
        layer
        for layer in layers
        if layer.before is not None and layer.before.out_channels is not None
    ]
    most = max((layer.before.out_channels or 0 for layer in known if layer.before), default=1)
    rows = []
    for layer, cells in zip(known, rendering.layer_rows(known), strict=True):
        old = layer.before.out_channels if layer.before else 0
        new = layer.after.out_channels if layer.after else 0
        bar = charts.bars(old or 0, new or 0, most)
        name, _, *numbers = (escape(cell) for cell in cells)
        told = zip(("outputs", "MACs", "parameters"), numbers, strict=True)
        columns = "".join(f'<td data-of="{of}">{number}</td>' for of, number in told)
        rows.append(f'<tr><td><code>{name}</code></td><td class="bar">{bar}</td>{columns}</tr>')
    head = "<tr><th>layer</th><th></th><th>outputs</th><th>MACs</th><th>parameters</th></tr>"
    return f'<table class="layers">{head}{"".join(rows)}</table>'


def _coupling(channels: ChannelMap) -> list[str]:
    explained = channels.explain()
    said = list(zip(explained.layers, explained.remarks(), strict=True))
    pinned = [
        f"<li><code>{escape(layer.name)}</code>: {escape(str(pin))}</li>"
        for layer in explained.layers
        for pin in layer.pinned
    ]
    lines = [
        f"<li><code>{escape(layer.headline())}</code>"
        + "".join(f"<br>{escape(remark)}" for remark in remarks)
        + "</li>"
        for layer, remarks in said
    ]
    unknown = [f"<li>{escape(str(entry))}</li>" for entry in explained.unknown]
    total, gated, units = channels.num_channels, channels.num_gated_channels, channels.num_units
    parts = [
        "<h2>What hangs together, and what stays</h2>",
        f"<p>{gated:,} of {total:,} output channels are gated by {units:,} units.</p>",
        "<p>Channels of layers on one line live and die together.</p>",
        f'<details open><summary>Which layers share gates</summary><div class="scroll">{explained.to_svg()}</div></details>',
        _details("Coupled layers", lines, is_open=False),
        _details("Channels that stay, and why", pinned, is_open=True),
    ]
    return (
        [*parts, _details("Operations without a rule", unknown, is_open=True)] if unknown else parts
    )


def _details(title: str, items: Sequence[str], *, is_open: bool) -> str:
    opened = " open" if is_open else ""
    listed = "".join(items)
    return f"<details{opened}><summary>{title} ({len(items)})</summary><ul>{listed}</ul></details>"
