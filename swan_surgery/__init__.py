"""Retrofit learnable channel gates onto a network, train, and cut what closed.

Shapes in docstrings: `B` batch, `C` channels, `H`/`W` height and width, `...` any.
"""

from swan_surgery.activations import (
    ActivationSite,
    Kappas,
    Swaps,
    activate_dead,
    fit_bounds,
    kappas,
    register_activation,
    swap_activations,
    swaps,
)
from swan_surgery.adaptive import (
    AdaptiveModel,
    WidthStats,
    adapt,
    calibrate_widths,
    compact,
    compensate_widths,
    fit_widths,
    gate_penalty,
    sandwich_loss,
    width_stats,
)
from swan_surgery.artifacts import load, save, save_pretrained
from swan_surgery.calibration import calibrate
from swan_surgery.channels import ChannelMap, channel_map, register_rule
from swan_surgery.compressing import Compressed, TradeoffCurve, compress, tradeoff_curve
from swan_surgery.costs.latency_table import LatencyTable
from swan_surgery.costs.macs import count_macs, marginal_macs
from swan_surgery.costs.params import count_params, expected_params, hard_params
from swan_surgery.cutting.compensation import Compensation, compensate
from swan_surgery.cutting.kept import kept
from swan_surgery.cutting.optimizers import optimizer_after
from swan_surgery.cutting.plan import PruningPlan
from swan_surgery.cutting.pruning import prune, prune_by_score
from swan_surgery.errors import (
    ArtifactError,
    BudgetError,
    CostError,
    EmptyLayerError,
    ExportError,
    GateError,
    InputError,
    MissingExtraError,
    ModelError,
    NoGateableChannelsError,
    PathError,
    RuleError,
    SwanError,
    SwanWarning,
    TraceError,
    UnsupportedOpError,
    VerificationError,
    WritingError,
)
from swan_surgery.exporting import Exported, export
from swan_surgery.gates import GatedModel, acting_gates, soft_gates
from swan_surgery.gates.conversion import swanify, unswanify
from swan_surgery.learning.distillation import distillation_loss
from swan_surgery.learning.features import FeatureDistillation
from swan_surgery.learning.objective import Objective
from swan_surgery.learning.parameter_groups import parameter_groups
from swan_surgery.learning.ramps import CosineRamp
from swan_surgery.learning.stages import Stage, stages
from swan_surgery.reporting import Report, report
from swan_surgery.routing.adding import add_switch
from swan_surgery.routing.calibrating import calibrate_switch
from swan_surgery.routing.certificate import Certificate
from swan_surgery.routing.expected import expected_macs, hard_macs
from swan_surgery.routing.exporting import export_routed
from swan_surgery.routing.masking import cut_mask
from swan_surgery.routing.placing import Placement
from swan_surgery.routing.route_stats import RouteStats, route_stats
from swan_surgery.routing.routed_model import RoutedModel
from swan_surgery.routing.scanning import scan_switches
from swan_surgery.selection.importance import importance
from swan_surgery.selection.sensitivity import SensitivityTable, sensitivity
from swan_surgery.timing.layers import measure_latency_table
from swan_surgery.timing.runtimes import MeasuredLatency, measure_latency


__all__ = [
    "ActivationSite",
    "AdaptiveModel",
    "ArtifactError",
    "BudgetError",
    "Certificate",
    "ChannelMap",
    "Compensation",
    "Compressed",
    "CosineRamp",
    "CostError",
    "EmptyLayerError",
    "ExportError",
    "Exported",
    "FeatureDistillation",
    "GateError",
    "GatedModel",
    "InputError",
    "Kappas",
    "LatencyTable",
    "MeasuredLatency",
    "MissingExtraError",
    "ModelError",
    "NoGateableChannelsError",
    "Objective",
    "PathError",
    "Placement",
    "PruningPlan",
    "Report",
    "RouteStats",
    "RoutedModel",
    "RuleError",
    "SensitivityTable",
    "Stage",
    "SwanError",
    "SwanWarning",
    "Swaps",
    "TraceError",
    "TradeoffCurve",
    "UnsupportedOpError",
    "VerificationError",
    "WidthStats",
    "WritingError",
    "acting_gates",
    "activate_dead",
    "adapt",
    "add_switch",
    "calibrate",
    "calibrate_switch",
    "calibrate_widths",
    "channel_map",
    "compact",
    "compensate",
    "compensate_widths",
    "compress",
    "count_macs",
    "count_params",
    "cut_mask",
    "distillation_loss",
    "expected_macs",
    "expected_params",
    "export",
    "export_routed",
    "fit_bounds",
    "fit_widths",
    "gate_penalty",
    "hard_macs",
    "hard_params",
    "importance",
    "kappas",
    "kept",
    "load",
    "marginal_macs",
    "measure_latency",
    "measure_latency_table",
    "optimizer_after",
    "parameter_groups",
    "prune",
    "prune_by_score",
    "register_activation",
    "register_rule",
    "report",
    "route_stats",
    "sandwich_loss",
    "save",
    "save_pretrained",
    "scan_switches",
    "sensitivity",
    "soft_gates",
    "stages",
    "swanify",
    "swap_activations",
    "swaps",
    "tradeoff_curve",
    "unswanify",
    "width_stats",
]
