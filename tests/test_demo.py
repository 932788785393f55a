"""The demo in miniature: every stage runs, the budget holds, the files say what happened."""

import json
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import swan_surgery as swan
from swan_surgery.cutting.step import apply_plan
from swan_surgery.experiments.digits import METHODS, DemoSettings, DigitsNet, run_study
from swan_surgery.experiments.digits.data import Images, load_digits, shift, shuffled_batches
from swan_surgery.experiments.digits.scores import accuracy
from swan_surgery_cli.commands import app
from swan_surgery_cli.work.demo_output import verdict


pytest.importorskip("sklearn", reason="the demo's data comes with scikit-learn")

TINY = DemoSettings(
    dense_epochs=1, joint_epochs=1, finetune_epochs=1, width=8, num_train=100, ramp=0.5
)


class Listener:
    """Notes what it is told."""

    def __init__(self):
        self.sentences = []
        self.epochs_done = {}

    def say(self, text):
        self.sentences.append(text)

    @contextmanager
    def epochs(self, text, total):
        self.epochs_done[text] = 0

        def advance():
            self.epochs_done[text] += 1

        yield advance
        assert self.epochs_done[text] == total


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    listener = Listener()
    study, report = run_study([0, 1], TINY, folder, listener)
    return study, report, folder, listener


def test_every_method_is_measured_and_the_budget_holds(ran):
    study = ran[0]
    for result in study.results:
        assert set(result.test) == set(result.validation) == set(result.macs) == set(METHODS)
        assert result.macs["dense"] == swan.count_macs(DigitsNet(8), torch.zeros(1, 1, 8, 8))
        for method in ("one_shot", "swan_hard", "swan_cut", "swan"):
            assert result.macs[method] <= 0.25 * result.macs["dense"]
            assert result.macs[method] >= 0.2 * result.macs["dense"]


def test_every_method_gets_the_same_epochs(ran):
    # Dense start; dense and one-shot for two more; joint training and fine-tuning share two.
    assert list(ran[3].epochs_done.values()) == [1, 2, 2, 1, 1]


def test_hard_gates_and_the_cut_network_agree(ran):
    for result in ran[0].results:
        assert result.test["swan_hard"] == pytest.approx(result.test["swan_cut"], abs=1e-9)


def test_mean_and_spread_are_over_the_seeds(ran):
    study = ran[0]
    first, second = (result.test["swan"] for result in study.results)
    assert study.mean_test("swan") == pytest.approx((first + second) / 2)
    assert study.spread_test("swan") == pytest.approx(abs(first - second) / 2**0.5)
    summary = json.loads(study.to_json())["summary"]["swan"]
    assert summary["test_mean"] == study.mean_test("swan")
    assert 0.2 <= summary["macs_share"] <= 0.25


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"swan": 4, "dense": 2, "one_shot": 3}, ["no more than chance may do"] * 2),
        ({"swan": 4, "dense": 2, "one_shot": 30}, ["no more than chance may do", "ours is better"]),
        ({"swan": 40, "dense": 2, "one_shot": 3}, ["ours is worse"] * 2),
    ],
)
def test_a_difference_that_chance_explains_is_no_verdict(ran, wrong, told):
    one = ran[0].results[0]
    test = one.test | {method: 100 * (1 - n / 497) for method, n in wrong.items()}
    text = verdict(replace(ran[0], results=(replace(one, test=test),)))
    first, second = text.split(". The baseline")
    assert [part in where for part, where in zip(told, (first, second), strict=True)] == [True] * 2
    assert f"Of 497 test images it gets {wrong['swan']} wrong" in first
    assert text.count("chance") == told.count("no more than chance may do")
    both = verdict(replace(ran[0], results=(replace(one, test=test),) * 2))
    assert f"Of 2 x 497 test images it gets {2 * wrong['swan']} wrong" in both


def test_saved_weights_and_plan_rebuild_the_pruned_network(ran):
    study, report, folder, _ = ran
    own = folder / "seed-0"
    plan = swan.PruningPlan.from_json((own / "plan.json").read_text())
    rebuilt = apply_plan(DigitsNet(8), plan)
    loaded = swan.load(own / "pruned.swan", DigitsNet(8))
    rebuilt.load_state_dict(loaded.state_dict())
    assert accuracy(rebuilt, load_digits().test) == study.results[0].test["swan"]
    assert swan.count_params(rebuilt) == report.after.params
    dense = DigitsNet(8)
    dense.load_state_dict(load_file(own / "dense.safetensors"))
    assert accuracy(dense, load_digits().test) == study.results[0].test["dense"]


