"""`train`: settings as files, data, and a run that a kill does not change."""

import csv
import json
import sys
from contextlib import contextmanager
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings as hypothesis_settings, strategies as st
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

import swan_surgery as swan
from swan_surgery.environment.locking import alone_in
from swan_surgery.experiments.classifier import (
    Data,
    ShuffledBatches,
    TrainSettings,
    input_channels,
    load_data,
    read_settings,
    run_experiment,
    text_of,
    write_outputs,
    write_settings,
)
from swan_surgery.experiments.classifier.batches import Taught, in_order
from swan_surgery.experiments.classifier.checkpoint import read_checkpoint, write_checkpoint
from swan_surgery.experiments.classifier.steps import loss_of
from swan_surgery.experiments.loop import Loop
from swan_surgery.experiments.processes import Processes, joined


TINY = TrainSettings(
    macs=0.5, dense_epochs=2, gate_epochs=3, finetune_epochs=2, batch=8, threads=1, lr=1e-2
)


STAGED = replace(TINY, macs=0.12, dense_epochs=1, gate_epochs=6, finetune_epochs=5)


class InterruptedRunError(Exception):
    pass


class Listener:
    """Hears a run, and stops it after so many epochs."""

    def __init__(self, patience: int = 1000) -> None:
        self.patience, self.said = patience, []

    def say(self, text: str) -> None:
        self.said.append(text)

    @contextmanager
    def epochs(self, text, total):
        def advance(note):
            self.patience -= 1
            if not self.patience:
                raise InterruptedRunError

        yield advance


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1)),
            *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)),
        )


def data() -> Data:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    x = torch.randn(60, 1, 4, 4, generator=generator) + y[:, None, None, None]
    return Data(TensorDataset(x[:40], y[:40]), TensorDataset(x[40:], y[40:]), 3, "made up")


def run(folder, settings=TINY, *, patience=1000, model=None):
    folder.mkdir(exist_ok=True)
    listener = Listener(patience)
    outcome = run_experiment(model or net(), settings, data(), folder=folder, narrator=listener)
    return outcome, listener


def same(one, other) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        map(torch.equal, states[0].values(), states[1].values())
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    return run(folder)[0], folder


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    """The same in stages."""
    return run(tmp_path_factory.mktemp("staged"), STAGED)


def test_a_second_training_in_one_folder_is_refused_and_leaves_the_first_alone(tmp_path) -> None:
    (tmp_path / "checkpoint.safetensors").write_text("of the first")
    with (
        alone_in(tmp_path, "training"),
        pytest.raises(swan.WritingError, match="another training is under way in "),
    ):
        run_experiment(net(), TINY, data(), folder=tmp_path, narrator=Listener(1000), fresh=True)
    assert (tmp_path / "checkpoint.safetensors").read_text() == "of the first"


