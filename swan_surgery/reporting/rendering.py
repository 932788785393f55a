"""Turns figures into words and tables: text by rich, or markdown. No number without its unit."""

from collections.abc import Iterable, Sequence
from io import StringIO

from rich import box
from rich.console import Console
from rich.table import Table

from swan_surgery.environment.machine import Environment
from swan_surgery.reporting.figures import Figures, LayerChange, to_flops


Rows = list[tuple[str, ...]]

_WIDTH = 110
_NONE = "-"


def format_macs(macs: int) -> str:
    """MACs with their FLOPs.

    Example:
        >>> format_macs(1_814_073_344)
        '1.81 GMACs (3.63 GFLOPs)'
    """
    return f"{scaled(macs)}MACs ({scaled(to_flops(macs))}FLOPs)"


def milliseconds(value: float, digits: int = 3) -> str:
    """Significant digits, but whole milliseconds at least, never as a power of ten.

    Example:
        >>> milliseconds(3.9217), milliseconds(1689.8), milliseconds(231.4, digits=2)
        ('3.92', '1,690', '231')
    """
    return f"{value:,.0f}" if value >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def scaled(count: int) -> str:
    """Three significant digits and a decimal prefix, ready for a unit.

    Example:
        >>> scaled(25_557_032) + "params"
        '25.6 Mparams'
    """
    for prefix, factor in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= factor:
            value = count / factor
            digits = 2 if value < 10 else 1 if value < 100 else 0
            return f"{value:.{digits}f} {prefix}"
    return f"{count} "


def format_bytes(size: int) -> str:
    """Bytes with a decimal prefix."""
    return f"{scaled(size)}B"


def summary_rows(before: Figures, after: Figures, batch: int, unit: str = "") -> Rows:
    """One row per figure: name, before, after, after as a share of before."""
    rows = [
        ("cost", format_macs(before.macs), format_macs(after.macs), share(before.macs, after.macs)),
        _row("parameters", before.params, after.params),
        _row("weights", before.size_bytes, after.size_bytes, unit="B"),
        _row(
            "peak activations",
            before.peak_activation_bytes,
            after.peak_activation_bytes,
            unit="B",
        ),
    ]
    for old, new in zip(before.latencies, after.latencies, strict=True):
        rows.append(
            (
                "latency" if old.batch == batch else f"latency, batch {old.batch}",
                f"{milliseconds(old.median_ms)} ms (IQR {milliseconds(old.spread_ms, digits=2)})",
                f"{milliseconds(new.median_ms)} ms (IQR {milliseconds(new.spread_ms, digits=2)})",
                share(old.median_ms, new.median_ms),
            )
        )
    if before.accuracy is not None and after.accuracy is not None:
        was, now = (with_unit(f"{f.accuracy:.4g}", unit) for f in (before, after))
        rows.append(("accuracy", was, now, accuracy_change(before.accuracy, after.accuracy, unit)))
    return rows


def with_unit(number: str, unit: str) -> str:
    """The number, and its unit if it has one."""
    return f"{number} {unit}" if unit else number


def accuracy_change(before: float, after: float, unit: str) -> str:
    """The difference; of percentages in points."""
    return with_unit(f"{after - before:+.3g}", "points" if unit == "%" else unit)


def _row(name: str, before: int, after: int, unit: str = "") -> tuple[str, ...]:
    old, new = (f"{scaled(value)}{unit}".strip() for value in (before, after))
    return name, old, new, share(before, after)


def share(before: float, after: float) -> str:
    """After as a percentage of before."""
    return f"{100 * after / before:.1f} %" if before else _NONE


def layer_rows(layers: Iterable[LayerChange]) -> Rows:
    """One row per layer: name, channels, MACs and parameters, before -> after."""
    rows = []
    for layer in layers:
        sides = (layer.before, layer.after)
        inputs = [_NONE if side is None else _width(side.in_channels) for side in sides]
        outputs = [_NONE if side is None else _width(side.out_channels) for side in sides]
        macs = [_NONE if side is None else f"{scaled(side.macs)}MACs" for side in sides]
        params = [_NONE if side is None else scaled(side.params).strip() for side in sides]
        columns = (_arrow(pair) for pair in (inputs, outputs, macs, params))
        rows.append((layer.name or "(model)", *columns))
    return rows


