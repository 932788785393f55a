"""How a model is run to be mapped: inputs of every form, both modes, meta, and nothing touched."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.channels import PINNED, ChannelMap
from tests.closing import assert_closed_equals_cut, image, prepared
from tests.fingerprints import assert_same_fingerprint, fingerprint
from tests.small_nets import Net, PairNet, conv


def plain() -> nn.Module:
    return prepared(
        Net(
            lambda m, x: m.c(F.relu(m.bn(m.b(F.relu(m.a(x)))))),
            a=conv(3, 4), b=conv(4, 5), bn=nn.BatchNorm2d(5), c=conv(5, 2),
        )
    )  # fmt: skip


def pair() -> nn.Module:
    return prepared(
        PairNet(
            lambda m, x, y: m.last(F.relu(m.a(x) + m.b(y))),
            a=conv(3, 4), b=conv(1, 4), last=conv(4, 2),
        )
    )  # fmt: skip


def test_the_map_is_a_frozen_hashable_value() -> None:
    channels = swan.channel_map(plain(), image(1, 3, 4, 4))
    assert isinstance(hash(channels), int)
    with pytest.raises(dataclasses.FrozenInstanceError):
        channels.num_units = 3
    for entry in (channels.layers[0], channels.pins[0], channels.tensors[0], channels.costs[0]):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(entry, dataclasses.fields(entry)[0].name, "other")


def test_two_calls_give_equal_maps() -> None:
    model = plain()
    first = swan.channel_map(model, image(1, 3, 4, 4))
    assert first.num_units == 9
    assert swan.channel_map(model, image(1, 3, 4, 4)) == first
    assert hash(swan.channel_map(copy.deepcopy(model), image(1, 3, 4, 4))) == hash(first)


def test_weights_do_not_matter() -> None:
    model = plain()
    first = swan.channel_map(model, image(1, 3, 4, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert swan.channel_map(model, torch.zeros(1, 3, 4, 4, dtype=torch.float64)) == first


def test_module_names_do_not_matter() -> None:
    def run(m, x):
        return m.c(F.relu(torch.cat((m.a(x), m.b(x)), 1)))

    def renamed(m, x):
        return m.a(F.relu(torch.cat((m.z(x), m.q(x)), 1)))

    first = swan.channel_map(
        Net(run, a=conv(3, 2), b=conv(3, 3), c=conv(5, 2)).eval(), torch.zeros(1, 3, 4, 4)
    )
    second = swan.channel_map(
        Net(renamed, z=conv(3, 2), q=conv(3, 3), a=conv(5, 2)).eval(), torch.zeros(1, 3, 4, 4)
    )
    assert [(e.axis, e.units) for e in first.tensors] == [(e.axis, e.units) for e in second.tensors]
    assert [layer.out_units for layer in first.layers] == [
        layer.out_units for layer in second.layers
    ]
    assert [e.tensor for e in first.tensors] != [e.tensor for e in second.tensors]


def test_registration_order_changes_numbers_but_not_the_partition() -> None:
    def run(m, x):
        return m.c(F.relu(torch.cat((m.a(x), m.b(x)), 1)))

    layers = {"a": conv(3, 2), "b": conv(3, 3), "c": conv(5, 2)}
    maps = [
        swan.channel_map(Net(run, **{n: layers[n] for n in order}).eval(), torch.zeros(1, 3, 4, 4))
        for order in ("abc", "cba")
    ]
    partitions = [{frozenset(m.slots(unit)) for unit in range(m.num_units)} for m in maps]
    assert partitions[0] == partitions[1]
    assert len(partitions[0]) == 5


@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_touched_and_the_random_state_stays(training: bool) -> None:
    model = Net(
        lambda m, x: m.c(m.drop(F.relu(m.bn(m.a(x)))) + torch.rand_like(x[:, :1])),
        a=conv(3, 4), bn=nn.BatchNorm2d(4), drop=nn.Dropout(), c=conv(4, 2),
    ).train(training)  # fmt: skip
    before = fingerprint(model)
    assert swan.channel_map(model, torch.zeros(2, 3, 4, 4)).num_units == 4
    assert_same_fingerprint(before, fingerprint(model))


def test_nothing_is_touched_on_failure() -> None:
    def run(m, x):
        x = m.a(x)
        raise RuntimeError("forward fails")

    model = Net(run, a=conv(3, 4))
    before = fingerprint(model)
    with pytest.raises(
        swan.TraceError, match=r"Net could not be run .*\(1, 3, 4, 4\).*forward fails"
    ):
        swan.channel_map(model, torch.zeros(1, 3, 4, 4))
    assert_same_fingerprint(before, fingerprint(model))


def test_inputs_are_not_changed() -> None:
    model = Net(lambda m, x: m.b(F.relu(m.a(x.mul_(2)))), a=conv(3, 4), b=conv(4, 2))
    x = torch.ones(1, 3, 4, 4)
    swan.channel_map(model, x)
    assert x.equal(torch.ones(1, 3, 4, 4))


def test_the_model_is_not_run_on_real_data_when_shapes_are_enough() -> None:
    devices = []

    def run(m, x):
        devices.append(x.device.type)
        return m.b(F.relu(m.a(x)))

    swan.channel_map(Net(run, a=conv(3, 4), b=conv(4, 2)), torch.zeros(1, 3, 4, 4))
    assert set(devices) == {"meta"}


def test_a_model_on_meta_has_the_same_map() -> None:
    model = plain()
    wanted = swan.channel_map(model, image(1, 3, 4, 4))
    assert swan.channel_map(copy.deepcopy(model).to("meta"), image(1, 3, 4, 4).to("meta")) == wanted
    assert swan.channel_map(copy.deepcopy(model).to("meta"), image(1, 3, 4, 4)) == wanted


def data_dependent(m, x):
    is_dark = x.sum().item() < 0
    x = F.relu(m.a(x))
    return m.b(x.renorm(2, 1, 5.0) if is_dark else x)


@pytest.mark.parametrize(
    ("value", "units", "unknown"),
    [(1.0, 4, ()), (-1.0, 0, (("aten.renorm", ""),))],
    ids=["bright", "dark"],
)
def test_a_path_that_depends_on_data_is_the_one_that_the_inputs_take(value, units, unknown) -> None:
    model = Net(data_dependent, a=conv(3, 4), b=conv(4, 2))
    before = fingerprint(model)
    channels = swan.channel_map(model, torch.full((1, 3, 4, 4), value))
    assert channels.num_units == units
    assert channels.unknown_ops == unknown
    assert_same_fingerprint(before, fingerprint(model))


def test_a_path_that_depends_on_data_that_nobody_has_cannot_be_mapped() -> None:
    model = Net(data_dependent, a=conv(3, 4), b=conv(4, 2)).to("meta")
    with pytest.raises(swan.TraceError, match="meta tensors"):
        swan.channel_map(model, torch.ones(1, 3, 4, 4, device="meta"))


def test_a_path_that_depends_on_integers_is_known_on_meta() -> None:
    """Lengths and masks among the inputs are real while planning, whatever the model lies on."""

    def run(m, x, y):
        x = F.relu(m.a(x))
        return m.b(x.renorm(2, 1, 5.0) if int(y.max()) > 2 else x)

    model = PairNet(run, a=conv(3, 4), b=conv(4, 2)).to("meta")
    x = torch.ones(1, 3, 4, 4, device="meta")
    assert swan.channel_map(model, (x, torch.tensor([1, 2]))).num_units == 4
    assert swan.channel_map(model, (x, torch.tensor([1, 3]))).num_units == 0


def pair_map() -> ChannelMap:
    return swan.channel_map(pair(), (image(1, 3, 4, 4), image(1, 1, 4, 4)))


@pytest.mark.parametrize(
    "inputs",
    [
        [image(1, 3, 4, 4), image(1, 1, 4, 4)],
        {"x": image(1, 3, 4, 4), "y": image(1, 1, 4, 4)},
        {"y": image(1, 1, 4, 4), "x": image(1, 3, 4, 4)},
    ],
    ids=["list", "dict", "dict reversed"],
)
def test_arguments_come_as_tuple_list_or_dict(inputs) -> None:
    wanted = pair_map()
    assert wanted.num_units == 4
    assert swan.channel_map(pair(), inputs) == wanted


@pytest.mark.parametrize("inputs", [3, "x", None, nn.ReLU()])
def test_other_inputs_are_refused(inputs) -> None:
    with pytest.raises(swan.InputError, match=r"tensor, a tuple of arguments or a dict"):
        swan.channel_map(plain(), inputs)


def test_two_inputs_are_gated_and_cut_with_every_form_of_inputs() -> None:
    x, y = image(2, 3, 4, 4), image(2, 1, 4, 4)
    assert assert_closed_equals_cut(pair(), (x, y)) is not None
    assert assert_closed_equals_cut(pair(), {"x": x, "y": y}) is not None


class Optional(nn.Module):
    """A keyword argument that adds a path."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = conv(3, 4), conv(1, 4), conv(4, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        out = F.relu(self.a(x))
        if mask is not None:
            out = out * torch.sigmoid(self.b(mask))
        return self.last(out)


