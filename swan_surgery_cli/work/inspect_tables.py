"""`Inspection` as rich tables."""

from collections.abc import Iterator

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from swan_surgery.channels.data.explanation import few
from swan_surgery.reporting import format_macs
from swan_surgery.reporting.rendering import scaled
from swan_surgery_cli.work.inspection import Inspection, LayerRow


_FEW = 40


def tables(inspection: Inspection, *, everything: bool) -> Iterator[RenderableType]:
    """The layers (the first 40 unless `everything`), then the totals."""
    shown = inspection.layers if everything else inspection.layers[:_FEW]
    yield _layers(inspection, shown)
    hidden = len(inspection.layers) - len(shown)
    if hidden:
        yield f"... and {hidden} more layers; --all shows them"
    yield _totals(inspection)


def _layers(inspection: Inspection, rows: tuple[LayerRow, ...]) -> Table:
    shapes = ", ".join("x".join(map(str, shape)) for shape in inspection.input_shapes)
    title = f"{inspection.model} at {shapes}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", no_wrap=True)
    for name in ("kind", "in -> out", "MACs", "params", "units"):
        table.add_column(name, justify="left" if name == "kind" else "right", no_wrap=True)
    table.add_column("what hangs together, stays, or follows", overflow="fold")
    for row, remarks in zip(rows, inspection.explanation.remarks(most=1), strict=False):
        layer = row.layer
        table.add_row(
            layer.name,
            layer.kind,
            f"{layer.in_channels} -> {layer.out_channels}",
            f"{scaled(row.macs)}MACs",
            scaled(row.params).strip(),
            str(layer.num_units) if layer.num_units else "pinned",
            Text("; ".join(remarks)),
        )
    return table


def _totals(inspection: Inspection) -> Table:
    table = Table(show_header=False, title="totals", title_justify="left")
    share = 100 * inspection.gated_channels / max(1, inspection.channels)
    layers = sum(row.layer.num_units > 0 for row in inspection.layers)
    table.add_row("cost of one pass", format_macs(inspection.macs))
    table.add_row("parameters", f"{scaled(inspection.params)}".strip())
    table.add_row("units (switches)", f"{inspection.units:,}")
    table.add_row(
        "channels with a switch",
        f"{inspection.gated_channels:,} of {inspection.channels:,} ({share:.1f} %), "
        f"in {layers} of {len(inspection.layers)} layers",
    )
    unknown = "\n".join(str(entry) for entry in inspection.explanation.unknown) or "none"
    table.add_row("operations without a channel rule", Text(unknown))
    if inspection.explanation.kept_numbers:
        kept = few(inspection.explanation.kept_numbers, 3)
        table.add_row("numbers in code rewritten to stay", Text(kept))
    for note in inspection.notes:
        table.add_row("note", note)
    return table
