"""What was found of a routed model, as frozen data: text, markdown, and one HTML page with charts."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from swan_surgery.environment.machine import Environment
from swan_surgery.environment.notebooks import html_table
from swan_surgery.reporting import charts, page, rendering
from swan_surgery.routing.certificate import Certificate
from swan_surgery.routing.placing import PLACES_HEADER, Placement, place_notes, place_rows


_HEADER = ("", "routed", "all on the full way")
_ORDER = "samples, lowest score first"


@dataclass(frozen=True, slots=True)
class Curve:
    """The discrepancy of light and full branch at a switch, over the samples that reach it, in the order of their scores.

    Attributes:
        reached: how many do.
        left: share of these that leaves there: the first ones.
        bins: the 5 %, 50 % and 95 % quantiles of the discrepancy in each of up to 40 equal parts.
    """

    reached: int
    left: float
    bins: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class RouteStats:
    """What the samples of a loader take.

    Attributes:
        samples: how many.
        decide: how each switch decides.
        shares: of the samples that leave at each switch, and that take the full way.
        harm: mean of what is lost by those who leave (light wrong where full is right); None without labels.
        accuracy: of the routed and of the given model; None without labels of classes.
        apart: mean discrepancy to the full branch, over all samples; those that take the full way count 0.
        macs: mean MACs of a sample, over those of the given model.
        worst_macs: of a sample that takes the full way.
        mean_ms: wall time per sample, mean over batches.
        p95_ms: 95 % of the batches take at most this per sample.
        full_mean_ms: the same with every sample on the full way, measured in turns.
        full_p95_ms: likewise.
        batch: samples in the largest batch.
        after: the modules behind which the switches stand.
        thresholds: those in force.
        curves: the discrepancy at each switch.
        certificate: what `calibrate_switch` found, if thresholds and weights are still those it is of.
        environment: device, threads and versions.
    """

    samples: int
    decide: tuple[str, ...]
    shares: tuple[float, ...]
    harm: float | None
    accuracy: tuple[float, float] | None
    apart: float
    macs: float
    worst_macs: float
    mean_ms: float
    p95_ms: float
    full_mean_ms: float
    full_p95_ms: float
    batch: int
    after: tuple[str, ...]
    thresholds: tuple[float, ...]
    curves: tuple[Curve, ...]
    certificate: Certificate | None
    environment: Environment

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def __str__(self) -> str:
        leaving = ", ".join(f"{share:.1%}" for share in self.shares[:-1])
        lines = [
            f"{leaving} of {self.samples:,} samples leave early ({'/'.join(self.decide)})",
            f"mean discrepancy to the full way {self.apart:.3g}",
            f"MACs mean {self.macs:.1%} of the given model's, worst {self.worst_macs:.1%}",
            f"ms per sample mean {self.mean_ms:.3f}, p95 {self.p95_ms:.3f}",
            f"all on the full way: mean {self.full_mean_ms:.3f}, p95 {self.full_p95_ms:.3f}",
        ]
        if self.harm is not None:
            lines.insert(1, f"harm {self.harm:.2%}")
        if self.accuracy is not None:
            routed, full = self.accuracy
            lines.insert(1, f"accuracy {routed:.2%}, of the given model {full:.2%}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return html_table(self._title(), _HEADER, self._rows(), notes=self._notes())

    def to_markdown(self, *, scan: Sequence[Placement] = ()) -> str:
        """The whole report as markdown tables.

        Args:
            scan: what `swan.scan_switches` found.
        """
        parts = [f"## {self._title()}", rendering.markdown_table(_HEADER, self._rows())]
        if scan:
            parts += ["### Places", rendering.markdown_table(PLACES_HEADER, place_rows(scan))]
        notes = [*place_notes(scan), *self._notes()]
        return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes) + "\n"])

    def to_html(self, *, scan: Sequence[Placement] = ()) -> str:
        """The whole report as one HTML file: no scripts, no network, light and dark.

        Args:
            scan: what `swan.scan_switches` found, drawn place by place.
        """
        parts = [page.tiled(self._tiles()), page.table(_HEADER, self._rows())]
        drawn = [
            charts.ordered(
                f"behind {name}: {curve.reached:,} samples, {curve.left:.1%} leave ({way})",
                [(low, middle, high) for low, middle, high in curve.bins],
                curve.left,
                (_ORDER, "threshold"),
            )
            for name, way, curve in zip(self.after, self.decide, self.curves, strict=True)
            if curve.reached
        ]
        if drawn:
            parts += [
                "<h2>How far the light branch is from the full one</h2>",
                "<p>Discrepancy per sample: the median, in a band from 5 to 95 %. What stands before the line leaves.</p>",
                '<div class="plots">',
                *drawn,
                "</div>",
            ]
        if scan:
            most = max((own.apart for own in scan if not own.refused), default=0.0)
            bars = [
                "" if own.refused else charts.bar(own.apart, most, f"{own.apart:.3g} apart")
                for own in scan
            ]
            parts += [
                "<h2>Places for a switch</h2>",
                "<p>Mean discrepancy to the full way, at the same mean cost: shorter is better.</p>",
                page.table(PLACES_HEADER, place_rows(scan), bars=bars),
            ]
        notes = page.noted([*place_notes(scan), *self._notes()])
        return page.document(self._title(), [*parts, notes])

    def _title(self) -> str:
        return f"A switch behind {', '.join(self.after)}: {self.samples:,} samples"

    def _tiles(self) -> list[tuple[str, str, str]]:
        early = sum(self.shares[:-1])
        tiles = [
            ("leave early", f"{early:.1%}", "/".join(self.decide)),
            ("mean MACs", f"{self.macs:.1%}", f"worst {self.worst_macs:.1%} of the given model's"),
            (
                "ms per sample",
                f"{self.mean_ms:.3g}",
                f"p95 {self.p95_ms:.3g}; full way {self.full_mean_ms:.3g}",
            ),
        ]
        if self.harm is not None:
            tiles.insert(1, ("harm", f"{self.harm:.2%}", self._bound()))
        return tiles

    def _bound(self) -> str:
        own = self.certificate
        if own is None or own.target != "harm":
            return "without a guarantee"
        return f"<= {own.bound:.2%} with confidence {own.confidence:g}"

    def _rows(self) -> rendering.Rows:
        leaving = [
            (f"leave behind {name}", f"{share:.1%}", "0.0%")
            for name, share in zip(self.after, self.shares, strict=False)
        ]
        rows: rendering.Rows = [
            *leaving,
            ("discrepancy, mean", f"{self.apart:.3g}", "0"),
            ("MACs of a sample, mean", f"{self.macs:.1%}", "100.0%"),
            ("MACs of a sample, worst", f"{self.worst_macs:.1%}", "100.0%"),
            ("ms per sample, mean", f"{self.mean_ms:.3f}", f"{self.full_mean_ms:.3f}"),
            ("ms per sample, p95", f"{self.p95_ms:.3f}", f"{self.full_p95_ms:.3f}"),
        ]
        if self.harm is not None:
            rows.insert(len(leaving), ("harm", f"{self.harm:.2%} ({self._bound()})", "0.00%"))
        if self.accuracy is not None:
            routed, full = self.accuracy
            rows.insert(len(leaving), ("accuracy", f"{routed:.2%}", f"{full:.2%}"))
        return rows

    def _notes(self) -> list[str]:
        own = self.environment
        certified = f"certificate: {self.certificate}" if self.certificate else (
            "no certificate is in force: swan.calibrate_switch sets thresholds, and says what they keep"
        )  # fmt: skip
        thresholds = ", ".join(f"{threshold:.4g}" for threshold in self.thresholds)
        return [
            certified,
            f"a sample leaves where its score is at most {thresholds}",
            f"times are wall times of batches of up to {self.batch}, divided by the batch; p95 is over batches",
            f"{own.device}, torch threads {own.threads}, Python {own.python}, torch {own.torch}, swan-surgery {own.swan_surgery}",
        ]


__all__ = ["Curve", "RouteStats"]