def test_keyword_inputs_choose_what_is_mapped() -> None:
    model = prepared(Optional())
    without = swan.channel_map(model, image(1, 3, 4, 4))
    given = swan.channel_map(model, {"x": image(1, 3, 4, 4), "mask": image(1, 1, 4, 4)})
    assert {name for name, _, _ in without.slots(0)} == {"a.weight", "a.bias", "last.weight"}
    assert {name for name, _, _ in given.slots(0)} == {
        "a.weight", "a.bias", "b.weight", "b.bias", "last.weight",
    }  # fmt: skip


def test_nested_inputs_are_followed() -> None:
    model = Net(lambda m, x: m.b(F.relu(m.a(x["image"][0]))), a=conv(3, 4), b=conv(4, 2)).eval()
    assert swan.channel_map(model, ({"image": [torch.zeros(1, 3, 4, 4)]},)).num_units == 4


class Cached:
    """An object with a list, itself, and a cache that the model would read back."""

    def __init__(self, h, y) -> None:
        self.found, self.me, self.past = [y], self, WidthCache(h)


class WidthCache:
    """What a model keeps for itself."""

    def __init__(self, h) -> None:
        self.h = h


@pytest.mark.parametrize(("kind", "num_units"), [(SimpleNamespace, 0), (Cached, 4)])
def test_plain_objects_are_outputs_but_for_caches(kind, num_units) -> None:
    def run(m, x):
        h = m.a(x)
        return kind(h=h, y=m.b(F.relu(h)))

    model = prepared(Net(run, a=conv(3, 4), b=conv(4, 2)))
    channels = swan.channel_map(model, image(2, 3, 4, 4))
    assert channels.num_units == num_units
    assert {pin.layer for pin in channels.pins if pin.op == "output"} >= {"b"}


