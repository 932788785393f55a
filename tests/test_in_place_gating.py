"""Gates that act on a model's own code: parameters and statistics, for the time of one call."""

import copy
import pickle  # noqa: TID251 - people's workers do
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import swan_surgery as swan
from swan_surgery.channels import PINNED
from swan_surgery.gates import GatedModel, ParameterGate, StatisticGate
from swan_surgery.gates.gated_model import acting_gates
from swan_surgery.learning.curvature import CurvatureRule
from tests.closing import (
    assert_closed_equals_cut,
    close_,
    close_random_,
    image,
    outputs,
    prepared,
    twin,
)
from tests.fingerprints import assert_same_fingerprint, fingerprint
from tests.small_nets import Net, conv


X = (2, 3, 4, 4)


class Branching(nn.Module):
    """Code that no tracer follows: it asks the data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 4), conv(4, 5), conv(4, 5)
        self.norm, self.last = nn.BatchNorm2d(5), conv(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        is_bright = bool(x.sum() > 0)
        x = F.relu(self.a(x))
        x = self.norm(self.b(x) if is_bright else self.c(x))
        return self.last(torch.sigmoid(x))


class Normed(nn.Module):
    """A layer-norm over channels, and a linear layer called by its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.last = nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.sigmoid(self.a(x)))
        return F.linear(x, self.last.weight, self.last.bias)


def plain() -> nn.Module:
    def run(m, x):
        return m.last(torch.sigmoid(m.bn(m.b(F.relu(m.a(x))))))

    return prepared(
        Net(run, a=conv(3, 4), b=conv(4, 5), bn=nn.BatchNorm2d(5), last=conv(5, 2))
    )  # fmt: skip


def gated_normed() -> GatedModel:
    gated = swan.swanify(prepared(Normed()), image(4, 3)).eval()
    close_(gated, 1, 4)
    return gated


class TestChoice:
    def test_the_graph_where_it_gates_as_many(self) -> None:
        assert not swan.swanify(plain(), image(*X)).runs_in_place
        assert swan.swanify(plain(), image(*X), in_place=True).runs_in_place
        assert not swan.swanify(plain(), image(*X), in_place=False).runs_in_place

    def test_in_place_where_statistics_must_be_weighted(self) -> None:
        gated = swan.swanify(prepared(Normed()), image(4, 3))
        assert gated.runs_in_place
        kinds = {type(site) for site in gated.sites.values()}
        assert kinds == {ParameterGate, StatisticGate}
        assert gated.channels.num_units == 6

    def test_a_graph_asked_for_pins_what_it_cannot_weigh(self) -> None:
        with pytest.raises(swan.NoGateableChannelsError, match="a graph cannot weigh"):
            swan.swanify(prepared(Normed()), image(4, 3), in_place=False)

    @pytest.mark.parametrize("sign", [1, -1], ids=["bright", "dark"])
    def test_in_place_where_fx_cannot_follow(self, sign) -> None:
        """The branch that the example inputs take is the one that is mapped."""
        gated = assert_closed_equals_cut(prepared(Branching()), sign * image(*X).abs())
        assert gated.runs_in_place
        assert gated.channels.num_units == 9
        assert [layer.name for layer in gated.channels.layers] == [
            "a",
            "b" if sign > 0 else "c",
            "last",
        ]

    def test_a_graph_asked_for_where_fx_cannot_follow_is_an_error(self) -> None:
        with pytest.raises(swan.TraceError, match=r"torch\.fx cannot trace Branching"):
            swan.swanify(prepared(Branching()), image(*X), in_place=False)

    def test_what_no_parameter_reads_is_pinned_with_a_reason(self) -> None:
        """A product of activations sums over these channels: no weight has columns for them."""

        def run(m, x):
            x = m.a(x).flatten(2)
            return m.last((x.transpose(1, 2) @ x)[:, None])

        model = prepared(Net(run, a=conv(3, 4), last=conv(1, 2)))
        with pytest.raises(swan.NoGateableChannelsError, match=r"no gate can close .*in place"):
            swan.swanify(model, image(*X), in_place=True)
        assert assert_closed_equals_cut(model, image(*X)).channels.num_units == 4  # in the graph


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["ste", "soft"])
def test_both_ways_of_gating_are_one_function(mode: str, training: bool) -> None:
    """In the graph gates may sit before a ReLU, where a closed one has no gradient at 0."""
    results = []
    for in_place in (True, False):
        gated = swan.swanify(plain(), image(*X), in_place=in_place)
        close_random_(gated, 0.5, 3)
        gated.gates.mode = mode
        gated.train(training)
        out = gated(image(*X))
        out.square().sum().backward()
        grads = [p.grad for p in gated.model.parameters()]
        if training:
            alike = gated.gates.open_mask() if mode == "ste" else slice(None)
            grads.append(gated.gates.logits.grad[alike])
        results.append((out, *grads))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-11)


