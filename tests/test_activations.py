"""Other activations in a model: found, put in, starting as the same function, refused where they would leak."""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.activations.catalogue import KINDS
from swan_surgery.activations.scaling import FleS
from tests.closing import image, prepared, twin
from tests.fingerprints import assert_same_fingerprint, fingerprint


class Calls(nn.Module):
    """A function, a method, and one module that runs twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.c, self.norm = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(4)
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.a(x)))
        y = self.act(self.b(x))
        z = self.act(self.c(y))
        return self.head(F.leaky_relu(F.gelu(z, approximate="tanh"), 0.2).mean((2, 3)))


class Around(nn.Module):
    """Calls around a module that makes calls of its own."""

    def __init__(self):
        super().__init__()
        self.inner, self.first, self.last = Calls(), nn.Conv2d(3, 3, 1), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = self.inner(x)
        return self.last(torch.relu(x)).relu()


class Mlp(nn.Module):
    """Tokens [B, T, D]; mixes them or not, causally or not."""

    def __init__(self, mixing: str = "none", activation: nn.Module | None = None):
        super().__init__()
        self.mixing = mixing
        self.up, self.act, self.down = nn.Linear(4, 6), activation or nn.GELU(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.mixing != "none":
            scores = x @ x.transpose(1, 2)
            if self.mixing == "causal":
                later = torch.ones_like(scores, dtype=torch.bool).triu(1)
                scores = scores.masked_fill(later, float("-inf"))
            x = scores.softmax(-1) @ x
        return self.down(self.act(self.up(x)))


class Translator(nn.Module):
    """Reads a whole text, and writes one token by token: causal in the second input only."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Mlp("both"), Mlp("causal")

    def forward(self, read: Tensor, written: Tensor) -> Tensor:
        return self.decoder(written + self.encoder(read).mean(1, keepdim=True))


class SequenceFirst(nn.Module):
    """Tokens [T, B, D]: the first axis is not the batch."""

    def __init__(self):
        super().__init__()
        self.inner = Mlp("both")

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


def swapped_in(model: nn.Module, activation="fles", *inputs: Tensor, **options) -> nn.Module:
    return swan.swap_activations(model, activation, inputs, **options)


def shake_(swapped: nn.Module, size: float = 0.3) -> nn.Module:
    """Random numbers in all that was put in; the rest stays."""
    generator = torch.Generator().manual_seed(3)
    inside = tuple(place.name + "." for place in swan.swaps(swapped).swapped)
    with torch.no_grad():
        for name, parameter in swapped.named_parameters():
            if name.startswith(inside):
                drawn = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.copy_(size * drawn)
    return swapped


def counting(met: Counter[str], name: str):
    return lambda *_: met.update([name])


def test_functions_methods_and_a_module_that_runs_twice_are_found():
    net, x = prepared(Calls()), image(2, 3, 8, 8)
    done = swan.swaps(swapped_in(net, "fles", x))
    assert [(place.name, place.function, place.channels) for place in done.swapped] == [
        ("relu_1", "relu", 4),
        ("act_1", "relu", 4),
        ("act_2", "relu", 6),
        ("gelu_1", "gelu", 6),
        ("leaky_relu_1", "leaky_relu", 6),
    ]
    assert done.swapped[3].settings == {"approximate": "tanh"}
    assert done.swapped[4].settings == {"negative_slope": 0.2}
    assert not done.kept
    assert "act_2: relu(), 6 channels" in str(done)


@pytest.mark.parametrize("training", [False, True])
def test_each_call_runs_its_own_activation(training):
    """What is put in for one call, and nothing else, changes with it: also around modules with calls."""
    net, x = prepared(Around()), image(2, 3, 8, 8)
    swapped = swapped_in(net, "prelu", x).train(training)
    names = [place.name for place in swan.swaps(swapped).swapped]
    assert names[0] == "relu_1"
    assert len(names) == 7  # GELU has no place in PReLU
    for name in names:
        own = copy.deepcopy(swapped)
        met = Counter[str]()
        for other in names:
            own.get_submodule(other).register_forward_hook(counting(met, other))
        with torch.no_grad():
            before = own(x)
            own.get_submodule(name).register_forward_hook(lambda *call: 0.1 * call[2] + 5.0)
            after = own(x)
        assert met == dict.fromkeys(names, 2)
        assert not torch.equal(before, after)


