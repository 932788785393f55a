"""Closes random units of a network and compares the hard-gated model with the cut one."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import swan_surgery as swan
from swan_surgery.channels import ChannelMap
from swan_surgery.cutting.verification import relative_error, tensor_error
from swan_surgery.gates import GatedModel, conversion
from swan_surgery.models import as_inputs
from tests.random_layers import randomise_


TOLERANCE = 1e-9


def prepared(model: nn.Module) -> nn.Module:
    """float64, eval mode, every parameter and statistic random: a wrong channel cannot hide."""
    model = model.double()
    randomise_(model, torch.Generator().manual_seed(0))
    return model.eval()


def image(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def close_random_(gated: GatedModel, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(gated.channels.num_units, generator=generator)
    order = torch.rand(gated.channels.num_units, generator=generator)
    with torch.no_grad():
        gated.gates.logits.copy_(torch.where(drawn < share, -3.0, 3.0) + 0.1 * order)


def learnt_(gated: GatedModel) -> GatedModel:
    """The order of the start, off its values: as of gates that have trained a little."""
    with torch.no_grad():
        gated.gates.logits += 0.0123
    return gated


def close_(gated: GatedModel, *closed: int) -> None:
    with torch.no_grad():
        gated.gates.logits.fill_(3.0)
        gated.gates.logits[list(closed)] = -3.0


def outputs(model: nn.Module, example_inputs) -> list[Tensor]:
    inputs = as_inputs(example_inputs).map(lambda tensor: tensor.clone())
    with torch.no_grad():
        result = model(*inputs.args, **inputs.kwargs)
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def gated_by(
    channels: ChannelMap | None, model: nn.Module, example_inputs, *, strict: bool = False
) -> GatedModel:
    """`swanify`, which takes over a map that was made of this model on these inputs."""
    if channels is None:
        return swan.swanify(model, example_inputs, strict=strict)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "channel_map", lambda *args, **options: channels)
        return swan.swanify(model, example_inputs, strict=strict)


def assert_closed_equals_cut(
    model: nn.Module,
    example_inputs,
    *,
    shares: tuple[float, ...] = (0.3, 0.7),
    seeds: tuple[int, ...] = (0, 1),
    channels: ChannelMap | None = None,
) -> GatedModel | None:
    """Laws 1 and 2 at random closings; None where the model has no unit (and `swanify` says so).

    Mapping takes nearly all the time: `channels` is the model's own map where the test has one.
    """
    wanted = outputs(model, example_inputs)
    try:
        gated = gated_by(channels, model, example_inputs).eval()
    except swan.NoGateableChannelsError:
        found = swan.channel_map(model, example_inputs) if channels is None else channels
        assert not found.num_units
        return None
    for one, two in zip(wanted, outputs(gated, example_inputs), strict=True):
        assert tensor_error(one, two) <= TOLERANCE
    for share in shares:
        for seed in seeds:
            close_random_(gated, share, seed)
            mask = gated.gates.open_mask()
            pruned = swan.prune(gated, verify=False)
            error = relative_error(gated, pruned, mask, gated.example_inputs)
            assert error <= TOLERANCE, f"share {share}, seed {seed}: relative error {error:.1e}"
    return gated


def twin(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)
