"""Gates that act on a model's own code: on the parameters that read a unit, and on statistics over it."""

from collections import defaultdict

import torch
from torch import Tensor, nn

from swan_surgery.channels import ChannelMap
from swan_surgery.gates.gated_model import GatedModel
from swan_surgery.gates.in_place import gate_modules_
from swan_surgery.gates.sites import GateSite, ParameterGate, StatisticGate
from swan_surgery.gates.starting import make_bank
from swan_surgery.models import Inputs


def gate_in_place(copy: nn.Module, channels: ChannelMap, inputs: Inputs) -> GatedModel:
    """Gate a private copy of a model without tracing it; units that no parameter gates are pinned."""
    if channels.ungated_reads:
        channels = channels.without(
            channels.ungated_reads, "no gate can close these channels", "in place"
        )
    # name -> (class, units, what else the class takes)
    planned: dict[str, tuple[type[GateSite], Tensor, dict[str, object]]] = {}
    names, ranks = _names_of(copy), {n: p.ndim for n, p in copy.named_parameters()}
    for tensor, axis in channels.gated_axes:
        units = torch.tensor(channels.units_on(tensor, axis))
        if bool((units >= 0).any()):
            units = units.view([-1 if a == axis else 1 for a in range(ranks[tensor])])
            _add(planned, tensor, ParameterGate, units, {"names": names[tensor]})
    for entry in channels.statistics:
        units = torch.tensor(entry.units).view(entry.shape)
        if bool((units >= 0).any()):
            call = (entry.function, entry.number)
            options = {
                "module": entry.module,
                "call": call,
                "training": entry.training,
                "site": entry.site,
            }
            _add(planned, f"{entry.module}.{entry.function}", StatisticGate, units, options)
    bank = make_bank(copy, channels, [units for _, units, _ in planned.values()])
    sites = {name: kind(units, bank, **options) for name, (kind, units, options) in planned.items()}
    gated = GatedModel(copy, bank, sites, channels=channels, example_inputs=inputs)
    gated.acting = gate_modules_(copy, sites, bank)
    return gated


def _add(
    planned: dict[str, tuple[type[GateSite], Tensor, dict[str, object]]],
    stem: str,
    kind: type[GateSite],
    units: Tensor,
    options: dict[str, object],
) -> None:
    stem = stem.replace(".", "_").strip("_")
    name, number = stem, 1
    while name in planned:
        number += 1
        name = f"{stem}_{number}"
    planned[name] = (kind, units, options)


def _names_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every name of each parameter, by its first name: tied parameters have several."""
    by_id: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_id[id(parameter)].append(name)
    return {names[0]: tuple(names) for names in by_id.values()}