@dataclasses.dataclass
class Result:
    """A model's output as a dataclass."""

    classes: Tensor
    features: list[Tensor]


def test_dataclass_outputs_are_pinned_field_by_field() -> None:
    def run(m, x):
        x = F.relu(m.a(x))
        return Result(m.b(x), [m.c(x)])

    model = Net(run, a=conv(3, 4), b=conv(4, 2), c=conv(4, 3)).eval()
    channels = swan.channel_map(model, torch.zeros(1, 3, 4, 4))
    assert channels.num_units == 4
    assert {pin.layer: pin.op for pin in channels.pins} == {"b": "output", "c": "output"}


def test_dict_outputs_are_gated_and_cut() -> None:
    def run(m, x):
        x = F.relu(m.a(x))
        return {"out": m.b(x), "more": [m.c(x)]}

    model = prepared(Net(run, a=conv(3, 4), b=conv(4, 2), c=conv(4, 3)))
    assert assert_closed_equals_cut(model, image(2, 3, 4, 4)) is not None


def auxiliary() -> nn.Module:
    def run(m, x):
        x = F.relu(m.a(x))
        out = m.last(F.relu(m.b(x)))
        return (out, m.aux(x)) if m.training else out

    return prepared(Net(run, a=conv(3, 4), b=conv(4, 4), aux=conv(4, 2), last=conv(4, 2)))