def test_report_files_match_the_report(ran):
    study, report, folder, _ = ran
    own = folder / "seed-0"
    assert swan.Report.from_json((own / "report.json").read_text()) == report
    assert (own / "report.md").read_text() == report.to_markdown()
    page = (own / "report.html").read_text()
    for shown in ("start", "epoch 1", "block1.conv2", "one-shot, fine-tuned"):
        assert shown in page
    assert report.after.accuracy == study.results[0].test["swan"]
    assert json.loads((folder / "results.json").read_text())["settings"]["num_train"] == 100


def test_a_seed_gives_the_same_numbers_again(ran, tmp_path):
    again, _ = run_study([1], TINY, tmp_path, Listener())
    before = ran[0].results[1]
    assert again.results[0].test == before.test
    assert again.results[0].widths == before.widths


def test_split_is_fixed_and_disjoint():
    first, second = load_digits(), load_digits(num_train=50)
    assert [len(part) for part in (first.train, first.validation, first.test)] == [1000, 300, 497]
    assert first.test.x.equal(second.test.x)
    assert first.train.x[:50].equal(second.train.x)
    bunch = import_module("sklearn.datasets").load_digits()
    parts = torch.cat([first.train.x, first.validation.x, first.test.x]).flatten(1)
    everything = torch.tensor(bunch.data, dtype=torch.float32) / 16
    assert sorted(parts.tolist()) == sorted(everything.tolist())


def test_shift_moves_whole_images_by_at_most_a_pixel():
    x = torch.zeros(200, 1, 8, 8)
    x[:, 0, 3, 4] = 1
    moved = shift(x, torch.Generator().manual_seed(0))
    places = {tuple(place.tolist()) for place in moved.nonzero()[:, 2:]}
    assert places == {(row, column) for row in (2, 3, 4) for column in (3, 4, 5)}
    assert moved.sum() == 200


def test_an_epoch_shows_every_image_once():
    images = Images(torch.zeros(7, 1, 8, 8), torch.arange(7))
    batches = list(shuffled_batches(images, 3, torch.Generator().manual_seed(0)))
    assert [len(y) for _, y in batches] == [3, 3, 1]
    assert sorted(torch.cat([y for _, y in batches]).tolist()) == list(range(7))


def test_accuracy_is_in_percent_and_restores_the_mode():
    class Always(nn.Module):
        def forward(self, x):
            assert not self.training
            return nn.functional.one_hot(torch.full((len(x),), 2), 10)

    model = Always().train()
    images = Images(torch.zeros(8, 1, 8, 8), torch.tensor([2, 2, 2, 1, 0, 0, 0, 0]))
    assert accuracy(model, images) == 37.5
    assert model.training


def test_learning_rate_follows_one_cosine_across_the_cut(monkeypatch, tmp_path):
    seen = {}  # by the optimizer itself: an id is taken again once one is gone

    class Watched(torch.optim.AdamW):
        def step(self):
            seen.setdefault(self, []).append(self.param_groups[0]["lr"])

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    own = replace(TINY, batch=50, lr=1.0)
    run_study([0], own, tmp_path, Listener())
    _dense_start, dense, one_shot, gated, finetuned = seen.values()
    assert dense == one_shot == gated + finetuned
    assert dense == pytest.approx([1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])


def test_settings_share_out_the_epochs():
    settings = DemoSettings.of_length(25)
    assert (settings.dense_epochs, settings.joint_epochs, settings.finetune_epochs) == (10, 10, 5)
    assert settings.later_epochs == 15
    with pytest.raises(swan.InputError, match="got 2"):
        DemoSettings.of_length(2)


def test_without_scikit_learn_one_line_says_what_to_install(monkeypatch, tmp_path):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("swan_surgery.experiments.digits.data.import_module", missing)
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "pip install 'swan-surgery[demo]'" in result.stderr


def test_command_tells_the_story(tmp_path, monkeypatch):
    monkeypatch.setattr("swan_surgery_cli.work.demo.DemoSettings", lambda macs: TINY)
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    for text in (
        "puts a switch on every",
        "Training the dense network",
        "DigitsNet before and after",
        "SWAN, fine-tuned",
        "of the multiply-adds. Of 497 test images it gets",
        str(tmp_path / "seed-0" / "report.html"),
    ):
        assert text in result.stdout
