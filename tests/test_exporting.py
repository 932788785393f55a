"""Exports agree with the model, take any batch where the model does, and nothing wrong is kept."""

import sys

import onnx
import pytest
import torch
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.exporting import verified
from tests.closing import close_random_
from tests.gated_zoo import fresh_zoo
from tests.small_nets import Net, conv
from tests.zoo import ZOO


SUFFIXES = (".onnx", ".pt2")


def small(name: str = "vgg") -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A pruned network in float32, which onnxruntime runs, and one sample."""
    gated = fresh_zoo(name, dtype=torch.float32)
    close_random_(gated, 0.4, 0)
    return swan.prune(gated), tuple(x[:1] for x in gated.example_inputs.args)


class TakesADict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, batch):
        return {"out": self.b(torch.relu(self.a(batch["x"])))}


@pytest.mark.slow
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_dict_as_the_last_argument_is_one_argument(suffix, tmp_path) -> None:
    batch = ({"x": torch.randn(2, 4)},)
    gated = swan.swanify(TakesADict(), batch)
    gated.close("a", range(4))
    assert swan.export(swan.prune(gated), tmp_path / f"x{suffix}", batch).has_dynamic_batch


@pytest.mark.slow
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "name", [pytest.param("vgg", marks=pytest.mark.thorough), "shufflenet", "two_stems"]
)
def test_agrees_at_any_batch_size(name, suffix, tmp_path) -> None:
    model, inputs = small(name if name in ZOO else "vgg")
    before = [p.detach().clone() for p in model.parameters()]
    model.train()
    found = swan.export(model, tmp_path / f"x{suffix}", inputs)
    assert found.batches == (1, 2, 5)
    assert found.has_dynamic_batch
    assert found.relative_error <= 1e-4
    assert found.size_bytes == (tmp_path / f"x{suffix}").stat().st_size
    assert [p.name for p in tmp_path.iterdir()] == [f"x{suffix}"]
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_batch_that_the_code_fixes_stays_fixed(suffix, tmp_path) -> None:
    net = Net(lambda m, x: m.a(x).view(3, 4, 16).sum(2), a=conv(2, 4)).eval()
    found = swan.export(net, tmp_path / f"x{suffix}", torch.randn(3, 2, 4, 4))
    assert found.batches == (3,)
    assert not found.has_dynamic_batch


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_fixed_batch_can_be_asked_for(suffix, tmp_path) -> None:
    net = Net(lambda m, x: m.a(x), a=conv(2, 4)).eval()
    found = swan.export(net, tmp_path / f"x{suffix}", torch.randn(2, 2, 4, 4), dynamic_batch=False)
    assert found.batches == (2,)


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = conv(2, 4)

    def forward(self, x, y, *, scale=1.0):
        return {"out": self.a(x) * scale + y, "pair": (x, y.flatten(1))}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("as_dict", [True, False])
def test_several_inputs_by_name_and_nested_outputs(suffix, as_dict, tmp_path) -> None:
    x, y = torch.randn(2, 2, 4, 4), torch.randn(2, 4, 4, 4)
    inputs = {"x": x, "y": y, "scale": 2.0} if as_dict else (x, y)
    found = swan.export(Keywords(), tmp_path / f"x{suffix}", inputs)
    assert found.batches == (2, 1, 5)


def test_the_file_is_what_other_tools_read(tmp_path) -> None:
    model, inputs = small()
    swan.export(model, tmp_path / "x.pt2", inputs)
    loaded = torch.export.load(tmp_path / "x.pt2").module()
    with torch.no_grad():
        assert torch.equal(loaded(*inputs), model.eval()(*inputs))


class TestRefusals:
    def test_suffix(self, tmp_path) -> None:
        with pytest.raises(swan.InputError, match=r"'x\.tflite': .* one of \.onnx, \.pt2"):
            swan.export(nn.Linear(2, 2), tmp_path / "x.tflite", torch.randn(1, 2))

    def test_gated(self, tmp_path) -> None:
        with pytest.raises(swan.ModelError, match=r"export what swan\.prune\(gated\) returns"):
            swan.export(fresh_zoo("vgg", dtype=torch.float32), tmp_path / "x.pt2", ZOO["vgg"]()[1])

    def test_inputs_that_do_not_fit(self, tmp_path) -> None:
        with pytest.raises(swan.InputError, match="Linear cannot be run on the example inputs"):
            swan.export(nn.Linear(2, 2), tmp_path / "x.pt2", torch.randn(1, 3))

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_what_cannot_be_exported(self, suffix, tmp_path) -> None:
        net = Net(lambda m, x: m.a(x) * (2.0 if float(x.sum()) > 0 else 3.0), a=conv(2, 4))
        (tmp_path / f"x{suffix}").write_text("the old file")
        with pytest.raises(swan.ExportError, match=f"cannot be exported to {suffix}: ") as err:
            swan.export(net, tmp_path / f"x{suffix}", torch.randn(2, 2, 4, 4))
        text = str(err.value)
        assert not {"\n", "\x1b"} & set(text)
        assert len(text) < 300
        assert "data-dependent" in text  # torch's reason, not its advice
        assert (tmp_path / f"x{suffix}").read_text() == "the old file"

    def test_what_computes_something_else_is_not_kept(self, tmp_path, monkeypatch) -> None:
        def wrong(model, path, inputs, shapes):
            run = verified._to_pt2(model, path, inputs, shapes)
            return lambda given: [1.01 * tensor for tensor in run(given)]

        monkeypatch.setattr(verified, "EXPORTERS", {".pt2": wrong})
        with pytest.raises(
            swan.ExportError, match=r"computes something else: relative error 9\.9e-03"
        ):
            swan.export(nn.Linear(2, 2), tmp_path / "x.pt2", torch.randn(2, 2))
        assert not list(tmp_path.iterdir())

    def test_the_extra_is_named_where_it_is_missing(self, tmp_path, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(swan.MissingExtraError, match=r"pip install 'swan-surgery\[export\]'"):
            swan.export(nn.Linear(2, 2), tmp_path / "x.onnx", torch.randn(2, 2))

    def test_an_unwritable_place(self, tmp_path) -> None:
        with pytest.raises(swan.WritingError, match="cannot write"):
            swan.export(nn.Linear(2, 2), tmp_path / "none" / "x.pt2", torch.randn(2, 2))


class Renames(nn.Module):
    """Returns what it is told to, of one and the same linear layer."""

    def __init__(self, returns) -> None:
        super().__init__()
        self.linear, self.returns = nn.Linear(4, 4), returns

    def forward(self, x):
        return self.returns(x, self.linear(x))


RETURNS = {
    "one": (lambda x, y: y, ["output"]),
    "several": (lambda x, y: (y, [y + 1, y.mean(1)]), ["output_0", "output_1_0", "output_1_1"]),
    "by name": (
        lambda x, y: {"logits": y, "more": (y + 1, {"b": y - 1})},
        ["logits", "more.0", "more.1.b"],
    ),
    "called as an input": (lambda x, y: {"x": y}, ["x_out"]),
    "called as a weight": (lambda x, y: {"linear.weight": y}, ["linear.weight_out"]),
    "the input itself": (lambda x, y: {"same": x, "other": y}, ["same", "other"]),
    "rows in one": (lambda x, y: y.reshape(-1), ["output"]),
}


@pytest.mark.parametrize("name", RETURNS)
def test_onnx_speaks_of_outputs_as_the_model_does(name, tmp_path) -> None:
    returns, names = RETURNS[name]
    found = swan.export(Renames(returns), tmp_path / "x.onnx", torch.randn(2, 4))
    assert found.has_dynamic_batch
    graph = onnx.load(tmp_path / "x.onnx").graph
    assert [own.name for own in graph.output] == names
    assert [own.name.removesuffix("_orig") for own in graph.input] == [
        "x"
    ]  # torch's, if it is returned
    axes = {
        axis.dim_param
        for own in (*graph.input, *graph.output, *graph.value_info)
        for axis in own.type.tensor_type.shape.dim
        if axis.dim_param
    }
    assert axes == ({"batch", "4*batch"} if name == "rows in one" else {"batch"})


def test_a_tensor_returned_twice_keeps_the_exporters_names(tmp_path) -> None:
    model = Renames(lambda x, y: {"a": y, "b": y})
    assert swan.export(model, tmp_path / "x.onnx", torch.randn(2, 4)).relative_error < 1e-6


def test_a_path_in_another_place_is_named(tmp_path) -> None:
    net, x = nn.Linear(4, 4), torch.randn(2, 4)
    with pytest.raises(
        swan.InputError, match=r"got Tensor; the call is swan\.export\(model, path, e"
    ):
        swan.export(net, x, tmp_path / "x.onnx")
    with pytest.raises(swan.InputError, match=r"got Linear; the call is swan\.load\(path, model\)"):
        swan.load(net, net)


def test_a_model_of_any_arguments_takes_any_batch(tmp_path) -> None:
    class Star(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 2)

        def forward(self, x: Tensor, *args: Tensor, y: Tensor | None = None) -> Tensor:
            others = [*args, *([] if y is None else [y])]
            return self.net(x) + sum(self.net(own) for own in others)

    x = torch.randn(4, 3)
    for index, given in enumerate((x, (x, x.flip(0)), {"x": x, "y": x.flip(0)})):
        done = swan.export(Star().eval(), tmp_path / f"star_{index}.onnx", given)
        assert done.has_dynamic_batch, index


@pytest.mark.filterwarnings("ignore:widths hardly vary")
@pytest.mark.parametrize("structure", ["nested", "free"])
def test_a_masked_adaptive_model_takes_any_batch(structure, tmp_path) -> None:
    """The length of its inputs was a number in the graph."""
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 20)).eval()
    x = torch.randn(16, 3)
    adapted = swan.adapt(net, x[:2], structure=structure).eval()
    swan.calibrate_widths(adapted, [x])
    swan.fit_widths(adapted, [x], macs=0.9)
    small = swan.compact(adapted, execution="masked")
    done = swan.export(small, tmp_path / "adaptive.onnx", x[:4])
    assert done.has_dynamic_batch
    assert len(done.batches) > 2
