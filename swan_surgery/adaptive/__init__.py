"""Gates that look at the input: blocks whose channels are nested, and a width for every sample."""

from swan_surgery.adaptive.adapting import adapt
from swan_surgery.adaptive.adaptive_model import AdaptiveModel, Routes
from swan_surgery.adaptive.calibrating import calibrate_widths
from swan_surgery.adaptive.compacting import compact
from swan_surgery.adaptive.route_stats import Routing, route_stats
from swan_surgery.adaptive.routing import fit_routes
from swan_surgery.adaptive.sandwich import sandwich_loss


__all__ = [
    "AdaptiveModel",
    "Routes",
    "Routing",
    "adapt",
    "calibrate_widths",
    "compact",
    "fit_routes",
    "route_stats",
    "sandwich_loss",
]
