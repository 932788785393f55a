"""Which channels live and die together: labels that ride along through one run of the model."""

from swan_surgery.channels.data.channel_map import (
    PINNED,
    AttributeWidth,
    ChannelMap,
    CostAxis,
    CostTerm,
    FreeOutput,
    Layer,
    Pin,
    RepeatedNumber,
    Statistic,
    TensorAxis,
    UnknownOp,
)
from swan_surgery.channels.data.explanation import Explanation, LayerExplanation
from swan_surgery.channels.entry import channel_map, match_modules, patterns_of
from swan_surgery.channels.registering import RegisteredRule, register_rule


__all__ = [
    "PINNED",
    "AttributeWidth",
    "ChannelMap",
    "CostAxis",
    "CostTerm",
    "Explanation",
    "FreeOutput",
    "Layer",
    "LayerExplanation",
    "Pin",
    "RegisteredRule",
    "RepeatedNumber",
    "Statistic",
    "TensorAxis",
    "UnknownOp",
    "channel_map",
    "match_modules",
    "patterns_of",
    "register_rule",
]