class TestRun:
    def test_it_arrives_at_the_budget_and_the_cut_changes_nothing(self, whole) -> None:
        outcome, folder = whole
        dense, small = outcome.macs
        assert 0.3 * dense < small <= 0.5 * dense
        assert small == swan.count_macs(outcome.small, outcome.example)
        assert outcome.scores["pruned"] == pytest.approx(outcome.scores["gated"])
        assert outcome.scores["finetuned"]["accuracy"] > 60  # three separable classes
        loaded = swan.load(folder / "pruned.swan", net())
        x = torch.randn(5, 1, 4, 4)
        assert torch.equal(loaded.eval()(x), outcome.small.eval()(x))
        assert [row["stage"] for row in outcome.history] == [
            *["dense"] * 2, *["gated"] * 3, *["finetuned"] * 2,
        ]  # fmt: skip
        shares = [row["hard_macs_share"] for row in outcome.history if row["stage"] == "gated"]
        assert shares == sorted(shares, reverse=True)
        assert shares[-1] == pytest.approx(small / dense)  # of the dense model

    def test_the_given_model_and_the_random_state_stay(self, tmp_path) -> None:
        model, before = net(), torch.get_rng_state()
        run(
            tmp_path / "x",
            replace(TINY, dense_epochs=1, gate_epochs=1, finetune_epochs=0),
            model=model,
        )
        assert same(model, net())
        assert torch.equal(before, torch.get_rng_state())

    @pytest.mark.parametrize(
        "patience", [1, 3, 6, *(pytest.param(n, marks=pytest.mark.thorough) for n in (2, 4, 5, 7))]
    )
    def test_a_run_that_was_interrupted_ends_bitwise_the_same(
        self, patience, whole, tmp_path
    ) -> None:
        outcome, _ = whole
        with pytest.raises(InterruptedRunError):
            run(tmp_path / "x", patience=patience)
        again, listener = run(tmp_path / "x")
        assert any("Going on after epoch" in text for text in listener.said)
        assert same(outcome.dense, again.dense)
        assert same(outcome.gated, again.gated)
        assert same(outcome.small, again.small)
        assert outcome.scores == again.scores
        assert outcome.history == again.history

    @pytest.mark.parametrize(
        "steps", [18, *(pytest.param(n, marks=pytest.mark.thorough) for n in (3, 9, 14, 24, 33))]
    )
    def test_inside_an_epoch_too(self, steps, whole, tmp_path, monkeypatch) -> None:
        outcome, _ = whole
        update, left = Loop._update, [steps]

        def interrupted(self, wrapped, batch, place):
            update(self, wrapped, batch, place)
            left[0] -= 1
            if not left[0]:
                raise InterruptedRunError

        monkeypatch.setattr(Loop, "_update", interrupted)
        with pytest.raises(InterruptedRunError):
            run(tmp_path / "x", replace(TINY, save_every=2))
        kept = read_checkpoint(tmp_path / "x" / "checkpoint.safetensors")["now"]
        assert kept["place"][1] in (2, 4)  # of five steps
        again, _ = run(tmp_path / "x")
        assert left[0] < 0
        assert same(outcome.gated, again.gated)
        assert same(outcome.small, again.small)
        assert outcome.history == again.history

    @pytest.mark.parametrize(
        "patience", [1, 4, *(pytest.param(n, marks=pytest.mark.thorough) for n in (2, 3, 5, 7))]
    )
    def test_a_run_in_stages_that_was_interrupted_too(self, patience, staged, tmp_path) -> None:
        outcome, _ = staged
        with pytest.raises(InterruptedRunError):
            run(tmp_path / "x", STAGED, patience=patience)
        again, _ = run(tmp_path / "x", STAGED)
        assert same(outcome.small, again.small)
        assert outcome.scores == again.scores
        assert outcome.history == again.history

    def test_little_is_cut_in_stages_by_scores(self, staged) -> None:
        outcome, listener = staged
        cuts = [text for text in listener.said if text.startswith("Cut ")]
        assert [text[:10] for text in cuts] == ["Cut 1 of 3", "Cut 2 of 3", "Cut 3 of 3"]
        dense, small = outcome.macs
        assert 0.05 * dense < small <= STAGED.macs * dense
        assert set(outcome.scores) == {"dense", "pruned", "finetuned"}
        epochs = [row["epoch"] for row in outcome.history if row["stage"] == "finetuned"]
        assert epochs == list(range(1, 12))

    def test_scores_where_asked_for_and_gates_where_asked_for(self, tmp_path) -> None:
        own = replace(TINY, dense_epochs=1, gate_epochs=1, finetune_epochs=1)
        scored, said = run(tmp_path / "scores", replace(own, choice="scores"))
        assert any(text.startswith("Cut 1 of 1") for text in said.said)
        assert scored.macs[1] <= 0.5 * scored.macs[0]
        gates, _ = run(tmp_path / "gates", replace(own, choice="gates", macs=0.15))
        assert "gated" in gates.scores
        write_outputs(scored, own, data(), tmp_path / "scores")
        assert "right after the cut" in (tmp_path / "scores" / "report.html").read_text()

    @pytest.mark.filterwarnings("ignore:multiples of 2 channels leave")
    def test_half_of_the_way_is_one_cut_and_gates_go_on_from_there(self, whole, tmp_path) -> None:
        outcome, folder = whole
        assert set(outcome.scores) == {"dense", "halfway", "gated", "pruned", "finetuned"}
        dense, small = outcome.macs
        halfway = swan.count_macs(swan.load(folder / "halfway.swan", net()), outcome.example)
        assert small <= 0.5 * dense < halfway <= 0.5**0.5 * dense
        assert swan.count_macs(outcome.gated.model, outcome.example) == halfway
        own = replace(TINY, choice="both", params=0.6, macs=0.12, round_to=2)
        rounded, _ = run(tmp_path / "both", replace(own, dense_epochs=1, gate_epochs=1))
        assert rounded.macs[1] <= 0.12 * rounded.macs[0]
        assert rounded.params[1] <= 0.6 * rounded.params[0]
        assert rounded.small[0].out_channels % 2 == rounded.small[4].out_channels % 2 == 0

    def test_a_share_of_a_layer_stays_one_of_the_given_layer(self, tmp_path) -> None:
        own = replace(TINY, dense_epochs=1, gate_epochs=1, finetune_epochs=1, min_width=0.6)
        outcome, _ = run(tmp_path / "both", own)
        assert outcome.gated.gates.least == [5, 5]
        assert min(outcome.small[0].out_channels, outcome.small[4].out_channels) >= 5

    def test_a_finished_run_is_not_trained_again(self, whole) -> None:
        outcome, folder = whole
        before = (folder / "pruned.swan").read_bytes()
        again, _ = run(folder)
        assert same(outcome.small, again.small)
        assert len(again.history) == len(outcome.history)
        assert (folder / "pruned.swan").read_bytes() == before

    def test_a_dense_model_trained_as_long_and_images_held_out(self, whole, tmp_path) -> None:
        outcome, _ = whole
        held = replace(data(), validation=data().test)
        (tmp_path / "x").mkdir()
        own = replace(TINY, baseline=True)
        with pytest.raises(InterruptedRunError):  # in the baseline's third epoch of five
            run_experiment(net(), own, held, folder=tmp_path / "x", narrator=Listener(10))
        more = run_experiment(net(), own, held, folder=tmp_path / "x", narrator=Listener())
        assert same(more.small, outcome.small)
        assert same(more.dense, outcome.dense)
        assert [row["stage"] for row in more.history].count("baseline") == 5
        assert more.scores["baseline"]["accuracy"] > 60
        assert more.scores["dense"]["validation_loss"] == pytest.approx(
            more.scores["dense"]["loss"]
        )
        result = write_outputs(more, own, held, tmp_path / "x")
        assert set(result["validation_accuracy"]) == {*outcome.scores, "baseline"}
        assert result["units"]["dense"] > result["units"]["pruned"] > 0
        assert "dense, trained as long" in (tmp_path / "x" / "report.html").read_text()
        assert len((tmp_path / "x" / "log.csv").read_text().splitlines()) == 1 + 12

    @torch.no_grad()
    def test_outputs_of_a_teacher_are_the_same_whether_kept_or_not(self) -> None:
        own, teacher = replace(TINY, distillation=0.7), net().eval()
        images, model = data().train, net().eval()
        model[0].weight.mul_(2)
        for one, other in zip(
            ShuffledBatches(images, own, 3),
            ShuffledBatches(Taught(images, teacher, own, torch.device("cpu")), own, 3),
            strict=True,
        ):
            assert torch.equal(one[0], other[0])
            wanted = loss_of(own, teacher)(model, one)
            assert float(loss_of(own, teacher)(model, other)) == pytest.approx(float(wanted))
            assert float(wanted) != pytest.approx(float(loss_of(own, None)(model, one)), rel=0.01)

    @pytest.mark.filterwarnings("ignore:multiples of 4 channels leave:UserWarning")
    def test_with_all_the_options(self, tmp_path) -> None:
        own = replace(
            TINY,
            macs=0.6,
            optimizer="sgd",
            distillation=0.5,
            label_smoothing=0.1,
            precision="bf16",
            round_to=4,
            warmup=0.5,
            learning="gradient",
            ignore=("4",),
            min_width={"0": 2},
            finetune_lr=1e-3,
        )
        with pytest.raises(InterruptedRunError):
            run(tmp_path / "x", own, patience=4)
        outcome, _ = run(tmp_path / "x", own)
        assert outcome.small[0].out_channels == 4
        assert outcome.small[4].out_channels == 8
        assert outcome.macs[1] <= 0.6 * outcome.macs[0]


