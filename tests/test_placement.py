"""Where gates sit: behind what would undo a zero, once on every path from producer to consumer."""

import re
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.gates import GatedModel
from tests.closing import (
    assert_closed_equals_cut,
    close_,
    close_random_,
    image,
    outputs,
    prepared,
    twin,
)
from tests.small_nets import Net, conv
from tests.zoo import ZOO


X = (2, 3, 4, 4)


def gated_net(run, **layers: nn.Module) -> GatedModel:
    """The gated network, after closed equals cut was checked at random closings."""
    gated = assert_closed_equals_cut(prepared(Net(run, **layers)), image(*X))
    assert gated is not None
    return gated


def sites(gated: GatedModel) -> set[str]:
    """The names of the sites; those that repeat in the train graph count once."""
    return {re.sub(r"_\d+$", "", name) for name in gated.sites}


def conv_bn(into: int, out: int) -> dict[str, nn.Module]:
    return {"a": conv(into, out, bias=False), "bn": nn.BatchNorm2d(out)}


def test_a_plain_convolution_is_gated_right_behind_itself() -> None:
    gated = gated_net(lambda m, x: m.last(F.relu(m.a(x))), a=conv(3, 4), last=conv(4, 2))
    assert sites(gated) == {"a"}


def test_the_gate_sits_behind_the_batch_norm_not_before() -> None:
    gated = gated_net(lambda m, x: m.last(F.relu(m.bn(m.a(x)))), **conv_bn(3, 4), last=conv(4, 2))
    assert sites(gated) == {"bn"}


def test_a_soft_gate_before_the_batch_norm_would_be_undone() -> None:
    """In train mode the statistics follow: here the gate still halves what the consumer reads."""
    gated = gated_net(
        lambda m, x: m.last(m.bn(m.a(x))), **conv_bn(3, 4), last=conv(4, 2, bias=False)
    )
    base = twin(gated.model).train()
    gated.train()
    gated.gates.mode = "soft"
    with torch.no_grad():
        gated.gates.logits.zero_()
    assert torch.allclose(outputs(gated, image(*X))[0], 0.5 * outputs(base, image(*X))[0])


AFTER = {
    "sigmoid": (torch.sigmoid, "sigmoid"),
    "softplus": (F.softplus, "softplus"),
    "hardsigmoid": (F.hardsigmoid, "hardsigmoid"),
    "exp": (torch.exp, "exp"),
    "plus_one": (lambda x: x + 1, "add"),
    "cos": (lambda x: x.cos(), "cos"),
    "threshold": (lambda x: F.threshold(x, 0.1, 0.3), "_threshold"),
}
BEFORE = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "hardswish": F.hardswish, "tanh": torch.tanh,
    "max_pool": lambda x: F.max_pool2d(x, 2), "avg_pool": lambda x: F.avg_pool2d(x, 2),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2.0), "double": lambda x: 2 * x,
    "dropout": lambda x: F.dropout(x, 0.5, training=False), "square": lambda x: x * x,
}  # fmt: skip


@pytest.mark.parametrize("name", AFTER)
def test_what_turns_zero_into_something_is_gated_behind(name: str) -> None:
    function, node = AFTER[name]
    gated = gated_net(lambda m, x: m.last(function(m.a(x))), a=conv(3, 4), last=conv(4, 2))
    assert sites(gated) == {node}


@pytest.mark.parametrize("name", BEFORE)
def test_what_keeps_zero_is_walked_through(name: str) -> None:
    function = BEFORE[name]
    gated = gated_net(lambda m, x: m.last(function(m.a(x))), a=conv(3, 4), last=conv(4, 2))
    assert sites(gated) == {"a"}


def test_a_zero_is_kept_only_up_to_the_last_operation_that_breaks_it() -> None:
    gated = gated_net(
        lambda m, x: m.last(F.relu(torch.sigmoid(F.relu(m.a(x))))), a=conv(3, 4), last=conv(4, 2)
    )
    assert sites(gated) == {"sigmoid"}