def test_closing_a_unit_scales_the_columns_that_read_it() -> None:
    gated = swan.swanify(plain(), image(*X), in_place=True).eval()
    first, second = (gated.channels.layer(name).out_units for name in "ab")
    close_(gated, first[2], second[0])
    base = twin(gated.model)
    with torch.no_grad():
        base.b.weight[:, 2] = 0
        base.last.weight[:, 0] = 0
    (got,), (wanted,) = outputs(gated, image(*X)), outputs(base, image(*X))
    assert torch.equal(got, wanted)


def test_tied_parameters_are_gated_under_every_name() -> None:
    def run(m, x):
        x = F.relu(m.one(F.relu(m.a(x))))
        return m.last(F.relu(m.two(x)))

    net = Net(run, a=conv(3, 4), one=conv(4, 4), two=conv(4, 4), last=conv(4, 2))
    net.two.weight = net.one.weight
    gated = swan.swanify(prepared(net), image(*X), in_place=True)
    names = {name for site in gated.sites.values() for name in site.names}
    assert {"one.weight", "two.weight"} <= names
    for seed in range(3):
        close_random_(gated, 0.4, seed)
        swan.prune(gated)  # verified
    assert gated.model.one.weight is gated.model.two.weight


def test_printed_sites_say_what_they_do() -> None:
    text = repr(gated_normed())
    assert "(last_weight): ParameterGate(6 channels, 4 open, folded into what 'last.weight' reads)" in text  # fmt: skip
    assert "StatisticGate(6 channels, 4 open, weighs layer_norm in 'norm')" in text


class TestActing:
    """Whatever happens inside, the base model is what it was."""

    def test_parameters_and_forwards_come_back(self) -> None:
        gated = gated_normed()
        before = fingerprint(gated.model)
        own = dict(gated.model.named_parameters())
        with acting_gates(gated) as model:
            assert model is gated.model
            assert model.last.weight is not own["last.weight"]
            (inside,) = outputs(model, image(4, 3))
        (wanted,) = outputs(gated, image(4, 3))
        assert torch.equal(inside, wanted)
        assert all(p is own[name] for name, p in gated.model.named_parameters())
        assert_same_fingerprint(before, fingerprint(gated.model))

    def test_a_parameter_is_itself_while_nothing_runs(self) -> None:
        gated = gated_normed()
        own = dict(gated.model.named_parameters())
        assert gated.model.last.weight is own["last.weight"]
        with torch.no_grad():
            gated.model.last.weight.mul_(2)
        with acting_gates(gated) as model:
            closed = [i for i, u in enumerate(gated.channels.layer("a").out_units) if u in (1, 4)]
            assert not model.last.weight[:, closed].any()
            assert isinstance(model.norm, nn.LayerNorm)
            assert type(model.norm).__name__ == "LayerNorm"
        assert gated.model.last.weight is own["last.weight"]

    def test_after_an_exception_too(self) -> None:
        gated = gated_normed()
        before = fingerprint(gated.model)
        with pytest.raises(KeyError), acting_gates(gated):
            raise KeyError
        assert_same_fingerprint(before, fingerprint(gated.model))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            gated(image(4, 5))
        assert_same_fingerprint(before, fingerprint(gated.model))

    def test_an_exception_inside_a_weighted_module_ends_its_weighting(self) -> None:
        gated = gated_normed()
        (wanted,) = outputs(gated, image(4, 3))
        with acting_gates(gated) as model:
            with pytest.raises(RuntimeError, match="must match the existing size"):
                model.norm(image(4, 5))
            (inside,) = outputs(model, image(4, 3))
        assert torch.equal(inside, wanted)

    def test_a_module_with_a_forward_of_its_own_gets_it_back(self) -> None:
        gated = gated_normed()
        own = gated.model.norm.forward
        gated.model.norm.forward = own
        (wanted,) = outputs(gated_normed(), image(4, 3))
        (got,) = outputs(gated, image(4, 3))
        assert torch.equal(got, wanted)
        assert vars(gated.model.norm)["forward"] is own

    def test_other_methods_of_the_model_are_gated(self) -> None:
        gated = swan.swanify(plain(), image(*X), in_place=True).eval()
        close_(gated, 0, 5)
        small = swan.prune(gated)
        with acting_gates(gated) as model, torch.no_grad():
            read = model.b(F.relu(model.a(image(*X))))
            wanted = small.b(F.relu(small.a(image(*X))))
        kept = [i for i, unit in enumerate(gated.channels.layer("b").out_units) if unit != 5]
        torch.testing.assert_close(read[:, kept], wanted, rtol=1e-12, atol=1e-13)

    def test_a_graph_has_no_other_methods(self) -> None:
        gated = swan.swanify(plain(), image(*X))
        with pytest.raises(swan.ModelError, match=r"in_place=True"), acting_gates(gated):
            pass
        with pytest.raises(swan.ModelError, match="got Net; call"), acting_gates(plain()):
            pass


