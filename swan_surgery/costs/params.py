"""Parameters: how many a model has, and how many a gated model would have."""

from collections import Counter
from math import prod

from torch import Tensor, nn

from swan_surgery.channels import PINNED, CostAxis, CostTerm
from swan_surgery.costs.freshness import channels_now, kept_table
from swan_surgery.costs.table import CostTable, build_table
from swan_surgery.gates import GatedModel


def count_params(model: nn.Module) -> int:
    """Parameters, a tied one once."""
    return sum(parameter.numel() for parameter in model.parameters())


def param_table(gated: GatedModel) -> CostTable:
    """Parameters as a cost table: each is the product of its axes, a tied one counts once.

    Raises:
        ModelError: `gated` is not a gated model.
        CostError: the model was changed and its gates no longer fit.
    """

    def make() -> CostTable:
        return build_table(_param_terms(gated), gated.channels.num_units, unit="parameters")

    return kept_table(gated, "parameters", make)


def _param_terms(gated: GatedModel) -> list[CostTerm]:
    axes: dict[str, dict[int, CostAxis]] = {}
    for entry in channels_now(gated).tensors:
        counts = Counter(unit for unit in entry.units if unit != PINNED)
        fixed = len(entry.units) - counts.total()
        axes.setdefault(entry.tensor, {})[entry.axis] = CostAxis(
            tuple(counts), tuple(counts.values()), fixed
        )
    terms = []
    for name, parameter in gated.model.named_parameters():
        own = axes.get(name, {})
        rest = prod(size for axis, size in enumerate(parameter.shape) if axis not in own)
        terms.append(CostTerm(name, "parameter", rest, tuple(own.values()), parameter.numel()))
    return terms


def expected_params(gated: GatedModel) -> Tensor:
    """Parameters at the current probabilities: a float64 scalar, differentiable in the logits."""
    return param_table(gated).at(gated.gates.probabilities().double())


def hard_params(gated: GatedModel) -> int:
    """Parameters at `open_mask()`: what the pruned model will have, exactly."""
    return int(param_table(gated).at(gated.gates.open_mask().double()))