class TestOutputs:
    def test_what_is_left_agrees(self, whole) -> None:
        outcome, folder = whole
        result = write_outputs(outcome, TINY, data(), folder)
        assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(result))
        assert result["macs"]["left"] == outcome.macs[1] / outcome.macs[0]
        widths = (outcome.small[0].out_channels, outcome.small[4].out_channels)
        assert result["units"] == {"dense": 16, "pruned": sum(widths)}
        assert read_settings(folder / "config.toml") == TINY
        with (folder / "log.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [float(row["accuracy"]) for row in rows] == [
            row["accuracy"] for row in outcome.history
        ]
        report = swan.Report.from_json((folder / "report.json").read_text())
        assert report.after.accuracy == outcome.scores["finetuned"]["accuracy"]
        page = (folder / "report.html").read_text()
        assert "epoch 3" in page
        assert "right after the cut" in page


class TestRefusals:
    @pytest.mark.parametrize("own", [{"macs": 0.001}, {"macs": 0.2, "round_to": 8}])
    def test_before_anything_is_trained(self, own, tmp_path) -> None:
        with pytest.raises(swan.BudgetError, match="reachable"):
            run(tmp_path / "x", replace(TINY, **own))
        assert not list((tmp_path / "x").iterdir())

    @pytest.mark.parametrize(
        ("model", "error", "text"),
        [
            (nn.Conv2d(1, 3, 3), swan.ModelError, r"logits \[B, classes\]; this one returns"),
            (
                nn.Sequential(nn.Flatten(), nn.Linear(9, 3)),
                swan.InputError,
                "cannot be run on images",
            ),
            (
                nn.Sequential(nn.Flatten(), nn.Linear(16, 2)),
                swan.InputError,
                "2 outputs, the data 3",
            ),
        ],
    )
    def test_models_that_do_not_fit(self, model, error, text, tmp_path) -> None:
        with pytest.raises(error, match=text):
            run(tmp_path / "x", model=model)

    def test_a_checkpoint_of_other_settings(self, tmp_path) -> None:
        with pytest.raises(InterruptedRunError):
            run(tmp_path / "x", patience=1)
        with pytest.raises(swan.InputError, match=r"other settings \(macs, batch\).*--fresh"):
            run(tmp_path / "x", replace(TINY, macs=0.4, batch=4, workers=0))
        run(tmp_path / "x", replace(TINY, threads=0))  # makes no difference that was asked for

    def test_a_device_that_is_none(self, tmp_path) -> None:
        with pytest.raises(swan.InputError, match="not known to torch"):
            run(tmp_path / "x", replace(TINY, device="abacus"))