def test_an_auxiliary_head_that_only_trains_is_in_the_map() -> None:
    gated = assert_closed_equals_cut(auxiliary(), image(2, 3, 4, 4))
    channels = gated.channels
    assert ("aux.weight", 1, 2) in channels.slots(channels.layer("a").out_units[2])
    assert channels.notes == ()
    assert [term.module for term in channels.costs] == ["a", "b", "last"]  # eval mode pays
    with torch.no_grad():
        gated.gates.logits[:2] = -3.0
    pruned = swan.prune(gated).train()
    out, aux = pruned(image(2, 3, 4, 4))
    wanted = gated.train()(image(2, 3, 4, 4))
    assert torch.allclose(wanted[0], out, rtol=1e-9, atol=1e-12)
    assert torch.allclose(wanted[1], aux, rtol=1e-9, atol=1e-12)


def test_a_layer_that_only_train_mode_reads_into_a_residual_couples() -> None:
    def run(m, x):
        x = F.relu(m.a(x))
        return m.last(x + m.more(x) if m.training else x)

    model = Net(run, a=conv(3, 4), more=conv(4, 4), last=conv(4, 2)).eval()
    channels = swan.channel_map(model, torch.zeros(1, 3, 4, 4))
    assert channels.layer("more").out_units == channels.layer("a").out_units == (0, 1, 2, 3)


def inference_only(m, x):
    if m.training:
        raise NotImplementedError("inference only")
    x = F.relu(m.a(x))
    return m.b(x - x.mean(1, keepdim=True))


def test_train_mode_that_cannot_run_is_noted_where_it_has_parts_of_its_own() -> None:
    model = Net(inference_only, a=conv(3, 4), b=conv(4, 2), aux=conv(4, 2))
    channels = swan.channel_map(model, torch.zeros(1, 3, 4, 4))
    assert channels.num_units == 4
    (note,) = channels.notes
    assert "train mode could not be run" in note
    assert "inference only" in note
    assert "aux.weight" in note
    with pytest.raises(swan.InputError, match=r"inference only.*pass example_inputs on which both"):
        swan.swanify(model, torch.zeros(1, 3, 4, 4))


def test_train_mode_that_cannot_run_is_no_matter_where_eval_mode_uses_everything() -> None:
    """Training may need targets. What eval mode does to the channels is taken to hold there, too."""
    model = Net(inference_only, a=conv(3, 4), b=conv(4, 2))
    channels = swan.channel_map(model, torch.zeros(1, 3, 4, 4))
    assert channels.num_units == 4
    assert channels.notes == ()
    assert {entry.training for entry in channels.statistics} == {True, False}
    assert assert_closed_equals_cut(prepared(model), image(2, 3, 4, 4)) is not None


def test_batch_norm_on_one_value_per_channel_trains_on_a_doubled_batch() -> None:
    def run(m, x):
        return m.b(F.relu(m.bn(F.adaptive_avg_pool2d(m.a(x), 1))))

    model = Net(run, a=conv(3, 4), bn=nn.BatchNorm2d(4), b=conv(4, 2)).eval()
    channels = swan.channel_map(model, torch.zeros(1, 3, 4, 4))
    assert channels.notes == ()
    assert channels.num_units == 4


def test_eval_mode_that_cannot_run_is_an_error_that_names_the_model_and_shapes() -> None:
    with pytest.raises(swan.TraceError, match=r"Net could not be run .* \(1, 5, 4, 4\)"):
        swan.channel_map(plain(), torch.zeros(1, 5, 4, 4, dtype=torch.float64))


def test_hooks_of_the_model_itself_run_on_the_copy_only() -> None:
    model = Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(3, 4), b=conv(4, 2)).eval()
    seen = []
    model.a.register_forward_hook(lambda _m, _i, out: seen.append(out.device.type))
    swan.channel_map(model, torch.zeros(1, 3, 4, 4))
    assert set(seen) <= {"meta"}


def test_the_fused_attention_switch_is_put_back() -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(not before)
    try:
        swan.channel_map(plain(), image(1, 3, 4, 4))
        assert torch.backends.mha.get_fastpath_enabled() is not before
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_channels_of_a_linear_network_on_token_shapes() -> None:
    model = prepared(Net(lambda m, x: m.b(F.gelu(m.a(x))), a=nn.Linear(3, 4), b=nn.Linear(4, 2)))
    gated = assert_closed_equals_cut(model, image(2, 5, 3))
    assert gated.channels.layer("a").out_units == (0, 1, 2, 3)
    assert gated.channels.layer("b").out_units == (PINNED,) * 2
