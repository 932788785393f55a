"""The note a model carries: what it was, and what was cut."""

import copy
import json
import re

import pytest
import torch
from torch import nn

import swan_surgery as swan
from swan_surgery.cutting.plan import PruningPlan
from swan_surgery.models.architecture import Architecture, architecture_of, difference
from swan_surgery.models.provenance import Provenance, provenance_of
from swan_surgery.models.steps import Step, StepKind, StepMacs, apply_step, register_step
from tests.closing import close_random_, image, prepared
from tests.gated_zoo import fresh_zoo
from tests.small_nets import Net, conv
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
    (cut,) = found.steps
    assert (cut.kind, cut.version) == ("cut", 1)
    plan = PruningPlan.from_json(cut.data["plan"])
    assert sum(gated.gates.open_mask().tolist()) == len(plan.open_units)
    inputs = gated.example_inputs.args
    assert cut.macs.before == swan.count_macs(model, inputs)
    assert cut.macs.after == swan.count_macs(small, inputs)
    assert cut.macs.input_shapes == tuple(tuple(x.shape) for x in inputs)


def test_layers_that_nobody_reads_cost_there_too() -> None:
    """The note reads the certified table: what is counted of the models themselves. They run."""
    unread = Net(
        lambda m, x: (y := m.a(x), m.lost(y), m.last(y))[-1],
        a=conv(3, 6),
        lost=conv(6, 5),
        last=conv(6, 2),
    )
    x = image(2, 3, 4, 4)
    gated = swan.swanify(prepared(unread), x)
    close_random_(gated, 0.4, 0)
    small = swan.prune(gated)
    (cut,) = provenance_of(small).steps
    assert (cut.macs.before, cut.macs.after) == (
        swan.count_macs(unread, x),
        swan.count_macs(small, x),
    )
    assert cut.macs.before == sum(term.macs for term in gated.channels.costs)


def test_a_cut_that_nobody_can_count_is_a_cut(monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise swan.InputError("cannot be counted")

    monkeypatch.setattr("swan_surgery.costs.macs.count_operators", fail)
    _, small, _ = pruned()
    found = provenance_of(small)
    assert found.steps[0].macs is None
    assert found.macs is None
    assert Provenance.from_json(found.to_json()) == found


def test_a_second_cut_is_added_to_the_first() -> None:
    model, small, gated = pruned()
    again = swan.swanify(small, gated.example_inputs)
    close_random_(again, 0.4, 1)
    found = provenance_of(swan.prune(again))
    assert found.base == architecture_of(model)
    assert found.steps[0] == provenance_of(small).steps[0]
    first, second = (step.macs for step in found.steps)
    assert second.before == first.after
    assert found.macs == StepMacs(first.before, second.after, second.input_shapes)


def test_back_from_json() -> None:
    _, small, _ = pruned()
    found = provenance_of(small)
    assert Provenance.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "3",
        '{"version":1}',
        '{"version":2}',
        '{"version":1,"class":"a","kinds":[],"modules":{"":0}}',
    ],
)
def test_what_is_no_provenance_is_an_input_error(text) -> None:
    with pytest.raises(swan.InputError, match="not a provenance"):
        Provenance.from_json(text)


def test_another_version_is_an_input_error() -> None:
    with pytest.raises(swan.InputError, match="provenance of version 3; this version reads 1 to 2"):
        Provenance.from_json('{"version":3}')


def test_a_kind_of_step_is_registered_once() -> None:
    own = StepKind(1, lambda model, _: model, lambda shapes, _: shapes)
    with pytest.raises(ValueError, match="steps of kind 'cut' are registered already"):
        register_step("cut", own)


def test_a_step_does_to_a_fresh_model_what_was_done() -> None:
    model, small, gated = pruned()
    (cut,) = provenance_of(small).steps
    again = apply_step(model, cut)
    inputs = gated.example_inputs.args
    assert torch.equal(again.eval()(*inputs), small.eval()(*inputs))
    plan = json.loads(cut.data["plan"]) | {"attributes": [["", "_version", None, 3]]}
    forged = Step("cut", 1, {"plan": json.dumps(plan)})
    with pytest.raises(swan.ArtifactError, match="which is no width"):
        apply_step(model, forged)


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