class TestCheckpoint:
    def test_round_trip(self, tmp_path) -> None:
        shared = torch.randn(3)
        state = {
            "optimizer": {"state": {0: {"step": torch.tensor(2.0), "m": shared}, 7: {}}, "x": [1, (2.5, None)]},
            "tied": shared,
            "text": "#3",
        }  # fmt: skip
        write_checkpoint(tmp_path / "c", state)
        again = read_checkpoint(tmp_path / "c")
        assert again["optimizer"]["x"] == [1, (2.5, None)]
        assert again["optimizer"]["state"].keys() == {0, 7}
        assert torch.equal(again["optimizer"]["state"][0]["m"], shared)
        assert torch.equal(again["tied"], shared)
        assert again["text"] == "#3"

    def test_another_file(self, tmp_path) -> None:
        swan.save(net(), tmp_path / "x.swan")
        with pytest.raises(swan.ArtifactError, match="no checkpoint"):
            read_checkpoint(tmp_path / "x.swan")
        with pytest.raises(swan.InputError, match="cannot be kept"):
            write_checkpoint(tmp_path / "y", {"x": object()})


SETTINGS = st.builds(
    TrainSettings,
    model=st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=20),
    mean=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3).map(tuple),
    macs=st.floats(1e-12, 1),
    lr=st.floats(1e-12, 1e6),
    flip=st.booleans(),
    classes=st.integers(0, 10**9),
    ignore=st.lists(st.text("ab.*\"'\\ #:[]", max_size=8), max_size=3).map(tuple),
    min_width=st.one_of(
        st.integers(1, 9),
        st.floats(0, 1),
        st.dictionaries(st.text("ab.*", min_size=1, max_size=5), st.integers(1, 9), min_size=1),
    ),
)


