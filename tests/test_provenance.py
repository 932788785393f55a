"""The note a model carries: what it was, and what was cut."""

import copy
import re

import pytest
import torch
from torch import nn

import swan_surgery as swan
from swan_surgery.cutting.plan import PruningPlan
from swan_surgery.models.architecture import Architecture, architecture_of, difference
from swan_surgery.models.provenance import Provenance, provenance_of
from tests.closing import close_random_
from tests.gated_zoo import fresh_zoo
from tests.zoo import ZOO


def pruned(name: str = "resnet_projection") -> tuple[nn.Module, nn.Module, swan.GatedModel]:
    gated = fresh_zoo(name, dtype=torch.float32)
    close_random_(gated, 0.4, 0)
    return ZOO[name]()[0], swan.prune(gated), gated


def test_the_note_is_text_and_travels_with_copies() -> None:
    model, small, _ = pruned()
    assert provenance_of(model) is None
    assert isinstance(small.swan_provenance, str)
    assert provenance_of(copy.deepcopy(small)) == provenance_of(small)


def test_it_describes_the_base_model_and_the_cut() -> None:
    model, small, gated = pruned()
    found = provenance_of(small)
    assert found.base == architecture_of(model)
    (cut,) = found.cuts
    plan = PruningPlan.from_json(cut.plan)
    assert sum(gated.gates.open_mask().tolist()) == len(plan.open_units)
    inputs = gated.example_inputs.args
    assert cut.macs_before == swan.count_macs(model, inputs)
    assert cut.macs_after == swan.count_macs(small, inputs)
    assert cut.input_shapes == tuple(tuple(x.shape) for x in inputs)


def test_a_second_cut_is_added_to_the_first() -> None:
    model, small, gated = pruned()
    again = swan.swanify(small, gated.example_inputs)
    close_random_(again, 0.4, 1)
    found = provenance_of(swan.prune(again))
    assert found.base == architecture_of(model)
    assert found.cuts[0] == provenance_of(small).cuts[0]
    assert found.cuts[1].macs_before == found.cuts[0].macs_after


def test_back_from_json() -> None:
    _, small, _ = pruned()
    found = provenance_of(small)
    assert Provenance.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    "text", ["{", "3", '{"version":1}', '{"version":1,"class":"a","kinds":[],"modules":{"":0}}']
)
def test_what_is_no_provenance_is_an_input_error(text) -> None:
    with pytest.raises(swan.InputError, match="not a provenance"):
        Provenance.from_json(text)


def test_another_version_is_an_input_error() -> None:
    with pytest.raises(swan.InputError, match="provenance of version 2, not 1"):
        Provenance.from_json('{"version":2}')


def conv_net(**options) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, **options), nn.ReLU(), nn.Dropout(0.1))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (conv_net(stride=2), r"module '0' has stride=\[2, 2\], saved was \[1, 1\]"),
        (conv_net(padding_mode="circular"), "module '0' has padding_mode='circular', saved was 'z"),
        (conv_net(bias=False), r"0.bias has shape None, saved was \(4,\)"),
        (conv_net()[:2], "it has no module '2'"),
        (nn.Sequential(*conv_net(), nn.ReLU()), "its module '3' was not in the saved one"),
        (nn.Sequential(conv_net()[0], nn.GELU(), conv_net()[2]), "module '1' is a GELU, saved was a R"),
        (nn.ModuleList(conv_net()), "the model itself is a ModuleList, saved was a Sequential"),
    ],
)  # fmt: skip
def test_the_first_difference_is_named(given, message) -> None:
    found = difference(architecture_of(conv_net()), architecture_of(given))
    assert found is not None
    assert re.search(message, found)


def test_what_may_change_from_run_to_run_is_no_difference() -> None:
    given = conv_net()
    given[1].inplace = True
    given[2].p = 0.5
    given.eval()
    given.remark = "mine"
    assert difference(architecture_of(conv_net()), architecture_of(given)) is None


def test_settings_that_only_one_has_are_no_difference() -> None:
    """Another version of torch may know more of them."""
    older = architecture_of(conv_net())
    modules = {
        name: (kind, {k: v for k, v in own.items() if k != "dilation"})
        for name, (kind, own) in older.modules.items()
    }
    assert difference(Architecture(older.name, modules, older.shapes), older) is None
