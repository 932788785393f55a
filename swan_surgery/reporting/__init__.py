"""Before and after: what two models cost, how fast they are, and how their layers differ."""

from swan_surgery.environment.machine import Environment
from swan_surgery.reporting.figures import Figures, LayerChange, to_flops
from swan_surgery.reporting.rendering import format_macs
from swan_surgery.reporting.report import Report, report
from swan_surgery.timing.loop import Latency


__all__ = [
    "Environment",
    "Figures",
    "Latency",
    "LayerChange",
    "Report",
    "format_macs",
    "report",
    "to_flops",
]