@pytest.mark.parametrize("model", [Calls, Around])
@pytest.mark.parametrize(
    "activation", ["fles", "acon-c", "ap", "meta-acon", "bounded", "fles-token"]
)
def test_outputs_and_gradients_start_as_the_given_models(model, activation):
    net, x = prepared(model()), image(2, 3, 8, 8)
    swapped = swapped_in(net, activation, x)
    for training in (False, True):
        one, two = twin(net).train(training), copy.deepcopy(swapped).train(training)
        own, its = one(x), two(x)
        assert float((own - its).detach().abs().max()) <= 1e-12
        own.square().sum().backward()
        its.square().sum().backward()
        for name, parameter in one.named_parameters():
            found = two.get_parameter(name).grad
            assert found is not None
            assert float((found - parameter.grad).abs().max()) <= 1e-12 * (
                1 + float(parameter.grad.abs().max())
            )


_EXACT = {
    "relu": {"prelu", "polyrelu"},
    "leaky_relu": {"prelu"},
    "gelu": {"smu"},
}
_ALWAYS = {
    "acon-c",
    "ap",
    "bounded",
    "fles",
    "fles-dg",
    "fles-pn",
    "fles-proto",
    "fles-token",
    "meta-acon",
}
_BASES = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "relu6": nn.ReLU6,
    "elu": nn.ELU,
}


@pytest.mark.filterwarnings("ignore:fles-proto takes")
@pytest.mark.parametrize("base", _BASES)
def test_every_activation_has_an_identity_start_or_says_that_it_has_none(base):
    net = prepared(nn.Sequential(nn.Conv2d(3, 8, 1), _BASES[base](), nn.Conv2d(8, 2, 1)))
    x = image(2, 3, 4, 4)
    for name in KINDS:
        if name in _ALWAYS | _EXACT.get(base, set()):
            swapped = swapped_in(net, name, x)
            assert float((net(x) - swapped(x)).detach().abs().max()) <= 1e-12
        else:
            with pytest.raises(swan.InputError, match=r"has no start at which|computes .* already"):
                swapped_in(net, name, x)


@pytest.mark.filterwarnings("ignore:fles-proto takes")
@pytest.mark.parametrize("name", sorted(set(KINDS) - {"relu"}))
def test_blend_and_fresh_starts(name):
    net = prepared(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)))
    x = image(2, 3, 4, 4)
    blended = swapped_in(net, name, x, start="blend")
    assert torch.equal(net(x), blended(x))
    with torch.no_grad():
        blended.get_submodule("1").share.fill_(0.5)
    fresh = swapped_in(net, name, x, start="fresh")
    assert bool(fresh(x).isfinite().all())
    if name not in ("ap", "bounded", "polyrelu"):  # these start as ReLU anyway
        assert not torch.equal(net(x), fresh(x))
        assert not torch.equal(net(x), blended(x))


def test_fles_is_the_formula():
    """phi = kappa_ve sigmoid(kappa_ho x) x with the mean over positive entries of each sample's channel."""
    net, x = prepared(nn.Sequential(nn.Conv2d(3, 8, 1), nn.SiLU())), image(3, 3, 4, 4)
    swapped = shake_(swapped_in(net, "fles", x))
    fles = swapped.get_submodule("1")
    assert isinstance(fles, FleS)
    given = net[0](x)
    mean = torch.zeros(3, 8, dtype=x.dtype)
    for sample in range(3):
        for channel in range(8):
            positive = [v for v in given[sample, channel].flatten().tolist() if v > 0]
            mean[sample, channel] = sum(positive) / max(1, len(positive))
    scales = fles.scales
    hidden = (mean @ scales.reduce.weight.T + scales.reduce.bias).clamp(min=0)
    vertical = (hidden @ scales.vertical.weight.T + scales.vertical.bias).exp()[..., None, None]
    horizontal = (hidden @ scales.horizontal.weight.T + scales.horizontal.bias).exp()[
        ..., None, None
    ]
    wanted = vertical * torch.sigmoid(horizontal * given) * given
    assert torch.allclose(swapped(x), wanted, atol=1e-12)


