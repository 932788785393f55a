"""Gates: the bank of logits, the sites that apply them, and the model that carries them."""

from swan_surgery.gates.bank import INITIAL_LOGIT, GateBank
from swan_surgery.gates.gated_model import GatedModel, acting_gates, soft_gates
from swan_surgery.gates.sites import FoldedGate, GateSite, ParameterGate, StatisticGate, fold_scale
from swan_surgery.gates.starting import (
    importance_ranks,
    magnitudes,
    make_bank,
    stands_as_started,
    widths,
)


__all__ = [
    "INITIAL_LOGIT",
    "FoldedGate",
    "GateBank",
    "GateSite",
    "GatedModel",
    "ParameterGate",
    "StatisticGate",
    "acting_gates",
    "fold_scale",
    "importance_ranks",
    "magnitudes",
    "make_bank",
    "soft_gates",
    "stands_as_started",
    "widths",
]