def test_dense_networks_gate_behind_each_consuming_batch_norm() -> None:
    model, (x,) = ZOO["densenet"]()
    gated = assert_closed_equals_cut(model.double(), x.double())
    assert sites(gated) == {"norm1", "norm2", "norm3", "norm4"}


def test_pre_activation_networks_gate_behind_each_consuming_batch_norm() -> None:
    model, (x,) = ZOO["resnet_preactivation"]()
    gated = assert_closed_equals_cut(model.double(), x.double())
    assert sites(gated) == {"bn1", "bn2", "bn3"}


def halved(gated: GatedModel) -> Tensor:
    """The output with soft gates of one half everywhere."""
    with torch.no_grad():
        gated.gates.logits.zero_()
    with swan.soft_gates(gated.eval()):
        return outputs(gated, image(*X))[0]


def assert_halved(gated: GatedModel, wanted) -> None:
    """`wanted(model, x)` is the output computed by hand, with the factors written in."""
    with torch.no_grad():
        expected = wanted(gated.model, image(*X))
    assert torch.allclose(halved(gated), expected, rtol=1e-12, atol=1e-14)


def linear(into: int, out: int) -> nn.Conv2d:
    return conv(into, out, bias=False)


def centred(gated: GatedModel) -> GatedModel:
    """Make every batch-norm linear: no mean, no bias."""
    for module in gated.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.bias)
            module.running_mean.zero_()
    return gated


def test_a_chain_passes_one_gate_per_width() -> None:
    gated = gated_net(
        lambda m, x: m.last(m.b(m.a(x))), a=linear(3, 4), b=linear(4, 5), last=linear(5, 2)
    )
    assert_halved(gated, lambda m, x: 0.25 * m.last(m.b(m.a(x))))


def test_every_path_of_a_residual_passes_one_gate() -> None:
    def run(m, x):
        x = m.stem(x)
        return m.last(x + m.b(m.a(x)))

    gated = gated_net(run, stem=linear(3, 4), a=linear(4, 3), b=linear(3, 4), last=linear(4, 2))

    def wanted(m, x):
        x = m.stem(x)
        return m.last(x / 2 + m.b(m.a(x)) / 8)

    assert_halved(gated, wanted)


def test_three_residual_blocks_do_not_gate_the_trunk_again() -> None:
    def run(m, x):
        x = m.stem(x)
        for block in (m.a, m.b, m.c):
            x = F.relu(x + block(x))
        return m.last(x)

    def positive(m):
        for parameter in m.parameters():
            parameter.data.abs_()

    gated = gated_net(
        run, stem=linear(3, 4), a=linear(4, 4), b=linear(4, 4), c=linear(4, 4), last=linear(4, 2)
    )
    positive(gated.model)
    x = image(*X).abs()
    with torch.no_grad():
        gated.gates.logits.zero_()
        with swan.soft_gates(gated.eval()):
            found = gated(x)
        # Each block reads the trunk, gated once where it was written; so is what the block writes.
        m, trunk = gated.model, gated.model.stem(x) / 2
        for block in (m.a, m.b, m.c):
            trunk = trunk + block(trunk) / 2
        assert torch.allclose(found, m.last(trunk), rtol=1e-12, atol=1e-14)


def test_a_pre_activation_residual_with_a_raw_shortcut_passes_one_gate() -> None:
    def run(m, x):
        x = m.stem(x)
        x = x + m.b(m.bn2(m.a(m.bn1(x))))
        return m.last(m.bn3(x))

    gated = gated_net(
        run, stem=linear(3, 4), bn1=nn.BatchNorm2d(4), a=linear(4, 5), bn2=nn.BatchNorm2d(5),
        b=linear(5, 4), bn3=nn.BatchNorm2d(4), last=linear(4, 2),
    )  # fmt: skip

    def wanted(m, x):
        x = m.stem(x)
        return m.last(m.bn3(x + m.b(m.bn2(m.a(m.bn1(x)))) / 4) / 2)

    assert_halved(centred(gated), wanted)