@pytest.mark.parametrize("given", [nn.ReLU(), nn.LeakyReLU(), nn.GELU(), nn.SiLU(), nn.PReLU(8)])
@pytest.mark.parametrize("activation", ["fles", "fles-dg", "fles-pn", "fles-token"])
def test_without_gradients_it_works_in_place_on_its_own_tensors_only(activation, given):
    net, x = prepared(nn.Sequential(nn.Conv2d(3, 8, 1), given)), image(3, 3, 4, 4)
    act = shake_(swapped_in(net, activation, x)).get_submodule("1")
    x = image(3, 8, 4, 4)
    before, with_gradients = x.clone(), act(x)
    with torch.no_grad():
        without = act(x)
    assert torch.equal(x, before)
    assert torch.equal(without, with_gradients)
    with torch.inference_mode():
        assert torch.equal(act(x), with_gradients)


def test_gates_of_a_swapped_model_learn_and_cut_as_they_evaluate():
    """The same calls are made with gradients and without."""
    net, x = prepared(Calls()), image(2, 3, 8, 8)
    gated = swan.swanify(shake_(swapped_in(net, "fles", x)), x).eval()
    wanted = gated(x)
    wanted.square().sum().backward()
    with torch.no_grad():
        assert torch.equal(gated(x), wanted)


@pytest.mark.parametrize("activation", ["fles", "fles-pn", "meta-acon"])
def test_statistics_are_of_one_sample(activation):
    net, x = prepared(Calls()), image(3, 3, 8, 8)
    swapped = shake_(swapped_in(net, activation, x))
    alone = torch.cat([swapped(x[i : i + 1]) for i in range(3)])
    assert torch.allclose(swapped(x), alone, atol=1e-12)


def test_the_prototype_lets_samples_see_each_other_and_says_so():
    net, x = prepared(Calls()), image(3, 3, 8, 8)
    with pytest.warns(swan.SwanWarning, match="between the samples of a batch"):
        swapped = shake_(swapped_in(net, "fles-proto", x))
    assert not torch.allclose(swapped(x)[:1], swapped(x[:1]), atol=1e-6)


class ChannelsLast(nn.Module):
    """As ConvNeXt's: a linear layer on [B, H, W, C]."""

    def __init__(self):
        super().__init__()
        self.conv, self.up, self.down = nn.Conv2d(3, 4, 1), nn.Linear(4, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).permute(0, 2, 3, 1)
        return self.down(F.gelu(self.up(x))).permute(0, 3, 1, 2)


class Windows(nn.Module):
    """Windows folded into the batch, as Swin's."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(x.shape[0] * 2, x.shape[1] // 2, 4)
        return self.down(F.gelu(self.up(x)).mean(1))


@pytest.mark.parametrize(
    ("model", "shape", "axes", "channels"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU()), (2, 3, 6, 6), (1, 0), 5),
        (lambda: nn.Sequential(nn.Conv1d(3, 5, 3), nn.ReLU()), (2, 3, 6), (1, 0), 5),
        (lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU()), (2, 3), (1, 0), 5),
        (ChannelsLast, (1, 3, 4, 5), (3, 0), 7),
        (Mlp, (2, 5, 4), (2, 0), 6),
        (Windows, (1, 6, 4), (2, 0), 7),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 5, 1), nn.Flatten(), nn.ReLU(), nn.Linear(20, 2)),
            (2, 3, 2, 2),
            (1, 0),
            20,
        ),
    ],
)
def test_the_axis_of_the_channels_is_where_the_layer_put_it(model, shape, axes, channels):
    net, x = prepared(model()), image(*shape)
    (place,) = swan.swaps(swapped_in(net, "fles", x)).swapped
    assert (place.axes.channels, place.axes.samples, place.channels) == (*axes, channels)


class Heads(nn.Module):
    """An activation where channels lie on two axes."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x).unflatten(-1, (2, 3))).flatten(-2))


def test_an_unclear_axis_is_no_guess():
    net, x = prepared(Heads()), image(2, 5, 4)
    with pytest.raises(swan.InputError, match="several of its axes"):
        swapped_in(net, "fles", x)
    assert len(swan.swaps(swapped_in(net, "silu", x, start="fresh")).swapped) == 1