class TestSettings:
    def test_one_number_serves_all_channels(self) -> None:
        assert read_settings(None, ["mean=0", "std=0.25"]).mean == (0,)
        assert read_settings(None, ["ignore=fc"]).ignore == ("fc",)

    @pytest.mark.parametrize("suffix", [".toml", ".yaml", ".yml"])
    @hypothesis_settings(max_examples=60)
    @given(own=SETTINGS)
    def test_reading_what_was_written_gives_the_same(self, suffix, own, tmp_path_factory) -> None:
        path = tmp_path_factory.mktemp("settings") / f"x{suffix}"
        write_settings(own, path)
        assert read_settings(path) == own

    @pytest.mark.parametrize("as_yaml", [False, True])
    def test_the_template_is_the_defaults_and_explains_each(self, as_yaml, tmp_path) -> None:
        text = text_of(TrainSettings(), as_yaml=as_yaml)
        path = tmp_path / ("x.yaml" if as_yaml else "x.toml")
        path.write_text(text)
        assert read_settings(path) == TrainSettings()
        assert text.count("\n\n") == len(asdict(TrainSettings())) - 1
        assert "# share of the multiply-adds to keep" in text

    def test_assignments_override_the_file(self, tmp_path) -> None:
        (tmp_path / "x.yaml").write_text("macs: 0.3\nlr: 1e-2\n")
        own = read_settings(tmp_path / "x.yaml", ["macs=0.2", "optimizer=sgd", 'ignore=["a.*"]'])
        assert (own.macs, own.lr, own.optimizer, own.ignore) == (0.2, 0.01, "sgd", ("a.*",))

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("x.toml", "mcas = 0.3", "no setting 'mcas'; there is macs"),
            ("x.toml", "lr = true", "lr is like 0.001; got True"),
            ("x.yaml", "lr: fast", "lr is like 0.001; got 'fast'"),
            ("x.toml", "batch = 1.5", "batch is like 64; got 1.5"),
            ("x.toml", "mean = true", r"mean is like \[0.5\]; got True"),
            ("x.toml", "ignore = [1]", r"ignore is like \[\]; got \[1\]"),
            ("x.toml", "macs = ", "is not TOML"),
            ("x.yaml", "a: [", "is not YAML"),
            ("x.yaml", "- 1", "holds no settings, but list"),
            ("x.yaml", "!!python/object/apply:os.system ['true']", "is not YAML"),
            ("x.json", "{}", "ends in .toml, .yaml or .yml"),
            ("x.toml", "macs = 2", r"macs is a share in \[0, 1\]; got 2"),
            ("x.toml", "macs = 0\nbatch = 0", "batch must be at least 1; got 0; say how small"),
            ("x.toml", "optimizer = 'lion'", "optimizer must be one of adamw, sgd; got 'lion'"),
            ("x.toml", "crop = true", "crop needs size"),
            ("x.toml", "lr = 0.0", "lr and temperature must be above 0"),
        ],
    )
    def test_what_is_refused(self, name, text, message, tmp_path) -> None:
        (tmp_path / name).write_text(text)
        with pytest.raises(swan.InputError, match=message):
            read_settings(tmp_path / name)

    def test_files_that_are_not_there_and_halves(self, tmp_path) -> None:
        with pytest.raises(swan.InputError, match="cannot read"):
            read_settings(tmp_path / "none.toml")
        with pytest.raises(swan.InputError, match=r"write it like macs=0\.3"):
            read_settings(None, ["macs"])
        assert read_settings(None) == TrainSettings()


