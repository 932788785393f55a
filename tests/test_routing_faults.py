"""What a fresh reading of routing found: inputs unlike the examples, code that graphs do not hold, certificates that no longer hold."""

import math
from collections import UserDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import swan_surgery as swan
from swan_surgery.errors import InputError
from swan_surgery.models import as_inputs
from swan_surgery.routing import exporting
from tests.small_nets import Net


X = torch.randn(8, 4, generator=torch.Generator().manual_seed(3))


def net(run: Callable[[Any, Tensor], Any], **more: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    own = {"a": nn.Linear(4, 16), "r": nn.ReLU(), "b": nn.Linear(16, 16), "c": nn.Linear(16, 3)}
    return Net(run, **own, **more).eval()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    return nn.Sequential(*layers).eval()


def halved(routed: swan.RoutedModel, x: Tensor = X) -> swan.RoutedModel:
    """At the median of its scores."""
    with torch.no_grad():
        scores = routed.score(routed.parts, 0, routed.parts.trunk(x))[0].sort().values
    middle = len(scores) // 2
    routed.thresholds = [float(scores[middle - 1 : middle + 1].double().mean())]
    return routed


def written(m: Any, x: Tensor) -> Tensor:
    h = m.b(m.r(m.a(x)))
    h.clamp_(-6, 6)
    return m.c(h)


def written_in_front(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    F.hardtanh(h, -6, 6, inplace=True)
    return m.c(m.b(m.r(h)))


def written_at_times(m: Any, x: Tensor) -> Tensor:
    h = m.r(m.a(x))
    if float(h.max()) > 20:
        h.mul_(0.1)
    return m.c(F.relu(m.b(h)))


def written_around(m: Any, x: Tensor) -> Tensor:
    h = m.r(m.a(x))
    h.data.mul_(0.5)
    return m.c(F.relu(m.b(h)))


@pytest.mark.parametrize("run", [written, written_in_front, written_at_times, written_around])
@pytest.mark.parametrize("decide", ["predicted", "margin"])
def test_inputs_unlike_the_example_come_out_as_of_the_model(run: Any, decide: str) -> None:
    model = net(run)
    routed = swan.add_switch(model, "r", example_inputs=X, light=1, decide=decide).eval()
    for threshold in (
        -math.inf,
        -1.0,
    ):  # nothing leaves; the light branch runs first, or not at all
        routed.thresholds = [threshold]
        with torch.no_grad():
            assert torch.equal(routed(1e4 * X), model(1e4 * X))


class Padded(nn.Module):
    """Token 1 is padding; every block reads the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(50, 16)
        self.l = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2)
        )
        self.h = nn.Linear(16, 3)

    def forward(self, t: Tensor) -> Tensor:
        pad, h = t == 1, self.e(t)
        for layer in self.l:
            h = layer(h, src_key_padding_mask=pad)
        return self.h(h[:, 0])


def zero_rows(m: Any, x: Tensor) -> Tensor:
    pad = x.abs().sum(-1) == 0
    return m.c(m.b(m.r(m.a(x))).masked_fill(pad[:, None], 0.0))


def decided_in_front(m: Any, x: Tensor) -> Tensor:
    large = bool(x.abs().max() > 20)
    h = m.b(m.r(m.a(x)))
    return m.c(h * 2 if large else h)


def decided_behind(m: Any, x: Tensor) -> Tensor:
    largest = x.abs().max()
    h = m.b(m.r(m.a(x)))
    return m.c(h * 2 if largest > 20 else h)


def as_a_list(m: Any, x: Tensor) -> Tensor:
    scale = x.abs().amax().tolist()
    return m.c(m.b(m.r(m.a(x)))) * (1 if scale < 20 or math.isnan(scale) else 2)


@pytest.mark.parametrize("run", [zero_rows, decided_in_front, decided_behind, as_a_list])
def test_what_else_is_read_behind_shows_where_the_example_does_not_show_it(run: Any) -> None:
    with pytest.raises(InputError, match="needs its output to be all that is read behind it"):
        swan.add_switch(net(run), "r", example_inputs=X, light=1)


def test_a_padding_mask_is_read_behind_also_without_padding() -> None:
    tokens = torch.randint(2, 50, (4, 7))
    with pytest.raises(InputError, match="the model's input is read behind it, too"):
        swan.add_switch(Padded().eval(), "l.0", example_inputs=tokens, light=0.5)


def test_paths_in_front_of_the_switch_are_the_models_own() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        if bool((h > 20).any()):
            h = h / 10
        return m.c(m.b(m.r(h)))

    model = net(run)
    routed = swan.add_switch(model, "r", example_inputs=X, light=1).eval()
    assert routed.way[0].startswith("as it runs")
    for x in (X, 1e3 * X):
        assert torch.equal(routed(x), model(x))


def test_a_size_that_the_crossing_tensor_does_not_show_is_refused() -> None:
    model = Net(
        lambda m, x: F.interpolate(m.c(m.b(m.p(m.a(x)))), size=x.shape[-2:]),
        a=nn.Conv2d(3, 8, 3), p=nn.AdaptiveAvgPool2d(2), b=nn.Conv2d(8, 8, 1), c=nn.Conv2d(8, 4, 1),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    routed = swan.add_switch(model, "p", example_inputs=x, light=1, decide="predicted").eval()
    assert torch.equal(routed(x[:1]), model(x[:1]))
    with pytest.raises(InputError, match=r"\[2, 3, 16, 16\].*takes inputs of the example's size"):
        routed(torch.randn(2, 3, 16, 16))


def on_both_sides(m: Any, x: Tensor) -> Tensor:
    h = m.r(m.n(m.a(x)))
    if bool((h > 1e9).any()):
        h = h * 0
    return m.c(m.n(m.b(h)))


def test_statistics_on_both_sides_of_a_switch_are_refused() -> None:
    model = net(on_both_sides, n=nn.BatchNorm1d(16))
    with pytest.raises(InputError, match=r"keeps statistics \('n\.[a-z_]+'\).*both sides"):
        swan.add_switch(model, "r", example_inputs=X, light=1, decide="predicted")


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "largest": lambda h: h / h.abs().max(),
    "mean": lambda h: h - h.mean(),
    "sums": lambda h: h.cumsum(0),
    "next one": lambda h: h + h.roll(-1, 0),
}


@pytest.mark.parametrize("kind", MIXING)
def test_branches_that_mix_samples_are_seen(kind: str) -> None:
    own = Net(lambda _, h: MIXING[kind](h))
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), own, nn.Linear(8, 3)).double().eval()
    with pytest.raises(InputError, match="mixes samples"):
        swan.add_switch(model, "1", example_inputs=X.double(), light=1, decide="predicted")


def test_time_in_front_is_no_batch() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.r, self.g, self.h = (
                nn.Linear(4, 8),
                nn.ReLU(),
                nn.GRU(8, 8),
                nn.Linear(8, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.h(self.g(self.r(self.e(x)))[0])
            return out

    with pytest.raises(InputError, match="mixes samples"):
        swan.add_switch(
            Recurrent().eval(),
            "r",
            example_inputs=torch.randn(10, 2, 4),
            light=1,
            decide="predicted",
        )


@dataclass
class Held:
    features: Tensor


def test_outputs_that_cannot_be_put_together_are_refused() -> None:
    two = nn.Linear(16, 3)

    def named(m: Any, x: Tensor) -> dict[str, Tensor]:
        h = m.r(m.a(x))
        return {"one": m.c(h), "two": m.d(h)}

    model = net(named, d=two)
    for light in (
        Net(lambda m, h: {"two": m.d(h), "one": m.c(h)}, c=nn.Linear(16, 3), d=two),
        Net(lambda m, h: (m.c(h), m.d(h)), c=nn.Linear(16, 3), d=two),
        Net(lambda m, h: {"one": m.c(h), "two": m.d(h).double()}, c=nn.Linear(16, 3), d=two),
    ):
        with pytest.raises(InputError, match="same shapes and types, in the same structure"):
            swan.add_switch(model, "r", example_inputs=X, light=light.eval(), decide="predicted")

    def holding(m: Any, x: Tensor) -> Any:
        h = m.b(m.r(m.a(x)))
        return m.c(h), Held(h)

    with pytest.raises(InputError, match="a Held that holds tensors"):
        swan.add_switch(net(holding), "r", example_inputs=X, light=1, decide="predicted")


@pytest.mark.parametrize("batch", [1, 3])
def test_outputs_follow_the_batch(batch: int) -> None:
    def run(m: Any, x: Tensor) -> Any:
        return m.c(m.b(m.r(m.a(x)))), m.c.weight[:batch] * 1

    with pytest.raises(InputError, match="for twice as many samples; a switch needs outputs"):
        swan.add_switch(net(run), "r", example_inputs=X[:batch], light=1, decide="predicted")


def test_a_block_that_turns_autocast_off_is_no_graph() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.r(m.a(x))
        with torch.autocast("cpu", enabled=False):
            h = m.b(h.float())
        return m.c(h)

    model = net(run)
    routed = swan.add_switch(model, "r", example_inputs=X, light=1, decide="predicted").eval()
    gated = swan.swanify(model, X).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(routed(X), model(X))
        assert torch.equal(gated(X), model(X))


def test_threads_share_a_model_that_is_cut_as_it_runs() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.r(m.a(x))
        if bool((h > 1e9).any()):
            h = h * 0
        for _ in range(20):
            h = m.b(h).tanh()
        return m.c(h)

    model = net(run)
    routed = swan.add_switch(model, "r", example_inputs=X, light=1, decide="predicted").eval()
    inputs = [torch.randn(8, 4) for _ in range(200)]

    def one(x: Tensor) -> Tensor:
        with torch.no_grad():
            return routed(x)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(one, inputs))
    with torch.no_grad():
        assert all(torch.equal(own, model(x)) for own, x in zip(found, inputs, strict=True))


def test_a_model_cut_as_it_runs_may_change_its_type() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.r(m.a(x @ m.d.weight))
        if bool((h > 1e9).any()):
            h = h * 0
        return m.c(m.b(h))

    model = net(run, d=nn.Linear(4, 4))
    routed = swan.add_switch(model, "r", example_inputs=X, light=1).eval()
    assert torch.equal(routed.double()(X.double()), model.double()(X.double()))


def test_code_in_front_that_backward_runs_again_is_named() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        def inner(h: Tensor) -> Tensor:
            return F.relu(m.b(m.r(m.a(h))))

        return m.c(checkpoint(inner, x, use_reentrant=False))

    routed = swan.add_switch(net(run), "r", example_inputs=X, light=1, frozen=False).train()
    with pytest.raises(swan.ModelError, match="activation checkpointing"):
        routed.loss(X).backward()


@pytest.mark.parametrize("kind", ["bfloat16", "autocast"])
def test_as_many_leave_as_were_certified_in_low_precision(kind: str) -> None:
    for seed in range(12):
        torch.manual_seed(seed)
        model, x = mlp(), torch.randn(300, 4)
        if kind == "bfloat16":
            model, x = model.bfloat16(), x.bfloat16()
        routed = swan.add_switch(
            model, "1", example_inputs=x[:4], light=0.2, decide="predicted"
        ).eval()
        light = nn.Sequential(routed.parts.light, Net(lambda _, y: y * math.nan))
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"), torch.no_grad():
            certificate = swan.calibrate_switch(routed, [x], share=0.3)
            routed.parts.light = light  # so that it shows who leaves
            left = int(routed(x).isnan().any(1).sum())
        assert left == round(certificate.shares[0] * 300)


def test_a_certificate_is_of_the_mask_and_of_the_way_of_deciding() -> None:
    model, x = mlp(), torch.randn(300, 4)
    y = model(x).argmax(1)
    routed = swan.add_switch(
        model, "1", example_inputs=x[:4], light=0.5, mask=True, decide="predicted"
    ).eval()
    swan.calibrate_switch(routed, [(x, y)], harm=0.1)
    assert swan.route_stats(routed, [(x, y)]).certificate is not None
    routed.decide = ["margin"]
    assert swan.route_stats(routed, [(x, y)]).certificate is None
    with pytest.raises(InputError, match="pass shares="):
        swan.expected_macs(routed)
    routed.decide = ["predicted"]
    with torch.no_grad():
        routed.gated.gates.logits[:2] = -3.0
    assert swan.route_stats(routed, [(x, y)]).certificate is None


def test_classes_lie_on_either_axis_and_where_both_fit_it_is_asked() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)
    )
    routed = swan.add_switch(
        model.eval(), "1", example_inputs=torch.randn(2, 5, 4), light=0.2, decide="predicted"
    )

    def harm(tokens: int) -> tuple[float, float]:
        x = torch.randn(200, tokens, 4)
        y = model(x).argmax(-1)
        found = swan.calibrate_switch(routed.eval(), [(x, y)], harm=0.9)
        with torch.no_grad():
            _, (light,), _ = routed.parts(x)
            leaves = routed.score(routed.parts, 0, routed.parts.trunk(x))[0] <= found.thresholds[0]
            wrong = (light.argmax(-1) != y).double().mean(1)
        return found.harmed[0], float(wrong[leaves].sum())

    one, two = harm(7)
    assert one == pytest.approx(two)
    with pytest.raises(InputError, match="on axis 1 or on the last one"):
        harm(5)


def test_segmentation_in_batches_of_any_size() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 4, 1)
    )
    x = torch.randn(60, 3, 4, 4)
    y = model.eval()(x).argmax(1)
    routed = swan.add_switch(model, "1", example_inputs=x[:4], light=0.3).eval()
    bounds = [
        swan.calibrate_switch(
            routed, list(zip(x.split(n), y.split(n), strict=True)), harm=0.5
        ).bound
        for n in (60, 25, 4)
    ]
    assert max(bounds) - min(bounds) < 0.02  # rounding may tell a sample at the threshold otherwise


def test_a_mask_behind_attention() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.m = nn.Linear(4, 8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.f, self.r, self.c = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            h = h + self.m(h, h, h, need_weights=False)[0]
            out: Tensor = self.c(self.r(self.f(h)).mean(1))
            return out

    model, x = Attending().double().eval(), torch.randn(3, 5, 4).double()
    routed = swan.add_switch(model, "r", example_inputs=x, light=1, mask=True).eval()
    assert routed.gated.gates.num_units == 8
    with torch.no_grad():
        routed.gated.gates.logits[:3] = -3.0
        torch.testing.assert_close(swan.cut_mask(routed)(x), routed(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("threshold", [-math.inf, math.inf, 0.9])
def test_an_export_is_compared_wherever_its_threshold_lies(
    threshold: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    routed = swan.add_switch(mlp(), "1", example_inputs=X, light=0.5).eval()
    routed.thresholds = [threshold]
    assemble = exporting._assemble

    def spoilt(routed: Any, parts: Any, inputs: Any, folder: Path) -> bytes:
        with torch.no_grad():
            for part in (parts.last, parts.light):
                list(part.parameters())[-1].add_(5)
        return assemble(routed, parts, inputs, folder)

    monkeypatch.setattr(exporting, "_assemble", spoilt)
    with pytest.raises(swan.ExportError, match="computes something else"):
        swan.export_routed(routed, tmp_path / "a.onnx")
    assert bool(exporting._sure(routed, as_inputs(X)).any())


def test_errors_of_an_export_are_seen_where_numbers_are_not_finite() -> None:
    sure = torch.tensor([True])
    for found, wanted in (([[math.nan]], [[1.0]]), ([[9.0, -math.inf]], [[1.0, -math.inf]])):
        assert exporting._error([torch.tensor(found).numpy()], [torch.tensor(wanted)], sure) > 1


def test_flags_are_exported(tmp_path: Path) -> None:
    def run(m: Any, x: Tensor) -> Any:
        out = m.c(m.b(m.r(m.a(x))))
        return out, out > 0

    routed = swan.add_switch(net(run), "r", example_inputs=X, light=1, decide="predicted").eval()
    assert swan.export_routed(halved(routed), tmp_path / "a.onnx").relative_error < 1e-5


def test_the_example_inputs_are_kept_and_random_numbers_drawn_as_in_the_model() -> None:
    model = net(lambda m, x: m.c(F.dropout(m.r(m.a(x)), 0.5, True)))
    x = X.clone()
    routed = swan.add_switch(model, "r", example_inputs=x, light=1).eval()
    x.zero_()
    assert torch.equal(routed.example_inputs.args[0], X)
    torch.manual_seed(0)
    found = routed(X)
    torch.manual_seed(0)
    assert torch.equal(found, model(X))


def test_batches_of_any_kind_and_masked_class_scores() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.r, self.b, self.c = (
                nn.Linear(4, 8),
                nn.ReLU(),
                nn.Linear(8, 8),
                nn.Linear(8, 3),
            )

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            out = self.c(self.b(self.r(self.a(x * scale))))
            return out.masked_fill(torch.tensor([False, False, True]), -math.inf)

    given = {"x": X, "scale": torch.tensor(2.0)}
    routed = swan.add_switch(Scaled().eval(), "r", example_inputs=given, light=1).eval()
    assert math.isfinite(float(routed.loss(UserDict(given)).detach()))
    for batch in (given, UserDict(given)):
        assert swan.calibrate_switch(routed, [batch], share=0.5).shares[0] == 0.5


def test_whole_numbers_among_the_parameters_stay_as_they_are() -> None:
    model = net(lambda m, x: m.c(m.b(m.r(m.a(x)))[:, m.i]))
    model.i = nn.Parameter(torch.arange(16), requires_grad=False)
    routed = swan.add_switch(model, "r", example_inputs=X, light=1).unfreeze()
    assert all(p.requires_grad == p.is_floating_point() for p in routed.parameters())


@pytest.mark.parametrize(
    "positive",
    [lambda y: y.tolist(), lambda y: torch.stack([y, y], 1)],
    ids=["list", "columns"],
)
def test_flags_of_the_wrong_kind_are_refused(positive: Callable[[Tensor], Any]) -> None:
    routed = swan.add_switch(
        mlp(), "1", example_inputs=X, light=None, default=torch.zeros(3), positive=positive
    )
    with pytest.raises(InputError, match="positive= must return a tensor of one flag per label, 8"):
        routed.loss((X, torch.arange(8) % 2))


def wrong_labels() -> Sequence[Any]:
    x = torch.randn(100, 4)
    y = mlp()(x).argmax(1)
    return [(x, y[:, None]), (x, y.tolist()), (x, y.float())]


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_labels_of_another_kind_are_told_from_none(kind: int) -> None:
    routed = swan.add_switch(mlp(), "1", example_inputs=X, light=0.5).eval()
    with pytest.raises(InputError, match="labels of classes, a tensor of whole numbers"):
        swan.calibrate_switch(routed, [wrong_labels()[kind]], harm=0.1)
    with pytest.raises(InputError, match="loss must be a function"):
        swan.calibrate_switch(routed, [X], harm=0.1, loss=5)