def test_statistics_over_tokens_of_causal_models_are_refused():
    x = image(2, 5, 4)
    causal, both = prepared(Mlp("causal")), prepared(Mlp("both"))
    for activation in ("fles", "fles-pn", "meta-acon", "fles-proto"):
        with pytest.raises(swan.InputError, match=r"is causal.*fles-token"):
            swapped_in(causal, activation, x)
    swapped_in(both, "fles", x)
    for activation in ("fles-token", "fles-dg", "acon-c"):
        swapped = shake_(swapped_in(causal, activation, x))
        later = x.clone()
        later[:, 3:] += 1.0
        assert torch.equal(swapped(x)[:, :3], swapped(later)[:, :3])
        assert not torch.equal(swapped(x)[:, 3:], swapped(later)[:, 3:])


def test_a_decoder_is_refused_though_its_encoder_reads_a_text_of_the_same_length():
    net, inputs = prepared(Translator()), (image(2, 5, 4), image(2, 5, 4) + 1)
    with pytest.raises(swan.InputError, match=r"is causal.*decoder"):
        swan.swap_activations(net, "fles", inputs)


def test_a_leak_is_what_the_refusal_is_about():
    """The same statistics put in past the check do let later tokens change earlier outputs."""
    x = image(2, 5, 4)
    swapped = shake_(swapped_in(prepared(Mlp("both")), "fles", x))
    swapped.mixing = "causal"
    later = x.clone()
    later[:, 3:] += 1.0
    assert not torch.equal(swapped(x)[:, :3], swapped(later)[:, :3])


def test_a_first_axis_of_tokens_is_refused():
    with pytest.raises(
        swan.InputError, match="first axis of the example inputs is not one of samples"
    ):
        swapped_in(prepared(SequenceFirst()), "fles", image(5, 2, 4))


def test_texts_too_short_to_tell_are_refused():
    net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    with pytest.raises(swan.InputError, match="2 tokens does not tell"):
        swan.swap_activations(net, "fles", torch.zeros(2, 2, dtype=torch.long))
    swan.swap_activations(net, "fles", torch.zeros(2, 3, dtype=torch.long))


def test_squashing_functions_stay_and_say_why():
    net = prepared(
        nn.Sequential(
            nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2), nn.Sigmoid()
        )
    )
    done = swan.swaps(swapped_in(net, "fles", image(2, 3)))
    assert [place.name for place in done.swapped] == ["1"]
    assert {own.name: own.why for own in done.kept} == {
        "3": "it squashes both signs alike",
        "5": "it is not 0 at 0",
    }


def test_where_says_which():
    net, x = prepared(Around()), image(2, 3, 8, 8)
    done = swan.swaps(swapped_in(net, "fles", x, where="inner.act*"))
    assert [place.name for place in done.swapped] == ["inner.act_1", "inner.act_2"]
    assert {own.why for own in done.kept} == {"not named in where="}
    assert len(swan.swaps(swapped_in(net, "fles", x, where="inner")).swapped) == 5
    with pytest.raises(swan.InputError, match="matches none of the model's 8 activations; nearest"):
        swapped_in(net, "fles", x, where="iner.act_1")


def test_wrong_names_and_starts_are_refused():
    net, x = prepared(Calls()), image(2, 3, 8, 8)
    with pytest.raises(
        swan.InputError, match=r"no activation 'flees'; there are acon-c, ap, bounded, fles"
    ):
        swapped_in(net, "flees", x)
    with pytest.raises(swan.InputError, match="start='warm'"):
        swapped_in(net, "fles", x, start="warm")
    with pytest.raises(swan.InputError, match="is a name or a function, not int"):
        swapped_in(net, 3, x)
    with pytest.raises(swan.InputError, match="runs no activation that is known"):
        swapped_in(prepared(nn.Sequential(nn.Linear(3, 2))), "fles", image(2, 3))
    with pytest.raises(swan.TraceError, match="could not be run"):
        swapped_in(net, "fles", image(2, 5, 8, 8))
    with pytest.raises(swan.InputError, match="was swapped"):
        swan.swaps(net)


