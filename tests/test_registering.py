"""`register_rule`: a rule of the user's own is checked on its example, and then counts like any other."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.channels.rules.registry import facts_of, find_rule, registered_ops
from tests.closing import assert_closed_equals_cut, close_random_, image, prepared
from tests.small_nets import Net, conv


def custom(name: str, function, *, on_meta: bool = True):
    """An operation of torch.library that returns something of its first argument's shape."""
    op = torch.library.custom_op(f"swan_tests::{name}", function, mutates_args=())
    if on_meta:
        op.register_fake(lambda x, *_: torch.empty_like(x))
    return op


def swish2(x: Tensor) -> Tensor:
    return x * torch.sigmoid(2 * x)


def centred(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)


def blur(x: Tensor, kernel: Tensor) -> Tensor:
    width = x.shape[1]
    return F.conv2d(x, kernel.expand(width, 1, *kernel.shape), padding=1, groups=width)


def scaled(x: Tensor, factor: float) -> Tensor:
    return x * factor


SWISH = custom("swish2", swish2)
REAL_ONLY = custom("real_only", swish2, on_meta=False)
CENTRED = custom("centred", centred)
BLUR = custom("blur", blur)
SCALED = custom("scaled", scaled)


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def blur_example() -> tuple[Tensor, Tensor]:
    return double(2, 6, 7, 8), double(3, 3)


def blur_macs(inputs, outputs) -> int:
    return math.prod(outputs[0]) * math.prod(inputs[1])


def between(function, **parts) -> nn.Module:
    return prepared(
        Net(lambda m, x: m.last(function(m, m.a(x))), a=conv(3, 8), last=conv(8, 4), **parts)
    )


X = image(2, 3, 6, 6)


@pytest.mark.parametrize("op", [SWISH, REAL_ONLY], ids=["with a meta form", "without"])
def test_a_registered_operation_passes_gates_and_closed_equals_cut(op) -> None:
    model = between(lambda m, x: op(x))
    assert swan.channel_map(model, X).num_units == 0
    with swan.register_rule(op, "pointwise"):
        channels = swan.channel_map(model, X)
        assert (channels.num_units, channels.unknown_ops) == (8, ())
        assert_closed_equals_cut(model, X)
    assert swan.channel_map(model, X).unknown_ops


def test_a_filter_keeps_its_channels_and_its_macs_are_counted_exactly() -> None:
    model = between(lambda m, x: BLUR(x, m.taps))
    model.register_buffer("taps", double(3, 3))
    without = swan.count_macs(model, X)
    with swan.register_rule(BLUR, "keeps_axis", example=blur_example, macs=blur_macs):
        gated = assert_closed_equals_cut(model, X)
        assert gated.channels.num_units == 8
        assert swan.count_macs(model, X) - without == 2 * 8 * 36 * 9
        close_random_(gated, 0.5, 0)
        small = swan.prune(gated)
        assert swan.hard_macs(gated) == swan.count_macs(small, X) < swan.count_macs(model, X)
    assert swan.count_macs(model, X) == without


def test_an_operand_as_long_as_the_channels_pins_them() -> None:
    """It may hold something for each of them, and nobody said on which axis."""
    model = between(lambda m, x: BLUR(x, m.a.weight[:, :3, 0, 0]))
    with swan.register_rule(BLUR, "keeps_axis", example=blur_example):
        (pin,) = [pin for pin in swan.channel_map(model, X).pins if pin.layer == "a"]
        assert (pin.op, len(pin.channels)) == ("swan_tests.blur", 8)


def test_a_reduction_is_pinned_where_it_reduces_and_free_elsewhere() -> None:
    with swan.register_rule(CENTRED, "reduction", axes=(1,)):
        assert swan.channel_map(between(lambda m, x: CENTRED(x)), X).num_units == 0
        turned = between(lambda m, x: CENTRED(x.transpose(1, 2)).transpose(1, 2))
        assert assert_closed_equals_cut(turned, X).channels.num_units == 8


def test_a_function_of_call_and_labels_is_a_rule() -> None:
    def rule(call, labels) -> None:
        labels.assign(call.outputs[0], labels.fields(call.inputs[0]))

    with swan.register_rule(SWISH, rule):
        assert assert_closed_equals_cut(between(lambda m, x: SWISH(x)), X).channels.num_units == 8


def test_a_number_that_follows_a_width_is_noticed() -> None:
    example = lambda: (double(3, 8, 5), 2.0)  # noqa: E731
    with swan.register_rule(SCALED, "pointwise", example=example):
        assert swan.channel_map(between(lambda m, x: SCALED(x, 0.5)), X).num_units == 8
        assert (
            swan.channel_map(between(lambda m, x: SCALED(x, float(x.shape[1]))), X).num_units == 0
        )