class TestModule:
    def test_a_deep_copy_is_equal_and_independent(self) -> None:
        gated = gated_normed()
        (wanted,) = outputs(gated, image(4, 3))
        other = copy.deepcopy(gated)
        assert torch.equal(outputs(other, image(4, 3))[0], wanted)
        close_(other, 0)
        with torch.no_grad():
            other.model.last.weight.zero_()
        assert torch.equal(outputs(gated, image(4, 3))[0], wanted)
        assert not torch.equal(outputs(other, image(4, 3))[0], wanted)
        assert "4 open" in repr(gated)

    def test_state_dict_into_a_fresh_gated_model(self) -> None:
        gated = gated_normed()
        fresh = swan.swanify(prepared(Normed()), image(4, 3)).eval()
        assert fresh.load_state_dict(gated.state_dict(), strict=True).missing_keys == []
        assert torch.equal(outputs(fresh, image(4, 3))[0], outputs(gated, image(4, 3))[0])

    def test_the_given_model_is_untouched(self) -> None:
        model = prepared(Normed())
        before = fingerprint(model)
        gated = swan.swanify(model, image(4, 3))
        close_(gated, 1)
        gated(image(4, 3))
        swan.prune(gated)
        assert_same_fingerprint(before, fingerprint(model))

    def test_gates_and_weights_learn(self) -> None:
        gated = gated_normed().train()
        for mode in ("ste", "soft"):
            gated.gates.mode = mode
            gated.zero_grad()
            gated(image(4, 3)).square().sum().backward()
            assert bool((gated.gates.logits.grad != 0).all())
            assert all(p.grad is not None for p in gated.model.parameters())

    @pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.thorough)])
    def test_compiled_whole_equals_eager(self, training: bool) -> None:
        gated = gated_normed().train(training)
        compiled = torch.compile(gated, backend="aot_eager", fullgraph=True)
        found = []
        for run in (compiled, gated, compiled):
            gated.zero_grad()
            out = run(image(4, 3))
            out.square().sum().backward()
            found.append([out, *(p.grad for p in gated.parameters() if p.grad is not None)])
            with torch.no_grad():
                gated.gates.logits.neg_()  # a compiled model follows its gates
            found.append([run(image(4, 3))])
            with torch.no_grad():
                gated.gates.logits.neg_()
        for compiled_one in (found[:2], found[4:]):
            torch.testing.assert_close(compiled_one, found[2:4], rtol=1e-10, atol=1e-12)
        assert len(found[0]) == 7 + training  # the output, six weights, and the logits in training

    def test_a_region_compiled_by_itself_is_gated_when_the_whole_runs(self) -> None:
        gated = gated_normed()
        (wanted,) = outputs(gated, image(4, 3))
        gated.model.norm.compile(backend="eager")
        gated.model.a.compile(backend="eager")
        (got,) = outputs(gated, image(4, 3))
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)

    def test_train_mode_has_statistics_of_its_own(self) -> None:
        def run(m, x):
            x = torch.sigmoid(m.a(x))
            if m.training:
                x = x * x.mean((2, 3), keepdim=True)
            return m.last(x - x.mean(1, keepdim=True))

        model = prepared(Net(run, a=conv(3, 6), last=conv(6, 2)))
        gated = assert_closed_equals_cut(model, image(*X))
        numbers = {entry.training: entry.number for entry in gated.channels.statistics}
        assert numbers == {False: 1, True: 2}
        close_(gated, 1, 4)
        small = swan.prune(gated).train()
        (got,), (wanted,) = outputs(gated.train(), image(*X)), outputs(small, image(*X))
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)
        assert PINNED not in gated.channels.layer("a").out_units