def _width(channels: int | None) -> str:
    return _NONE if channels is None else str(channels)


def _arrow(pair: Sequence[str]) -> str:
    return pair[0] if pair[0] == pair[1] else f"{pair[0]} -> {pair[1]}"


def footnotes(
    before: Figures,
    after: Figures,
    shapes: Iterable[str],
    environment: Environment,
) -> list[str]:
    """What the tables do not say: shapes, hardware, repeats, and what was not counted."""
    repeats = sorted({latency.repeats for f in (before, after) for latency in f.latencies})
    counts = " or ".join(map(str, repeats))
    notes = [
        f"inputs: {', '.join(shapes)}",
        "1 MAC = 1 multiply-add = 2 FLOPs, in convolutions, linear layers and matrix products",
        f"latency: median and interquartile range (IQR) of {counts} passes, both models in turns",
        f"on {environment.device}, {environment.threads} torch threads, torch {environment.torch}",
        "peak activations: tensors alive at once during a forward pass, without weights and inputs",
    ]
    noise = max(
        (
            own.spread_ms / own.median_ms
            for f in (before, after)
            for own in f.latencies
            if own.is_noisy
        ),
        default=0.0,
    )
    if noise:
        notes.append(
            f"the machine was too noisy to compare latencies by: IQR up to {noise:.0%} of the median; measure "
            f"again with nothing else running"
        )
    for side, figures in (("before", before), ("after", after)):
        if figures.uncounted_ops:
            names = ", ".join(f"{name} ({calls}x)" for name, calls in figures.uncounted_ops)
            notes.append(f"not counted in the MACs {side}: {names}")
    return notes


# A speed-up below this share of what the MACs promise is explained.
_AS_PROMISED = 0.8


def speed_notes(before: Figures, after: Figures, layers: Sequence[LayerChange]) -> list[str]:
    """Why the smaller model is not as much faster as it is smaller; nothing where it is."""
    if not after.macs or not before.latencies:
        return []
    slow = [
        (old.batch, old.median_ms / new.median_ms)
        for old, new in zip(before.latencies, after.latencies, strict=True)
        if old.median_ms / new.median_ms < _AS_PROMISED * before.macs / after.macs
    ]
    if not slow:
        return []
    found = ", ".join(f"{_speed(gain)} at batch {batch}" for batch, gain in slow)
    notes: list[str] = []
    widths = [
        (x.before.out_channels, x.after.out_channels)
        for x in layers
        if x.before and x.after and x.before.out_channels and x.after.out_channels
    ]
    # What was not cut, a classifier's outputs among it, no other cut would round.
    odd = sum(new != old and new % 8 != 0 for old, new in widths)
    if odd:
        notes.append(
            f"{odd} of {len(widths)} layers were cut to a width that is no multiple of 8; kernels run those as if "
            f"they were wider: prune with round_to=8"
        )
    left = after.peak_activation_bytes / max(before.peak_activation_bytes, 1)
    if left > 1.25 * after.macs / before.macs:
        notes.append(
            f"activations shrank to {left:.0%} only: layers that wait for memory (normalisation, "
            f"depthwise convolution, residual sums) gain by that, not by MACs"
        )
    same = sum(old == new for old, new in widths)
    if same > 1:
        notes.append(f"{same} of {len(widths)} layers kept their full width")
    if not notes:
        notes.append(
            "the time for calling each layer stays, and weighs more the less there is to do"
        )
    return [f"{before.macs / after.macs:.2f} times fewer MACs, but {found}", *notes]


def _speed(gain: float) -> str:
    return f"only {gain:.2f} times as fast" if gain >= 1 else f"{1 / gain:.2f} times as slow"


SUMMARY_HEADER = ("", "before", "after", "left")
LAYER_HEADER = ("layer", "inputs", "outputs", "MACs", "parameters")


def text_table(title: str, header: Sequence[str], rows: Rows) -> str:
    """A table in plain text, drawn by rich; wide enough that nothing is cut off."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    out = StringIO()
    console = Console(file=out, color_system=None, width=_WIDTH)
    needed = console.measure(table).minimum
    console.width = max(_WIDTH, needed)
    console.print(table)
    return out.getvalue().rstrip("\n")


def markdown_table(header: Sequence[str], rows: Rows) -> str:
    """A markdown table; the first column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