def forgetful(call, labels) -> None:
    """Gives the output no fields, and pins nothing."""


def crossed(call, labels) -> None:
    """The labels of the last two axes change places."""
    fields = labels.fields(call.inputs[0])
    labels.assign(call.outputs[0], tuple(f.transpose(2, 3) for f in fields))


WRONG = {
    "mixes the channels": (CENTRED, "pointwise", {}, r"along axis .*1.* of argument 0 .* differs by"),
    "mixes this axis": (CENTRED, "keeps_axis", {}, "along axis 1 of argument 0"),
    "mixes another axis": (CENTRED, "reduction", {"axes": (2,)}, "differs by"),
    "filters along the kept": (BLUR, "keeps_axis", {"axes": (2,), "example": blur_example}, "axis 2 of argument 0"),
    "forgets": (SWISH, forgetful, {}, "other shapes or labels than it says"),
    "crosses": (SWISH, crossed, {}, "other shapes or labels than it says"),
    "raises": (BLUR, "pointwise", {"example": blur_example}, "does not fit its example: RuntimeError"),
    "other MACs": (SWISH, "keeps_axis", {"macs": lambda i, o: o[0][1] ** 2}, r"macs= says \d+ and the rule \d+"),
    "no such arguments": (BLUR, "keeps_axis", {}, "the example cannot be run"),
    "nothing to cut": (SWISH, "pointwise", {"example": lambda: (double(1, 1),)}, "leaves nothing to check"),
    "made of others": ("matmul", "pointwise", {"example": lambda: (double(2, 3), double(3, 4)), "replace": True}, r"made of other operations \(aten\.mm\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_rule_that_its_example_contradicts_is_refused_and_not_there(name: str) -> None:
    op, rule, options, message = WRONG[name]
    before = registered_ops()
    with pytest.raises(swan.RuleError, match=message):
        swan.register_rule(op, rule, **options)
    assert registered_ops() == before
    assert find_rule(torch.ops.swan_tests.swish2.default) is None


BAD = {
    "unknown operation": (("swan_tests::nothing", "pointwise"), {}, "is no operation that torch knows"),
    "plain function": ((torch.relu, "pointwise"), {}, "is no operation that torch knows"),
    "unknown name": ((SWISH, "pointwise_"), {}, "'pointwise', 'reduction', 'keeps_axis'"),
    "no rule": ((SWISH, 3), {}, "must be a name or a function, got int"),
    "axes of none": ((SWISH, "pointwise"), {"axes": (1,)}, r"axes=\(1,\) means nothing"),
    "needs an example": ((SCALED, "pointwise"), {}, "takes factor: give example="),
    "no tuple": ((SWISH, "pointwise"), {"example": lambda: double(3)}, "tuple of arguments, got Tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    args, options, message = BAD[name]
    with pytest.raises(swan.InputError, match=message):
        swan.register_rule(*args, **options)


@pytest.mark.parametrize("op", [SWISH, torch.ops.swan_tests.swish2, "swan_tests::swish2", "swan_tests.swish2"])  # fmt: skip
def test_there_is_one_rule_by_whatever_name(op) -> None:
    with swan.register_rule(op, "pointwise") as registered:
        assert registered.op == "swan_tests.swish2"
        for again in (SWISH, "swan_tests::swish2"):
            with pytest.raises(swan.RuleError, match="has a rule already; replace=True"):
                swan.register_rule(again, "pointwise")


@pytest.mark.parametrize("name", ["mean", "sigmoid"], ids=["own entry", "tagged as pointwise"])
def test_the_librarys_own_rules_are_replaced_only_on_purpose_and_come_back(name: str) -> None:
    packet = getattr(torch.ops.aten, name)
    overload = getattr(packet, packet.overloads()[0])
    before = facts_of(overload)
    with pytest.raises(swan.RuleError, match=f"aten.{name} has a rule already"):
        swan.register_rule(name, "reduction")
    with swan.register_rule(name, "reduction", axes=(1, 2, 3) if name == "sigmoid" else None, replace=True):  # fmt: skip
        assert facts_of(overload).rule is not before.rule
    assert facts_of(overload) == before


def test_removing_twice_leaves_what_came_later() -> None:
    first = swan.register_rule(SWISH, "pointwise")
    first.remove()
    with swan.register_rule(SWISH, "keeps_axis") as later:
        first.remove()
        assert facts_of(torch.ops.swan_tests.swish2.default) is later.facts
    assert find_rule(torch.ops.swan_tests.swish2.default) is None
