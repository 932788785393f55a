"""The rule contract: every registered operation has an example, and on it closed equals cut."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import swan_surgery as swan
from swan_surgery.channels import PINNED
from swan_surgery.channels.rules.registry import find_rule, registered_ops, rule, writes_in_place
from tests.closing import assert_closed_equals_cut, close_random_, image
from tests.op_examples import ELSEWHERE, EXAMPLES, POINTWISE, Example, build


NAMES = tuple(name.removeprefix("aten.") for name in registered_ops())

# mkldnn's convolution exists for the CPU alone.
SAMPLE = sorted(set(EXAMPLES) - {"mkldnn_convolution"})[::8]


class Seen(TorchDispatchMode):
    """Notes the names of all operations; an in-place one counts as the plain one, too."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = str(op.overloadpacket)
        self.names |= {name, name.removesuffix("_")}
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_has_an_example_on_which_closed_equals_cut(name: str) -> None:
    if name in ELSEWHERE:
        assert name not in EXAMPLES
        return
    assert name in EXAMPLES, f"aten.{name} has a rule but no example in tests/op_examples.py"
    example = EXAMPLES[name]
    model, x = build(example)
    with Seen() as seen, torch.no_grad():
        model(x)
    full = name if "." in name else f"aten.{name}"
    assert full in seen.names, "the example does not run the operation"
    channels = swan.channel_map(model, x)
    assert channels.unknown_ops == ()
    gated = any(unit != PINNED for unit in channels.layer("first").out_units)
    assert gated == example.gated, [str(pin) for pin in channels.pins]
    assert_closed_equals_cut(model, x, channels=channels)


TRANSPARENT = {
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "contiguous": lambda x: x.transpose(2, 3).contiguous(),
    "clone of a part": lambda x: x[:, :, :2].clone().repeat(1, 1, 2, 1) + x,
    "detached in place": lambda x: x.detach_(),
    "written after": lambda x: F.relu_(x.clone()) + x,
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_copies_are_no_steps_and_keep_the_channels(name: str) -> None:
    assert not {"clone", "detach"} & set(NAMES)
    model, x = build(Example(lambda m, x: TRANSPARENT[name](x)))
    channels = swan.channel_map(model, x)
    units = channels.layer("first").out_units
    assert PINNED not in units
    assert channels.layer("last").in_units == units
    assert_closed_equals_cut(model, x, channels=channels)


def test_a_detached_parameter_is_still_one_that_gates_can_scale() -> None:
    """Its columns are scaled in place: what reads a unit is known although autograd is cut."""
    example = Example(lambda m, x: F.conv2d(x, m.matrix.detach()[:, :, None, None]), out=5)
    model, x = build(example)
    gated = swan.swanify(model, x, in_place=True)
    assert PINNED not in gated.channels.layer("first").out_units
    assert {name for site in gated.sites.values() for name in site.names} >= {"matrix"}
    for seed in range(3):
        close_random_(gated, 0.5, seed)
        swan.prune(gated)  # verified


def test_examples_and_exceptions_are_about_registered_operations() -> None:
    assert set(EXAMPLES) | set(ELSEWHERE) <= set(NAMES)
    assert all(ELSEWHERE.values())


@pytest.mark.parametrize("name", SAMPLE)
def test_the_map_is_the_same_on_meta(name: str) -> None:
    model, x = build(EXAMPLES[name])
    wanted = swan.channel_map(model, x)
    assert swan.channel_map(model.to("meta"), x.to("meta")) == wanted


@pytest.mark.parametrize("name", POINTWISE)
def test_operations_tagged_as_pointwise_share_one_rule(name: str) -> None:
    model, x = build(Example(lambda m, x: POINTWISE[name](x)))
    channels = swan.channel_map(model, x)
    assert channels.num_units == 8
    assert_closed_equals_cut(model, x, channels=channels)


@pytest.mark.parametrize("op", ["add", "sigmoid", "gelu", "atan2", "ge"])
def test_pointwise_operations_have_no_entry_of_their_own(op: str) -> None:
    assert op not in NAMES
    packet = getattr(torch.ops.aten, op)
    overload = getattr(packet, packet.overloads()[0])
    assert find_rule(overload) is find_rule(torch.ops.aten.hardswish.default)


def test_in_place_variants_share_the_rule_of_the_plain_operation() -> None:
    assert find_rule(torch.ops.aten.zero_.default) is find_rule(torch.ops.aten.zero.default)
    assert find_rule(torch.ops.aten.squeeze_.default) is find_rule(torch.ops.aten.squeeze.default)


def test_an_operation_without_a_rule_has_none() -> None:
    assert find_rule(torch.ops.aten.renorm.default) is None


def test_registering_twice_is_refused_and_changes_nothing() -> None:
    before = registered_ops()
    kept = find_rule(torch.ops.aten.mean.dim)
    with pytest.raises(ValueError, match=r"aten\.mean has a rule already"):
        rule("mean")(lambda call, labels: None)
    assert registered_ops() == before
    assert find_rule(torch.ops.aten.mean.dim) is kept


def test_registered_operations_are_sorted_and_unique() -> None:
    assert list(registered_ops()) == sorted(set(registered_ops()))


def test_the_contract_notices_an_operation_without_an_example() -> None:
    """Guards the guard: a name that nobody wrote an example for is not found by accident."""
    assert "fft" not in EXAMPLES
    assert "fft" not in ELSEWHERE
    model, x = build(Example(lambda m, x: torch.fft.fft(x, dim=1).real))
    assert swan.channel_map(model, x).unknown_ops
    assert x.equal(image(2, 3, 4, 4))


def test_what_writes_in_place_is_told_by_its_signature_as_torch_tags_it():
    """The tag is not in every torch that is supported; where it is, the two agree."""
    aten = torch.ops.aten
    assert writes_in_place(aten.relu_.default)
    assert writes_in_place(aten.index_put_.default)
    assert not writes_in_place(aten.relu.default)
    assert not writes_in_place(aten.add.out)
    if hasattr(torch.Tag, "inplace"):
        dispatched = set(
            torch._C._dispatch_get_all_op_names()
        )  # others are TorchScript's, without tags
        for name in NAMES:
            packets = [getattr(aten, own, None) for own in (name, f"{name}_")]
            for packet in filter(None, packets):
                for op in (getattr(packet, own) for own in packet.overloads()):
                    if op.name() in dispatched:
                        assert writes_in_place(op) == (torch.Tag.inplace in op.tags), op