def images(folder, parts, size=6) -> None:
    generator = torch.Generator().manual_seed(0)
    for part in parts:
        for label in ("cat", "dog"):
            own = folder / part / label
            own.mkdir(parents=True)
            for index in range(3):
                pixels = torch.randint(256, (size, size, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(own / f"{index}.png")


class TestData:
    def test_digits(self) -> None:
        found = load_data(TrainSettings(held_out=0.25))
        assert (len(found.train), len(found.test), found.classes) == (1348, 449, 10)
        x, y = found.train[0]
        assert (x.shape, x.dtype, type(x)) == ((1, 8, 8), torch.float32, torch.Tensor)
        assert -1 <= float(x.min()) <= float(x.max()) <= 1
        assert y in range(10)
        assert load_data(TrainSettings(), channels=3).example().shape == (1, 3, 8, 8)

    @pytest.mark.parametrize(
        ("parts", "test"), [(("train", "test"), 6), (("train", "val"), 6), (("train",), 2)]
    )
    def test_folders(self, parts, test, tmp_path) -> None:
        images(tmp_path, parts)
        found = load_data(TrainSettings(data=str(tmp_path), size=4, held_out=0.3))
        assert len(found.test) == test
        assert len(found.train) == (6 if test == 6 else 4)
        assert found.example().shape == (1, 3, 4, 4)
        assert found.classes == 2

    def test_augmentation_moves_training_images_only(self, tmp_path) -> None:
        images(tmp_path, ("train", "test"))
        own = TrainSettings(data=str(tmp_path), flip=True, shift=2)
        found = load_data(own)
        train = {float(found.train[0][0].sum()) for _ in range(10)}
        test = {float(found.test[0][0].sum()) for _ in range(10)}
        assert len(train) > 1
        assert len(test) == 1

    def test_random_parts_to_train_on_and_the_middle_to_test_on(self, tmp_path) -> None:
        images(tmp_path, ("train", "test"), size=16)
        own = TrainSettings(data=str(tmp_path), size=8, crop=True, validation=0.34)
        found = load_data(own)
        assert found.example().shape == (1, 3, 8, 8)
        assert len({float(found.train[0][0].sum()) for _ in range(5)}) == 5
        assert found.validation is not None
        assert (len(found.train), len(found.validation)) == (4, 2)
        assert not found.is_fixed
        assert load_data(replace(own, crop=False)).is_fixed

    def test_mnist_as_torchvision_keeps_it(self, tmp_path) -> None:
        raw = tmp_path / "MNIST" / "raw"
        raw.mkdir(parents=True)
        pixels = torch.arange(2 * 28 * 28, dtype=torch.uint8)
        for part in ("train", "t10k"):
            head = b"".join(n.to_bytes(4, "big") for n in (2051, 2, 28, 28))
            (raw / f"{part}-images-idx3-ubyte").write_bytes(head + pixels.numpy().tobytes())
            head = b"".join(n.to_bytes(4, "big") for n in (2049, 2))
            (raw / f"{part}-labels-idx1-ubyte").write_bytes(head + bytes([7, 3]))
        found = load_data(TrainSettings(data=str(tmp_path), mean=(0.0,), std=(1.0,)))
        x, y = found.train[1]
        assert y == 3
        assert torch.equal((255 * x).round().flatten(), pixels[28 * 28 :].float())

    def test_a_function(self, tmp_path, monkeypatch) -> None:
        (tmp_path / "own_images.py").write_text(
            "import torch\nfrom torch.utils.data import TensorDataset\n"
            "def both():\n"
            "    x = torch.full((6, 1, 4, 4), 7.0)\n"
            "    made = TensorDataset(x, torch.arange(6) % 2)\n"
            "    return made, made\n"
            "def one():\n    return 3\n"
        )
        monkeypatch.chdir(tmp_path)
        found = load_data(TrainSettings(data="own_images:both"))
        assert float(found.train[0][0].max()) == 7  # tensors of numbers are used as they are
        assert found.classes == 2
        with pytest.raises(swan.InputError, match="must return two data sets"):
            load_data(TrainSettings(data="own_images:one"))
        with pytest.raises(swan.InputError, match="cannot import 'nothing'"):
            load_data(TrainSettings(data="nothing:here"))

    def test_what_is_no_data(self, tmp_path) -> None:
        with pytest.raises(swan.InputError, match="no folder /none; data is"):
            load_data(TrainSettings(data="/none"))
        with pytest.raises(swan.InputError, match="holds neither train"):
            load_data(TrainSettings(data=str(tmp_path)))
        images(tmp_path, ("train",))
        with pytest.raises(swan.InputError, match="leaves none to hold out or none to train"):
            load_data(TrainSettings(data=str(tmp_path), held_out=0.0))
        (tmp_path / "test" / "bird").mkdir(parents=True)
        (tmp_path / "test" / "bird" / "x.png").write_bytes(b"")
        with pytest.raises(swan.InputError, match="train/ has the classes"):
            load_data(TrainSettings(data=str(tmp_path)))

    def test_channels_of_a_model(self) -> None:
        assert input_channels(net()) == 1
        assert input_channels(nn.Sequential(nn.Linear(3, 3), nn.Conv2d(5, 5, 1))) is None
        assert input_channels(nn.ReLU()) is None


class Drawn(torch.utils.data.Dataset):
    """Images that are a number drawn for each, as augmentation draws; labels are their indices."""

    def __len__(self):
        return 22

    def __getitem__(self, index):
        return torch.rand(1), index


class TestBatches:
    def test_what_is_drawn_depends_on_the_image_alone(self) -> None:
        own, device = replace(TINY, batch=4), torch.device("cpu")
        whole = list(ShuffledBatches(Drawn(), own, 5))
        assert [len(y) for _, y in whole] == [4] * 5
        assert len({int(i) for _, y in whole for i in y}) == 20
        late = list(ShuffledBatches(Drawn(), own, 5, first=3))
        assert [y.tolist() for _, y in late] == [y.tolist() for _, y in whole[3:]]
        assert all(torch.equal(a[0], b[0]) for a, b in zip(late, whole[3:], strict=True))
        halves = [
            list(ShuffledBatches(Drawn(), own, 5, processes=Processes(device, rank, 2)))
            for rank in range(2)
        ]
        for first, second, both in zip(*halves, whole, strict=True):
            assert torch.equal(torch.cat([first[0], second[0]]), both[0])
            assert torch.equal(torch.cat([first[1], second[1]]), both[1])
        assert whole[0][1].tolist() != next(iter(ShuffledBatches(Drawn(), own, 6)))[1].tolist()
        seen = [
            y for rank in range(2) for _, y in in_order(Drawn(), own, Processes(device, rank, 2))
        ]
        assert sorted(torch.cat(seen).tolist()) == list(range(22))

    def test_uneven_shares_are_refused(self) -> None:
        with pytest.raises(swan.InputError, match="set batch to a multiple of 3"):
            ShuffledBatches(Drawn(), TINY, 0, processes=Processes(torch.device("cpu"), 0, 3))

    def test_several_processes_without_accelerate(self, monkeypatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setitem(sys.modules, "accelerate", None)
        with (
            pytest.raises(swan.MissingExtraError, match=r"pip install 'swan-surgery\[recipes\]'"),
            joined("cpu"),
        ):
            pass
