"""Files: back as they were, bit by bit; what is damaged, foreign or wrong is refused; nothing is lost."""

import copy
import json
import multiprocessing
import os
import re
import resource
import signal
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.artifacts import container, structures
from swan_surgery.models import provenance, steps
from tests.closing import close_, close_random_, image, learnt_, outputs, prepared
from tests.fingerprints import assert_same_fingerprint, fingerprint
from tests.gated_zoo import fresh_zoo
from tests.small_nets import Net, conv
from tests.zoo import ZOO


def pruned(name: str, *, share: float = 0.4) -> tuple[nn.Module, tuple[Tensor, ...]]:
    gated = fresh_zoo(name, dtype=torch.float32)
    close_random_(gated, share, 0)
    return swan.prune(gated).eval(), gated.example_inputs.args


def fresh(name: str) -> nn.Module:
    """The same class with other weights."""
    model = ZOO[name]()[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def assert_same(one: nn.Module, two: nn.Module, inputs: object) -> None:
    # What repeats widths in its code is of a class made for it, in front of its own.
    assert type(one).__mro__[-3:] == type(two).__mro__[-3:]
    assert type(one).__qualname__ == type(two).__qualname__
    first, second = one.state_dict(), two.state_dict()
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
        assert tensor.dtype == second[name].dtype
        assert tensor.stride() == second[name].stride()
    flags = [[p.requires_grad for p in m.parameters()] for m in (one, two)]
    assert flags[0] == flags[1]
    assert one.training == two.training
    for a, b in zip(outputs(one.eval(), inputs), outputs(two.eval(), inputs), strict=True):
        assert torch.equal(a, b)


class TestRoundTrip:
    @pytest.mark.parametrize("name", sorted(ZOO))
    def test_pruned(self, name, tmp_path) -> None:
        small, inputs = pruned(name)
        swan.save(small, tmp_path / "small.swan")
        base = fresh(name)
        before = fingerprint(base)
        loaded = swan.load(tmp_path / "small.swan", model=base)
        assert_same_fingerprint(before, fingerprint(base))
        assert_same(loaded, small, inputs)
        assert repr(loaded) == repr(small)

    @pytest.mark.parametrize("name", sorted(ZOO))
    def test_gated(self, name, tmp_path) -> None:
        gated = fresh_zoo(name, dtype=torch.float32)
        inputs = gated.example_inputs.args
        close_random_(gated, 0.4, 0)
        gated.gates.threshold = 0.4
        gated.gates.mode = "soft"
        gated.gates.min_width = 2
        gated.eval()
        swan.save(gated, tmp_path / "gated.swan")
        loaded = swan.load(tmp_path / "gated.swan", model=fresh(name))
        assert isinstance(loaded, swan.GatedModel)
        assert (loaded.gates.mode, loaded.gates.min_width) == ("soft", 2)
        assert torch.equal(loaded.gates.open_mask(), gated.gates.open_mask())
        assert_same(loaded, gated, inputs)
        assert_same(swan.prune(loaded), swan.prune(gated), inputs)

    def test_a_file_saves_again_as_the_same_file(self, tmp_path) -> None:
        small, _ = pruned("densenet")
        swan.save(small, tmp_path / "a.swan")
        swan.save(swan.load(tmp_path / "a.swan", model=fresh("densenet")), tmp_path / "b.swan")
        assert (tmp_path / "a.swan").read_bytes() == (tmp_path / "b.swan").read_bytes()

    def test_two_cuts(self, tmp_path) -> None:
        small, inputs = pruned("resnet_projection")
        gated = swan.swanify(small, inputs)
        close_random_(gated, 0.4, 3)
        smaller = swan.prune(gated)
        swan.save(smaller, tmp_path / "x.swan")
        loaded = swan.load(tmp_path / "x.swan", model=fresh("resnet_projection"))
        assert_same(loaded, smaller, inputs)

    def test_trained_on_after_the_cut(self, tmp_path) -> None:
        small, inputs = pruned("vgg")
        optimizer = torch.optim.SGD(small.parameters(), 0.1)
        small.train()(*inputs).sum().backward()
        optimizer.step()
        swan.save(small, tmp_path / "x.swan")
        assert_same(swan.load(tmp_path / "x.swan", model=fresh("vgg")), small, inputs)

    def test_types_layouts_and_frozen_parameters(self, tmp_path) -> None:
        small, inputs = pruned("vgg")
        small = small.to(torch.bfloat16).to(memory_format=torch.channels_last).train()
        next(small.parameters()).requires_grad_(False)
        swan.save(small, tmp_path / "x.swan")
        loaded = swan.load(tmp_path / "x.swan", model=fresh("vgg"))
        assert_same(loaded, small, [x.to(torch.bfloat16) for x in inputs])

    def test_modes_of_single_modules(self, tmp_path) -> None:
        model, inputs = ZOO["vgg"]()
        model.train()
        model.features[1].eval()
        gated = swan.swanify(model, inputs)
        for own in (gated, swan.prune(gated)):
            swan.save(own, tmp_path / "x.swan")
            loaded = swan.load(tmp_path / "x.swan", model=fresh("vgg"))
            modes = [[m.training for m in x.modules()] for x in (own, loaded)]
            assert modes[0] == modes[1]

    def test_views_of_one_memory_and_strange_names(self, tmp_path) -> None:
        class Views(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                memory = torch.arange(8.0)
                self.register_buffer("low", memory[:4])
                self.register_buffer("high", memory[4:])
                self.add_module("inputs/0", nn.Linear(4, 2))

            def forward(self, x):
                return getattr(self, "inputs/0")(x + self.low - self.high)

        model = Views()
        swan.save(model, tmp_path / "x.swan")
        assert_same(swan.load(tmp_path / "x.swan", model=Views()), model, torch.randn(2, 4))

    def test_tied_weights_stay_tied(self, tmp_path) -> None:
        def tied() -> Net:
            first = conv(3, 6)
            net = Net(lambda m, x: m.last(m.a(x) + m.b(x)), a=first, b=conv(3, 6), last=conv(6, 2))
            net.b.weight = net.a.weight
            return prepared(net)

        x = image(2, 3, 4, 4)
        gated = swan.swanify(tied(), x)
        close_(gated, 1, 4)
        small = swan.prune(gated)
        swan.save(small, tmp_path / "x.swan")
        loaded = swan.load(tmp_path / "x.swan", model=tied())
        assert loaded.b.weight is loaded.a.weight
        assert_same(loaded, small, x)
        untied = tied()
        untied.b.weight = nn.Parameter(untied.b.weight.detach().clone())
        with pytest.raises(swan.ArtifactError, match=r"b\.weight has shape"):
            swan.load(tmp_path / "x.swan", model=untied)

    def test_numbers_and_attributes_in_code(self, tmp_path) -> None:
        def run(m, x):
            x = torch.relu(m.a(x)).view(-1, 6, 16).view(-1, m.width, 4, 4)
            return m.last(x)

        def model() -> Net:
            net = prepared(Net(run, a=conv(3, 6), last=conv(6, 2)))
            net.width = 6
            return net

        x = image(2, 3, 4, 4)
        gated = swan.swanify(model(), x)
        close_(gated, 1, 2)
        swan.save(swan.prune(gated), tmp_path / "x.swan")
        loaded = swan.load(tmp_path / "x.swan", model=model())
        assert loaded.width == 4
        assert_same(loaded, swan.prune(gated), x)

    def test_buffers_outside_the_state_dict(self, tmp_path) -> None:
        def model() -> Net:
            net = prepared(
                Net(lambda m, x: m.last(m.a(x) * m.scale), a=conv(3, 6), last=conv(6, 2))
            )
            net.register_buffer("scale", torch.randn(1, 6, 1, 1).double(), persistent=False)
            return net

        x = image(2, 3, 4, 4)
        gated = swan.swanify(model(), x)
        close_(gated, 0)
        small = swan.prune(gated)
        swan.save(small, tmp_path / "x.swan")
        assert_same(swan.load(tmp_path / "x.swan", model=model()), small, x)

    def test_bare_instance_norms(self, tmp_path) -> None:
        def model() -> Net:
            return prepared(
                Net(lambda m, x: m.last(m.n(m.a(x))), a=conv(3, 6), n=nn.InstanceNorm2d(6), last=conv(6, 2))
            )  # fmt: skip

        x = image(2, 3, 4, 4)
        gated = swan.swanify(model(), x)
        close_(gated, 0, 5)
        small = swan.prune(gated)
        swan.save(small, tmp_path / "x.swan")
        loaded = swan.load(tmp_path / "x.swan", model=model())
        assert loaded.n.num_features == 4
        assert_same(loaded, small, x)

    def test_a_model_that_was_never_cut(self, tmp_path) -> None:
        model, inputs = ZOO["vgg"]()
        swan.save(model, tmp_path / "x.swan")
        assert_same(swan.load(tmp_path / "x.swan", model=fresh("vgg")), model, inputs)

    def test_a_base_model_without_memory(self, tmp_path) -> None:
        small, inputs = pruned("vgg")
        swan.save(small, tmp_path / "x.swan")
        loaded = swan.load(tmp_path / "x.swan", model=fresh("vgg").to("meta"))
        assert_same(loaded, small, inputs)

    def test_inputs_of_a_gated_model(self, tmp_path) -> None:
        class TwoWays(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.last = conv(3, 6), conv(6, 2)

            def forward(self, pair, *, scale=1.0, note=None):
                return self.last(self.a(pair[0]) + self.a(pair[1]["x"]) * scale)

        model = prepared(TwoWays())
        x = image(2, 3, 4, 4)
        inputs = {"pair": [x, {"x": 2 * x}], "scale": 0.5}
        gated = swan.swanify(model, inputs, ignore="last").eval()
        swan.save(gated, tmp_path / "x.swan")
        loaded = swan.load(tmp_path / "x.swan", model=prepared(TwoWays()))
        assert loaded.ignored == ("last",)
        assert_same(loaded, gated, inputs)
        given = swan.load(tmp_path / "x.swan", model=prepared(TwoWays()), example_inputs=inputs)
        assert given.channels == gated.channels

    def test_more_than_ten_inputs_come_back_in_order(self, tmp_path) -> None:
        class Many(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.last = conv(3, 6), conv(6, 2)

            def forward(self, *images):
                return self.last(sum(self.a(x) for x in images))

        given = tuple(image(2, 3, 4, 4) + i for i in range(12))
        swan.save(swan.swanify(prepared(Many()), given), tmp_path / "x.swan")
        loaded = swan.load(tmp_path / "x.swan", model=prepared(Many()))
        assert isinstance(loaded, swan.GatedModel)
        assert len(loaded.example_inputs.args) == len(given)
        assert all(map(torch.equal, loaded.example_inputs.args, given))

    def test_inputs_that_are_no_data_must_be_given(self, tmp_path) -> None:
        class WithObject(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.last = conv(3, 6), conv(6, 2)

            def forward(self, x, helper):
                return self.last(self.a(x))

        x = image(2, 3, 4, 4)
        gated = swan.swanify(prepared(WithObject()), (x, Path("x")))
        swan.save(gated, tmp_path / "x.swan")
        with pytest.raises(swan.ArtifactError, match="pass example_inputs to load"):
            swan.load(tmp_path / "x.swan", model=prepared(WithObject()))
        again = swan.load(
            tmp_path / "x.swan", model=prepared(WithObject()), example_inputs=(x, Path("y"))
        )
        assert again.channels == gated.channels


class TestSteps:
    def test_another_kind_of_step_is_done_to_a_fresh_model(self, tmp_path, monkeypatch) -> None:
        """`load` knows no kind by name: a new room registers what its steps do."""

        def deepen(model: nn.Module, step: steps.Step) -> nn.Module:
            return nn.Sequential(*copy.deepcopy(model), nn.ReLU(), nn.Linear(2, step.data["out"]))

        def reshape(shapes: steps.Shapes, step: steps.Step) -> steps.Shapes:
            return {**shapes, "4.weight": (step.data["out"], 2), "4.bias": (step.data["out"],)}

        def net() -> nn.Module:
            return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))

        monkeypatch.setattr(steps, "_KINDS", dict(steps._KINDS))
        steps.register_step("deepen", steps.StepKind(1, deepen, reshape))
        small = swan.prune(learnt_(swan.swanify(net(), torch.zeros(1, 3))), macs=0.5)
        step = steps.Step("deepen", 1, {"out": 4})
        deeper = deepen(small, step)
        provenance.note_(deeper, provenance.provenance_of(small).followed_by(step))
        swan.save(deeper, tmp_path / "x.swan")
        loaded = swan.load(tmp_path / "x.swan", net())
        assert_same(loaded, deeper, [torch.randn(5, 3)])
        del steps._KINDS["deepen"]
        with pytest.raises(swan.ArtifactError, match="'deepen'"):
            swan.load(tmp_path / "x.swan", net())

    def test_a_file_of_the_first_format(self) -> None:
        """Written by commit 2be4396, when a file knew of cuts alone; two of them."""
        base = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
            *(nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 2)),
        )  # fmt: skip
        loaded = swan.load(Path(__file__).parent / "data" / "two_cuts_format_1.safetensors", base)
        assert (loaded[0].out_channels, loaded[4].out_features) == (2, 5)
        x = torch.linspace(-1, 1, 32).view(2, 1, 4, 4)
        wanted = [
            [0.29694539308547974, -0.5834802389144897],
            [0.36366963386535645, -0.46937498450279236],
        ]
        torch.testing.assert_close(loaded(x), torch.tensor(wanted), rtol=1e-5, atol=1e-6)
        found = provenance.provenance_of(loaded)
        assert [(step.kind, step.version) for step in found.steps] == [("cut", 1), ("cut", 1)]
        assert found.macs.after == swan.count_macs(loaded, x)
        assert found.macs.before == swan.count_macs(base, x)


class TestFolder:
    def test_round_trip_and_card(self, tmp_path) -> None:
        model, inputs = ZOO["vgg"]()
        small, _ = pruned("vgg")
        report = swan.report(model, small, inputs)
        swan.save_pretrained(small, tmp_path / "a" / "b", report=report)
        folder = tmp_path / "a" / "b"
        assert sorted(path.name for path in folder.iterdir()) == [
            "README.md",
            "model.safetensors",
            "swan.json",
        ]
        assert_same(swan.load(folder, model=fresh("vgg")), small, inputs)
        card = (folder / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: swan-surgery\n")
        assert report.to_markdown() in card
        summary = json.loads((folder / "swan.json").read_text())
        assert summary["macs"]["after"] == swan.count_macs(small, inputs)
        assert f"{summary['macs']['after']:,} of {summary['macs']['before']:,} MACs" in card

    def test_a_plain_model_has_a_card_without_macs(self, tmp_path) -> None:
        swan.save_pretrained(ZOO["vgg"]()[0], tmp_path)
        assert "MACs" not in (tmp_path / "README.md").read_text()

    def test_the_configuration_of_a_transformer_lies_beside(self, tmp_path) -> None:
        class Config:
            def to_json_string(self) -> str:
                return '{"model_type": "own"}'

        model = ZOO["vgg"]()[0]
        model.config = Config()
        swan.save_pretrained(model, tmp_path)
        assert json.loads((tmp_path / "config.json").read_text()) == {"model_type": "own"}

    def test_no_folder_can_be_made(self, tmp_path) -> None:
        (tmp_path / "file").write_text("x")
        with pytest.raises(swan.WritingError, match="cannot make the folder"):
            swan.save_pretrained(ZOO["vgg"]()[0], tmp_path / "file" / "inside")


class TestTheFile:
    def test_any_safetensors_tool_reads_the_weights(self, tmp_path) -> None:
        small, _ = pruned("vgg")
        swan.save(small, tmp_path / "x.swan")
        with safe_open(tmp_path / "x.swan", framework="pt") as file:
            for name, tensor in small.state_dict().items():
                assert torch.equal(file.get_tensor(name), tensor)
            header = json.loads(file.metadata()["swan_surgery"])
        assert header["format"] == 2
        assert header["class"].endswith(type(small).__name__)

    def test_a_model_changed_after_the_cut_is_refused(self, tmp_path) -> None:
        small, _ = pruned("vgg")
        name = [n for n, m in small.named_modules() if isinstance(m, nn.Linear)][-1]
        owner = small.get_submodule(name.rpartition(".")[0])
        width = small.get_submodule(name).in_features
        setattr(owner, name.rpartition(".")[2], nn.Linear(width, 77).double())
        with pytest.raises(swan.InputError, match="was changed since, and could not be rebuilt"):
            swan.save(small, tmp_path / "x.swan")
        assert not list(tmp_path.iterdir())

    def test_state_that_is_no_tensor_is_refused(self, tmp_path) -> None:
        class Counting(nn.Linear):
            def get_extra_state(self) -> object:
                return {"calls": 3}

            def set_extra_state(self, state: object) -> None:
                pass

        with pytest.raises(swan.InputError, match="'_extra_state' in the state of Counting"):
            swan.save(Counting(2, 2), tmp_path / "x.swan")

    def test_no_model_is_refused(self, tmp_path) -> None:
        with pytest.raises(swan.ModelError, match=r"expected a torch\.nn\.Module, got dict"):
            swan.save({}, tmp_path / "x.swan")
        with pytest.raises(swan.ModelError, match="meta"):
            swan.save(nn.Linear(2, 2, device="meta"), tmp_path / "x.swan")


FORGED = {
    "no provenance": lambda h: h.pop("provenance"),
    "alias of nothing": lambda h: h.update(aliases={"features.0.weight": "features.9.weight"}),
    "no cut": lambda h: set_provenance(h, lambda p: p["steps"].clear()),
    "broken plan": lambda h: set_provenance(h, lambda p: p["steps"][0]["data"].update(plan="{")),
    "no text": lambda h: h.update(provenance="%%"),
    "cut off text": lambda h: h.update(provenance=h["provenance"][:-8]),
    "endless text": lambda h: h.update(provenance=structures.pack("0" * (1 << 28))),
    "a method": lambda h: set_plan(h, attributes=[["", "forward", None, 3]]),
    "a class": lambda h: set_plan(h, attributes=[["", "__class__", None, 3]]),
    "a store": lambda h: set_plan(h, attributes=[["features", "_modules", None, 3]]),
    "a function": lambda h: set_plan(h, numbers=[["", "eval", 1, 0, False, 3, ""]]),
    "positions outside": lambda h: set_plan(
        h, positions=[["features.0.weight", 0, 0]], kept=["f" * 9]
    ),
    "layout": lambda h: h.update(layouts={"features.0.weight": "strange"}),
    "text for a width": lambda h: h.update(bare_norms={"features.0": "x"}),
}


class TestRefusals:
    @pytest.fixture
    def file(self, tmp_path) -> Path:
        swan.save(pruned("vgg")[0], tmp_path / "x.swan")
        return tmp_path / "x.swan"

    def test_no_such_file(self, tmp_path) -> None:
        with pytest.raises(swan.ArtifactError, match=r"none\.swan: no such file"):
            swan.load(tmp_path / "none.swan", model=fresh("vgg"))

    @pytest.mark.parametrize("name", ["densenet", "inverted_residual"])
    def test_another_model(self, file, name) -> None:
        with pytest.raises(swan.ArtifactError, match="was saved from another model: ") as err:
            swan.load(file, model=fresh(name))
        assert "\n" not in str(err.value)

    def test_the_pruned_model_in_place_of_the_base_model(self, file) -> None:
        with pytest.raises(swan.ArtifactError, match="pass model= as it was before swanify"):
            swan.load(file, model=pruned("vgg")[0])

    def test_a_gated_model_in_place_of_the_base_model(self, file) -> None:
        with pytest.raises(swan.ModelError, match="gated already"):
            swan.load(file, model=fresh_zoo("vgg", dtype=torch.float32))

    def test_weights_of_another_tool(self, tmp_path) -> None:
        save_file({"a": torch.zeros(3)}, tmp_path / "x.safetensors")
        with pytest.raises(swan.ArtifactError, match=r"not a whole file written by swan\.save"):
            swan.load(tmp_path / "x.safetensors", model=fresh("vgg"))

    def test_a_pickle(self, tmp_path) -> None:
        torch.save(fresh("vgg").state_dict(), tmp_path / "x.pt")  # noqa: TID251 - to be refused
        with pytest.raises(swan.ArtifactError, match=r"not a whole file written by swan\.save"):
            swan.load(tmp_path / "x.pt", model=fresh("vgg"))

    def test_a_newer_format(self, file) -> None:
        rewrite(file, lambda header: header.update(format=3, library="9.0"))
        with pytest.raises(swan.ArtifactError, match=r"format 3, written by swan_surgery 9\.0"):
            swan.load(file, model=fresh("vgg"))

    @pytest.mark.parametrize("change", [{"kind": "fold"}, {"version": 2}])
    def test_a_step_that_this_version_does_not_know(self, file, change) -> None:
        def forge(header: dict) -> None:
            header.update(library="9.1")
            set_provenance(header, lambda p: p["steps"][0].update(change))

        rewrite(file, forge)
        wanted = rf"x\.swan: a step of kind '{change.get('kind', 'cut')}', version {change.get('version', 1)}, "
        with pytest.raises(
            swan.ArtifactError, match=wanted + ".*by swan_surgery 9.1; .*upgrade to 9.1"
        ):
            swan.load(file, model=fresh("vgg"))

    @pytest.mark.parametrize("name", FORGED)
    def test_a_rewritten_header_with_a_right_checksum(self, file, name) -> None:
        """Nothing but widths and weights can come out of a file, whoever wrote it."""
        rewrite(file, FORGED[name])
        base = fresh("vgg")
        before = fingerprint(base)
        with pytest.raises(swan.ArtifactError):
            swan.load(file, model=base)
        assert_same_fingerprint(before, fingerprint(base))

    @pytest.mark.slow
    @pytest.mark.parametrize("count", [100, pytest.param(500, marks=pytest.mark.thorough)])
    def test_damaged_files(self, count: int, tmp_path) -> None:
        """Bits flipped, ends cut off, blocks zeroed or doubled, headers of other files."""
        swan.save(pruned("vgg")[0], tmp_path / "a.swan")
        swan.save(pruned("vgg", share=0.6)[0], tmp_path / "b.swan")
        whole, other = (tmp_path / "a.swan").read_bytes(), (tmp_path / "b.swan").read_bytes()
        base, broken = fresh("vgg"), tmp_path / "broken.swan"
        generator = torch.Generator().manual_seed(0)

        def draw(high: int) -> int:
            return int(torch.randint(high, (), generator=generator))

        head = 8 + struct.unpack("<Q", whole[:8])[0]
        refused = 0
        for index in range(count):
            data = bytearray(whole)
            kind = index % 5
            if kind == 0:
                data[draw(len(data))] ^= 1 << draw(8)
            elif kind == 1:
                data[draw(head)] ^= 1 << draw(8)
            elif kind == 2:
                del data[draw(len(data)) :]
            elif kind == 3:
                start = draw(len(data) - 64)
                data[start : start + 64] = other[:64] if index % 2 else bytes(64)
            else:
                own = 8 + struct.unpack("<Q", other[:8])[0]
                cut = draw(own)
                data = bytearray(
                    other[:cut] + whole[cut:] if index % 2 else other[:own] + whole[head:]
                )
            if bytes(data) in (whole, other):
                refused += 1
                continue
            broken.write_bytes(bytes(data))
            with pytest.raises(swan.ArtifactError) as err:
                swan.load(broken, model=base)
            assert "\n" not in str(err.value)
            refused += 1
        assert refused == count


def set_provenance(header: dict, change) -> None:
    data = json.loads(structures.unpack(header["provenance"]))
    change(data)
    header["provenance"] = structures.pack(json.dumps(data))


def set_plan(header: dict, **entries: object) -> None:
    def change(data: dict) -> None:
        cut = data["steps"][0]["data"]
        cut["plan"] = json.dumps(json.loads(cut["plan"]) | entries)

    set_provenance(header, change)


def rewrite(path: Path, change) -> None:
    """Another header, with the checksum that belongs to it."""
    header, tensors = container.read(path)
    change(header)
    real = container.VERSION
    container.VERSION = header.pop("format")
    try:
        container.write(path, header, tensors)
    finally:
        container.VERSION = real


def exit_code_of(run: Callable[[], object]) -> int | None:
    """Of a process of its own, which shares all that is imported here."""
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    return process.exitcode


class TestNothingIsLost:
    def test_an_unwritable_folder(self, tmp_path) -> None:
        small, _ = pruned("vgg")
        (tmp_path / "file").write_text("x")
        for path in (tmp_path / "none" / "x.swan", tmp_path / "file" / "x.swan"):
            with pytest.raises(swan.WritingError, match=f"cannot write {re.escape(str(path))}: "):
                swan.save(small, path)

    def test_a_full_disk(self, tmp_path) -> None:
        """A limit on the size of files stands for it: the system refuses in the middle of writing."""
        folder, said = tmp_path / "disk", tmp_path / "said"
        folder.mkdir()
        path = folder / "x.swan"
        path.write_bytes(b"the old file")

        def save() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
            try:
                swan.save(nn.Linear(300, 300), path)
            except swan.WritingError as err:
                said.write_text(str(err))

        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        assert exit_code_of(save) == 0
        assert resource.getrlimit(resource.RLIMIT_FSIZE) == before
        assert said.read_text().startswith(f"cannot write {path}: ")
        assert said.read_text().count("\n") == 0
        assert path.read_bytes() == b"the old file"
        assert [p.name for p in folder.iterdir()] == ["x.swan"]

    def test_killed_while_writing(self, tmp_path, monkeypatch) -> None:
        path = tmp_path / "x.swan"
        path.write_bytes(b"the old file")
        parent = os.getpid()

        def die(*_args: object) -> None:
            assert os.getpid() != parent
            os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(container, "_digest", die)
        assert exit_code_of(lambda: swan.save(nn.Linear(300, 300), path)) == -signal.SIGKILL
        assert path.read_bytes() == b"the old file"

    def test_a_link_stays_a_link(self, tmp_path) -> None:
        (tmp_path / "real.swan").write_bytes(b"old")
        (tmp_path / "link.swan").symlink_to(tmp_path / "real.swan")
        model = nn.Sequential(nn.Linear(2, 2))
        swan.save(model, tmp_path / "link.swan")
        assert (tmp_path / "link.swan").is_symlink()
        loaded = swan.load(tmp_path / "real.swan", model=nn.Sequential(nn.Linear(2, 2)))
        assert torch.equal(loaded[0].weight, model[0].weight)


def test_parameters_over_one_memory_come_back_each_with_its_own(tmp_path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        first, *others = [nn.Linear(4, 4) for _ in range(3)]
        for layer in others:
            layer.weight = nn.Parameter(first.weight.data)  # no tie: another parameter
        return nn.Sequential(first, *others)

    net = make()
    swan.save(net, tmp_path / "net.swan")
    again = swan.load(tmp_path / "net.swan", make())
    x = torch.randn(2, 4)
    assert torch.equal(again(x), net(x))
    assert len({p.data_ptr() for name, p in again.named_parameters() if "weight" in name}) == 3
