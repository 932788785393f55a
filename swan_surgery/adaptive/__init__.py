"""Gates that look at the input: nested widths for every sample, or a gate for each unit."""

from swan_surgery.adaptive.adapting import adapt
from swan_surgery.adaptive.adaptive_model import AdaptiveModel, Taken
from swan_surgery.adaptive.calibrating import calibrate_widths
from swan_surgery.adaptive.compacting import compact
from swan_surgery.adaptive.compensating import compensate_widths
from swan_surgery.adaptive.fitting import fit_widths
from swan_surgery.adaptive.penalty import gate_penalty
from swan_surgery.adaptive.sandwich import sandwich_loss
from swan_surgery.adaptive.width_stats import WidthStats, width_stats


__all__ = [
    "AdaptiveModel",
    "Taken",
    "WidthStats",
    "adapt",
    "calibrate_widths",
    "compact",
    "compensate_widths",
    "fit_widths",
    "gate_penalty",
    "sandwich_loss",
    "width_stats",
]