class Checkpointed(nn.Module):
    """Parts of it run again in the backward pass; a norm over channels among them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = conv(3, 6), conv(6, 5), conv(5, 2)
        self.norm = nn.GroupNorm(1, 5)
        self.reentrant: bool | None = None

    def part(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.norm(self.b(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        if self.reentrant is None:
            return self.last(self.part(x))
        return self.last(checkpoint(self.part, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", ["ste", "soft", "measured"])
def test_what_runs_again_in_the_backward_pass_is_gated_as_before(mode, reentrant) -> None:
    gated = swan.swanify(prepared(Checkpointed()), image(*X), in_place=True).train()
    assert gated.channels.statistics
    close_random_(gated, 0.4, 1)
    if mode == "soft":
        gated.gates.mode = mode
    found = []
    for kind in (None, reentrant):
        gated.model.reentrant = kind
        gated.zero_grad()
        rule = CurvatureRule(gated, decay=0.5) if mode == "measured" else None
        x = image(*X).requires_grad_()
        gated(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in gated.parameters())])
        if rule is not None:
            found[-1].append(rule.state_dict()["pending"])
            gated.gates.detach()
    assert all(bool((gradient != 0).any()) for gradient in found[0][:1])
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("in_place", [True, False])
def test_threads_share_one_gated_model(in_place) -> None:
    gated = swan.swanify(plain(), image(*X), in_place=in_place).eval()
    close_random_(gated, 0.5, 3)
    xs = [image(*X) * (1 + i) for i in range(8)]
    with torch.no_grad():
        wanted = [gated(x) for x in xs]

    def run(x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [gated(x) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        for outs, one in zip(pool.map(run, xs), wanted, strict=True):
            assert all(torch.equal(out, one) for out in outs)
    assert not any(p.grad_fn for p in gated.model.parameters())


def test_hooks_on_containers_fire() -> None:
    gated = swan.swanify(prepared(nn.Sequential(conv(3, 4), nn.Sequential(nn.ReLU(), conv(4, 2)))),
                         image(*X), in_place=True)  # fmt: skip
    seen = []
    gated.model[1].register_forward_hook(lambda _m, _x, out: seen.append(out.shape))
    gated(image(*X))
    assert seen == [(2, 2, 4, 4)]


def test_a_gated_model_pickles_and_the_copy_has_gates_of_its_own() -> None:
    gated = gated_normed()
    (wanted,) = outputs(gated, image(4, 3))
    other = pickle.loads(pickle.dumps(gated))  # noqa: S301 - made here
    assert torch.equal(outputs(other, image(4, 3))[0], wanted)
    assert type(other.model.norm) is type(gated.model.norm)
    close_(other, 0)
    assert torch.equal(outputs(gated, image(4, 3))[0], wanted)
    assert not torch.equal(outputs(other, image(4, 3))[0], wanted)


def test_taking_gates_out_gives_back_the_written_classes() -> None:
    gated = gated_normed()
    back = swan.unswanify(gated)
    small = swan.prune(gated)
    for model in (back, small):
        assert type(model.norm) is nn.LayerNorm
        assert type(model.last) is nn.Linear
        assert not [name for m in model.modules() for name in vars(m) if "gates" in name]


def test_an_average_of_equal_models_is_that_model() -> None:
    for in_place in (True, False):
        gated = swan.swanify(plain(), image(*X), in_place=in_place).eval()
        close_random_(gated, 0.5, 3)
        average = AveragedModel(gated, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        for _ in range(20):
            average.update_parameters(gated)
        (got,), (wanted,) = outputs(average.eval(), image(*X)), outputs(gated, image(*X))
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)