def test_the_given_model_and_the_random_streams_stay_as_they_are():
    net, x = prepared(Around()), image(2, 3, 8, 8)
    before, stream = fingerprint(net), torch.get_rng_state()
    swapped = swapped_in(net, "fles", x)
    assert_same_fingerprint(before, fingerprint(net))
    assert torch.equal(stream, torch.get_rng_state())
    shake_(swapped)
    assert_same_fingerprint(before, fingerprint(net))
    assert isinstance(swapped, Around)


def test_in_place_where_the_input_is_read_again_is_noticed():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            x.relu_()
            return x

    with pytest.raises(swan.VerificationError, match="works in place"):
        swapped_in(prepared(Reads()), "fles", image(2, 3, 4, 4))


def test_another_path_than_the_one_mapped_is_an_error():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[-1] > 4:
                return F.relu(self.a(x))
            return self.b(F.relu(x))

    swapped = swapped_in(prepared(Branches()), "fles", image(2, 3, 8, 8))
    with pytest.raises(swan.PathError):
        swapped(image(2, 3, 4, 4))


def test_shared_modules_at_several_paths_become_several():
    act = nn.ReLU()
    net = prepared(nn.Sequential(nn.Linear(3, 4), act, nn.Linear(4, 5), act, nn.Linear(5, 2)))
    swapped = swapped_in(net, "fles", image(2, 3))
    assert [place.channels for place in swan.swaps(swapped).swapped] == [4, 5]
    assert net[1] is net[3]


def test_a_block_that_runs_twice_has_one_activation():
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    net = prepared(nn.Sequential(block, block, nn.Linear(4, 2)))
    assert [p.name for p in swan.swaps(swapped_in(net, "fles", image(2, 4))).swapped] == ["0.1"]


def test_torchs_fused_encoder_layers_ask_the_activation():
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, activation=nn.GELU(), batch_first=True, dropout=0.0
    )
    net, x = prepared(nn.TransformerEncoder(layer, 1)), image(2, 5, 8)
    swapped = shake_(swapped_in(net, "fles", x)).eval()
    with torch.no_grad():
        without_gradients = swapped(x)
    assert torch.allclose(without_gradients, swapped(x), atol=1e-12)
    assert not torch.allclose(without_gradients, net(x), atol=1e-3)


def test_bounds_are_learnt_from_data():
    net, x = prepared(Calls()), image(4, 3, 8, 8)
    bounded = swapped_in(net, "bounded", x)
    swan.fit_bounds(
        bounded, [x[:2], (x[2:], torch.zeros(len(x) - 2))]
    )  # as a loader gives them, labels and all
    assert torch.equal(net(x), bounded(x))
    far = bounded.relu_1(torch.full((1, 4, 2, 2), 1e9, dtype=x.dtype))
    assert bool((far == bounded.relu_1.bound.view(1, 4, 1, 1)).all())
    with pytest.raises(swan.InputError, match="no batch"):
        swan.fit_bounds(bounded, [])
    with pytest.raises(swan.InputError, match="margin"):
        swan.fit_bounds(bounded, [x], margin=0)
    with pytest.raises(swan.InputError, match="bounded"):
        swan.fit_bounds(net, [x])


def leaky(site: swan.ActivationSite) -> nn.Module:
    """A user's factory."""
    return nn.PReLU(site.channels, init=0.0)


def test_a_users_factory():
    net, x = prepared(Calls()), image(2, 3, 8, 8)
    swapped = swapped_in(net, leaky, x, where=["relu_1", "act_1"])
    assert swan.swaps(swapped).activation.endswith("test_activations.leaky")
    assert swapped.relu_1.weight.shape == (4,)
    with pytest.raises(swan.InputError, match="not a module"):
        swapped_in(net, lambda _site: 3, x)
    with pytest.raises(swan.InputError, match="already"):
        swan.register_activation("fles", leaky)


def test_half_precision_and_frozen_parts_are_met():
    net = Calls().to(torch.bfloat16).eval()
    swapped = swapped_in(net, "fles", image(2, 3, 8, 8).to(torch.bfloat16))
    assert {p.dtype for p in swapped.parameters()} == {torch.bfloat16}