def test_a_concat_passes_one_gate_per_part() -> None:
    def run(m, x):
        return m.last(torch.cat((m.a(x), m.b(x)), 1))

    gated = gated_net(run, a=linear(3, 4), b=linear(3, 2), last=linear(6, 2))
    assert_halved(gated, lambda m, x: run(m, x) / 2)


def test_a_shared_convolution_passes_one_gate_per_call() -> None:
    def run(m, x):
        return m.last(m.both(m.both(m.stem(x))))

    gated = gated_net(run, stem=linear(3, 4), both=linear(4, 4), last=linear(4, 2))
    assert_halved(gated, lambda m, x: run(m, x) / 8)


def test_two_consumers_share_the_gate_of_their_producer() -> None:
    def run(m, x):
        x = m.a(x)
        return m.b(x) + m.c(x)

    gated = gated_net(run, a=linear(3, 4), b=linear(4, 2), c=linear(4, 2))
    assert sites(gated) == {"a"}
    assert_halved(gated, lambda m, x: run(m, x) / 2)


def test_one_consumer_behind_a_sigmoid_and_one_without() -> None:
    def run(m, x):
        x = m.a(x)
        return m.b(x) + m.c(torch.sigmoid(x))

    gated = gated_net(run, a=conv(3, 4), b=linear(4, 2), c=linear(4, 2))

    def wanted(m, x):
        x = m.a(x)
        return m.b(x) / 2 + m.c(torch.sigmoid(x)) / 2

    assert_halved(gated, wanted)


def test_squeeze_excite_gates_the_trunk_only() -> None:
    def run(m, x):
        x = F.relu(m.a(x))
        scale = torch.sigmoid(m.up(F.relu(m.down(x.mean((2, 3), keepdim=True)))))
        return m.last(x * scale)

    gated = gated_net(run, a=conv(3, 4), down=conv(4, 3), up=conv(3, 4), last=linear(4, 2))
    assert sites(gated) == {"a", "down"}

    def wanted(m, x):
        x = F.relu(m.a(x)) / 2
        scale = torch.sigmoid(m.up(F.relu(m.down(x.mean((2, 3), keepdim=True))) / 2))
        return m.last(x * scale)

    assert_halved(gated, wanted)


def test_depthwise_convolution_is_gated_behind_when_its_bias_breaks_the_zero() -> None:
    gated = gated_net(
        lambda m, x: m.last(m.dw(m.a(x))),
        a=conv(3, 4), dw=conv(4, 4, 3, groups=4), last=linear(4, 2),
    )  # fmt: skip
    assert sites(gated) == {"dw"}
    assert_halved(gated, lambda m, x: m.last(m.dw(m.a(x))) / 2)


