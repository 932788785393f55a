"""Which channels live and die together: labels that ride along through one run of the model."""

from swan_surgery.channels.channel_map import (
    PINNED,
    AttributeWidth,
    ChannelMap,
    CostAxis,
    CostTerm,
    Layer,
    Pin,
    RepeatedNumber,
    Statistic,
    TensorAxis,
    UnknownOp,
)
from swan_surgery.channels.entry import channel_map, match_modules
from swan_surgery.channels.explanation import Explanation, LayerExplanation
from swan_surgery.channels.stand_ins import (
    Inputs,
    as_inputs,
    copy_of,
    doubled,
    shell_of,
    without_collection,
)


__all__ = [
    "PINNED",
    "AttributeWidth",
    "ChannelMap",
    "CostAxis",
    "CostTerm",
    "Explanation",
    "Inputs",
    "Layer",
    "LayerExplanation",
    "Pin",
    "RepeatedNumber",
    "Statistic",
    "TensorAxis",
    "UnknownOp",
    "as_inputs",
    "channel_map",
    "copy_of",
    "doubled",
    "match_modules",
    "shell_of",
    "without_collection",
]