def test_kappas_are_told_and_drawn():
    net, x = prepared(Calls()), image(4, 3, 8, 8)
    swapped = swapped_in(net, "fles", x)
    started = swan.kappas(swapped, [x])
    assert {own.quantiles for own in started.spreads} == {(1.0,) * 5}
    shake_(swapped)
    found = swan.kappas(swapped, [x[:2], (x[2:], torch.zeros(len(x) - 2))])
    assert [own.name for own in found.spreads[::2]] == [p.name for p in swan.swaps(swapped).swapped]
    given: list[Tensor] = []
    swapped.act_2.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    swapped(x)
    vertical = swapped.act_2.kappas(given[0])[0].detach().flatten().sort().values
    assert found.spreads[4].quantiles[2] == float(vertical[round(0.5 * (len(vertical) - 1))])
    assert found.to_svg().count("<circle") == 10
    assert "act_2  kappa_ve" in str(found)
    with pytest.raises(swan.InputError, match="no FleS"):
        swan.kappas(net, [x])
    with pytest.raises(swan.InputError, match="no batch"):
        swan.kappas(swapped, [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 4])
def test_prelu_is_a_base_with_its_own_slopes(dtype, width):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.PReLU(width), nn.Conv2d(4, 2, 1)).to(dtype)
    x = image(2, 3, 4, 4).to(dtype)
    swapped = swapped_in(net, "fles", x)
    assert torch.equal(net(x), swapped(x))
    assert swapped[1].base.base.weight.shape == (width,)
    with pytest.raises(swan.InputError, match="PReLU already"):
        swapped_in(net, "prelu", x)


@pytest.mark.filterwarnings("ignore:fles-proto")
@pytest.mark.parametrize("name", sorted(KINDS))
@pytest.mark.parametrize("start", ["identity", "blend", "fresh"])
def test_under_autocast_an_activation_keeps_the_type_it_is_given(name: str, start) -> None:
    """Torch's lerp refuses two types, and half precision is what autocast is for."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))
    try:
        swapped = swan.swap_activations(model, name, torch.randn(6, 4), start=start)
    except swan.InputError:
        return  # it is there already, or has no such start
    kinds = []
    for place in swan.swaps(swapped).swapped:
        module = swapped.get_submodule(place.name)
        module.register_forward_hook(
            lambda _m, given, out: kinds.append((given[0].dtype, out.dtype))
        )
    with torch.autocast("cpu", torch.bfloat16):
        swapped.train()(torch.randn(6, 4)).float().sum().backward()
    assert kinds
    assert all(given == out == torch.bfloat16 for given, out in kinds)


@pytest.mark.parametrize("start", ["identity", "blend", "fresh"])
def test_what_works_in_place_on_something_that_is_read_again_is_refused(start) -> None:
    """Anew too: the shortcut would read what no activation has seen."""

    class PreActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(self.act(x)) + x

    with pytest.raises(swan.VerificationError, match="in place"):
        swan.swap_activations(
            PreActivation().double(), "fles", torch.randn(3, 4).double(), start=start
        )


def test_only_the_channels_that_are_dead_most_often_are_activated(tmp_path):
    net, x = prepared(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))), image(64, 3)
    with torch.no_grad():
        net[0].bias.copy_(torch.tensor([9.0, -9, 9, 9, -9, 9, 9, 9]))
    swapped = swapped_in(net, "ap", x)
    swan.activate_dead(swapped, [x[:40], (x[40:], None)], part=0.25, slope=0.1)
    own = swapped.get_submodule("1")
    assert own.chosen.nonzero().flatten().tolist() == [1, 4]
    h = net[0](x)
    wanted = h.relu()
    wanted[:, [1, 4]] = nn.functional.leaky_relu(h[:, [1, 4]], 0.1)
    assert torch.allclose(swapped(x), net[2](wanted), atol=1e-12)
    swapped(x).square().sum().backward()
    assert own.slope.grad.nonzero().flatten().tolist() == [1, 4]
    swan.save(swapped, tmp_path / "ap.swan")
    assert torch.equal(swan.load(tmp_path / "ap.swan", net)(x), swapped(x))
    swan.activate_dead(swapped, [x], part=0)
    assert torch.equal(swapped(x), net(x))
    with pytest.raises(swan.InputError, match="no batch"):
        swan.activate_dead(swapped, [])
    with pytest.raises(swan.InputError, match="from 0 to 1"):
        swan.activate_dead(swapped, [x], part=1.5)
    with pytest.raises(swan.InputError, match='no "ap"'):
        swan.activate_dead(net, [x])