IN_PLACE = {
    "sigmoid_, result used": lambda m, x: m.last(m.a(x).sigmoid_()),
    "relu_, result used": lambda m, x: m.last(m.a(x).relu_()),
    "inplace=True": lambda m, x: m.last(F.relu(m.a(x), inplace=True)),
    "add_": lambda m, x: m.last(m.a(x).add_(1.0)),
    "mul_ by a scalar": lambda m, x: m.last(m.a(x).mul_(2.0)),
    "clamp_": lambda m, x: m.last(m.a(x).clamp_(0.1, 1.0)),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_operations_are_gated_exactly(name: str) -> None:
    gated_net(IN_PLACE[name], a=conv(3, 4), last=conv(4, 2))


def relu_without_result(m, x):
    x = m.a(x)
    x.relu_()
    return m.last(x)


def sigmoid_without_result(m, x):
    x = m.a(x)
    x.sigmoid_()
    return m.last(x)


def changed_after_it_was_read(m, x):
    x = m.a(x)
    first = m.last(x)
    x.sigmoid_()
    return first + m.last(x)


def changed_behind_a_view(m, x):
    x = m.a(x)
    x[:, :, 0].add_(1.0)
    return m.last(x)


def added_into_the_trunk(m, x):
    x = m.a(x)
    x += m.b(x)
    return m.last(x)


def written_into_the_trunk(m, x):
    x = F.relu(m.a(x))
    out = m.b(x)
    out.add_(x)
    return m.last(out)


STALE = (
    relu_without_result, sigmoid_without_result, changed_after_it_was_read, changed_behind_a_view,
    added_into_the_trunk, written_into_the_trunk,
)  # fmt: skip


@pytest.mark.parametrize("run", STALE, ids=lambda run: run.__name__)
def test_a_value_changed_in_place_is_exact_or_pinned(run) -> None:
    model = prepared(Net(run, a=conv(3, 4), b=conv(4, 4), last=conv(4, 2)))
    with suppress(swan.NoGateableChannelsError):  # pinned, and said so
        assert_closed_equals_cut(model, image(*X))


def test_a_zero_initialised_bias_does_not_look_harmless() -> None:
    model = prepared(
        Net(lambda m, x: m.last(F.relu(m.bn(m.a(x)))), **conv_bn(3, 4), last=conv(4, 2))
    )
    nn.init.zeros_(model.bn.bias)
    model.bn.running_mean.zero_()
    gated = swan.swanify(model, image(*X))
    assert sites(gated) == {"bn"}


class Offset(nn.Module):
    """A learned offset that starts at zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.offset


@pytest.mark.parametrize("channels", [4, 1])
def test_a_bare_offset_that_starts_at_zero_may_grow(channels: int) -> None:
    model = prepared(
        Net(
            lambda m, x: m.last(m.plus(m.a(x))),
            a=conv(3, 4),
            plus=Offset(channels),
            last=conv(4, 2),
        )
    )
    nn.init.zeros_(model.plus.offset)
    gated = swan.swanify(model, image(*X))
    assert sites(gated) == {"add"}
    nn.init.normal_(gated.model.plus.offset)
    for seed in range(3):
        close_random_(gated, 0.5, seed)
        swan.prune(gated, verify=True)


def test_a_factor_that_starts_at_zero_keeps_zero_but_says_nothing_about_its_producer() -> None:
    """LayerScale initialised with 0: the product is zero today whatever the gate."""
    model = prepared(
        Net(lambda m, x: m.last(x * 0 + m.a(x) * m.scale), a=conv(3, 3), last=conv(3, 2))
    )
    model.scale = nn.Parameter(torch.zeros(1, 3, 1, 1, dtype=torch.float64))
    if not swan.channel_map(model, image(*X)).num_units:
        return  # the image met the channels
    gated = swan.swanify(model, image(*X))
    nn.init.normal_(gated.model.scale)
    close_random_(gated, 0.5, 0)
    swan.prune(gated, verify=True)


def test_closing_a_unit_makes_its_consumer_read_exact_zero() -> None:
    gated = gated_net(lambda m, x: m.last(F.relu(m.bn(m.a(x)))), **conv_bn(3, 4), last=conv(4, 2))
    close_(gated, 1, 2)
    seen = []
    gated.model.last.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    outputs(gated.eval(), image(*X))
    assert seen[0][:, [1, 2]].count_nonzero() == 0
    assert bool((seen[0][:, [0, 3]] != 0).any())


def test_pinned_channels_pass_every_gate_untouched() -> None:
    def run(m, x):
        x = F.relu(m.stem(x))
        return m.last(F.pad(x, (0, 0, 0, 0, 1, 1)) + m.b(x))

    gated = gated_net(run, stem=conv(3, 3), b=conv(3, 5), last=conv(5, 2))
    close_(gated, 1, 2)
    seen = []
    gated.model.last.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    outputs(gated.eval(), image(*X))
    mask = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).view(1, -1, 1, 1)
    with torch.no_grad():
        wanted = gated.model.b(F.relu(gated.model.stem(image(*X))) * mask)
    assert torch.allclose(seen[0][:, [0, 4]], wanted[:, [0, 4]], rtol=1e-12, atol=1e-14)
    assert bool((seen[0][:, [0, 4]] != 0).any())
    assert seen[0][:, [2, 3]].count_nonzero() == 0


TUPLES = {
    "reversed": lambda x: torch.cat(x.split(2, 1)[::-1], 1),
    "sliced twice": lambda x: torch.cat(x.chunk(2, 1)[::-1][::-1], 1),
}


@pytest.mark.parametrize("name", TUPLES)
def test_no_way_around_the_gates_through_a_tuple(name: str) -> None:
    """The branch alone was gated, and covered the units of the sum: the trunk was overlooked."""

    def run(m, x):
        x = TUPLES[name](F.relu(m.bn(m.a(x))))
        return m.last(m.b(F.relu(m.bn2(x))) + x)

    layers = conv_bn(3, 4) | {"b": conv(4, 4), "bn2": nn.BatchNorm2d(4), "last": conv(4, 2)}
    assert_closed_equals_cut(prepared(Net(run, **layers)), image(*X))
    gated = swan.swanify(prepared(Net(run, **layers)), image(*X), in_place=False)
    assert gated.channels.num_units == 2


def test_what_weights_sum_among_themselves_in_one_node_is_not_closed_by_a_gate_beside_it() -> None:
    """`multi_dot` sums over the rows of `b` twice: in what `b` puts out, and where weights meet."""

    def run(m, x):
        rows = F.relu(m.b(F.relu(m.a(x)))).movedim(1, -1).flatten(0, 2)
        weights = (m.b.weight[:, :2, 0, 0], m.last.weight[:, :, 0, 0], m.b.weight[:, :4, 0, 0])
        return torch.linalg.multi_dot([rows, *weights])

    layers = {"a": nn.Conv2d(3, 8, 3, padding=1), "b": nn.Conv2d(8, 6, 3, padding=1)}
    net = Net(run, **layers, last=conv(6, 2), unused=conv(6, 3))
    assert assert_closed_equals_cut(prepared(net), image(2, 3, 8, 8)) is not None


def gram_times_itself(m: nn.Module, x: Tensor) -> Tensor:
    y = F.relu(m.first(x))
    f = y.flatten(2)
    return m.last((f @ f.transpose(1, 2) @ f).view_as(y))


def outer_of_two(m: nn.Module, x: Tensor) -> Tensor:
    y, z = F.relu(m.first(x)).flatten(2), m.other(x).flatten(2)
    return m.last((y @ z.transpose(1, 2) @ z).view(x.shape[0], -1, *x.shape[2:]))


@pytest.mark.parametrize("run", [gram_times_itself, outer_of_two], ids=lambda f: f.__name__)
def test_units_along_two_axes_of_one_value_are_gated_above_it(run) -> None:
    """A gate per element of `f @ f.T` closed only those whose later channel is closed."""
    model = Net(run, first=conv(3, 8, 3), other=conv(3, 5), last=conv(8, 2))
    gated = assert_closed_equals_cut(prepared(model), image(2, 3, 5, 5))
    assert gated is not None
    assert len(set(gated.channels.layer("first").out_units)) == 8


def test_of_two_inputs_of_a_product_the_one_that_is_summed_over_is_gated() -> None:
    """What a product is added to comes first, and has no part in the sum."""

    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.beside = nn.Linear(4, 6), nn.Linear(4, 3)
            self.weight = nn.Parameter(torch.randn(3, 6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.beside(x), torch.relu(self.read(x)), self.weight.t())

    gated = assert_closed_equals_cut(Added().double().eval(), torch.randn(5, 4).double())
    assert gated is not None
    assert not gated.runs_in_place
    assert sites(gated) == {"read"}
