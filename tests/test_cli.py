"""The command line: what `inspect` shows, and that every error is one line with exit code 2."""

import dataclasses
import functools
import inspect
import json
import os
import re
import subprocess
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
import torchvision
from torch import nn
from typer.testing import CliRunner

import swan_surgery as swan
from swan_surgery_cli import main
from swan_surgery_cli.app import WORK, work_of
from swan_surgery_cli.commands import app
from swan_surgery_cli.work.models import build_model


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def inspect_json(*words):
    result = invoke("inspect", *words, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@functools.cache
def resnet18_json():
    return inspect_json("resnet18", "--input", "1,3,64,64")


def tiny():
    """A model of the user's own, found as tests.test_cli:tiny."""
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))


def flat():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2))


def broken():
    raise RuntimeError("first line\nsecond line")


def number():
    return 3


def with_inputs():
    """A model that takes token ids and a mask, with inputs of its own."""
    return Tokens(), {"ids": torch.zeros(2, 5, dtype=torch.int64), "mask": torch.ones(2, 5)}


def tokens():
    return Tokens()


def badly_paired():
    return tiny(), 3


def needs_two():
    return Tokens(), (torch.zeros(2, 5, dtype=torch.int64),)


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 2)))


def normed():
    layers = OrderedDict(stem=nn.Linear(4, 6), norm=nn.LayerNorm(6), head=nn.Linear(6, 2))
    return nn.Sequential(layers)


def deep():
    """Three layers more than the table shows; 65 wide, so that few rehearsals will do."""
    layers = OrderedDict((f"hidden{i}", nn.Linear(65, 65)) for i in range(42))
    return nn.Sequential(layers | {"classifier": nn.Linear(65, 2)})


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.odd = nn.Embedding(7, 4), Odd()
        self.before, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, ids, mask):
        x = self.before(self.embed(ids)) * mask[..., None]
        return self.head(self.odd(x))


class Odd(nn.Module):
    def forward(self, x):
        return x.renorm(2, -1, 5.0)


def test_inspect_resnet18_agrees_with_the_library():
    shown = resnet18_json()
    model = torchvision.models.resnet18(weights=None)
    channels = swan.channel_map(model, torch.randn(1, 3, 64, 64))
    assert shown["macs"] == swan.count_macs(model, torch.randn(1, 3, 64, 64))
    assert shown["flops"] == 2 * shown["macs"]
    assert shown["params"] == swan.count_params(model)
    assert shown["units"] == channels.num_units
    assert shown["input_shapes"] == [[1, 3, 64, 64]]
    assert [layer["name"] for layer in shown["layers"]] == [la.name for la in channels.layers]
    assert sum(layer["macs"] for layer in shown["layers"]) == shown["macs"]
    assert (shown["version"], shown["unknown"], shown["kept_numbers"]) == (2, [], [])


def test_inspect_says_who_shares_and_what_stays():
    layers = {la["name"]: la for la in resnet18_json()["layers"]}
    assert layers["conv1"]["coupled"] == [
        {"layer": "layer1.0.conv2", "num_channels": 64},
        {"layer": "layer1.1.conv2", "num_channels": 64},
    ]
    assert layers["layer1.0.conv1"]["coupled"] == []
    assert (layers["conv1"]["num_units"], layers["conv1"]["gated_channels"]) == (64, 64)
    assert layers["fc"]["num_units"] == 0
    (stays,) = layers["fc"]["pinned"]
    assert (stays["num_channels"], stays["reason"]) == (1000, "part of the model's output")


def test_json_holds_the_whole_explanation():
    shown = inspect_json("tests.test_cli:with_inputs")
    explanation = swan.channel_map(*with_inputs()).explain()
    for row, layer in zip(shown["layers"], explanation.layers, strict=True):
        rest = {key: value for key, value in row.items() if key not in ("macs", "params")}
        assert rest == json.loads(json.dumps(dataclasses.asdict(layer)))
    (entry,) = shown["unknown"]
    assert (entry["op"], entry["module"]) == ("aten.renorm", "odd")
    assert entry["line"].endswith("   return x.renorm(2, -1, 5.0)")


def test_inspect_prints_tables_with_units_of_measure():
    text = invoke("inspect", "resnet18", "--input", "1,3,64,64").stdout
    assert "149 MMACs (297 MFLOPs)" in text
    assert "layer2.0.downsample.0" in text
    assert "shares gates with layer1.0.conv2 (64) and 1 more" in text
    assert text.count("gates of conv1") == 2
    assert "1000 stay: part of the model's output" in text


@pytest.mark.parametrize(
    ("name", "layers", "more"),
    [("resnet18", 21, 1), pytest.param("resnet152", 156, 35, marks=pytest.mark.thorough)],
)
def test_tables_of_many_layers_fit_the_page(name, layers, more):
    text = invoke("inspect", name, "--input", "1,3,64,64", "--all").stdout
    assert max(map(len, text.splitlines())) <= 140
    # One line a layer, but for the few that open a group of many.
    assert len(text.splitlines()) < layers + 20
    assert f"and {more} more" in text


def test_inspect_prints_what_is_weighted_and_which_line_is_unknown():
    text = invoke("inspect", "tests.test_cli:with_inputs").stdout
    assert re.search(r"aten\.renorm  in module 'odd'  at tests/test_cli\.py:\d+", text)
    assert "return x.renorm(2, -1, 5.0)" in text
    assert "weighs layer_norm in 'norm'" in invoke("inspect", "tests.test_cli:normed").stdout


def test_all_shows_every_layer_and_the_default_says_how_many_it_hides():
    words = ("inspect", "tests.test_cli:deep", "--input", "1,65")
    short, full = invoke(*words).stdout, invoke(*words, "--all").stdout
    assert "classifier" not in short
    assert "and 3 more layers; --all shows them" in short
    assert "classifier" in full
    assert "more layers" not in full


def test_input_shape_is_guessed():
    assert inspect_json("resnet18")["input_shapes"] == [[1, 3, 224, 224]]


def test_inspect_takes_a_factory():
    shown = inspect_json("tests.test_cli:tiny", "--input", "2,3,5,5")
    assert shown["class_name"] == "Sequential"
    assert shown["macs"] == 2 * 25 * (3 * 4 + 4 * 2)
    assert [layer["num_units"] for layer in shown["layers"]] == [4, 0]


def test_a_factory_may_bring_its_inputs():
    shown = inspect_json("tests.test_cli:with_inputs")
    assert shown["input_shapes"] == [[2, 5], [2, 5]]
    assert shown["macs"] == 2 * 5 * (4 * 4 + 4 * 2)


def test_token_ids_are_written_with_their_type():
    words = ("inspect", "tests.test_cli:tokens", "--input", "3,5:int64", "--input", "3,5")
    assert inspect_json(*words[1:])["input_shapes"] == [[3, 5], [3, 5]]
    assert inspect_json("tests.test_cli:with_inputs", *words[2:])["macs"] == 3 * 5 * 24


def test_timm_models_come_with_their_input_size():
    pytest.importorskip("timm")
    shown = inspect_json("timm:resnet18")
    assert shown["input_shapes"] == [[1, 3, 224, 224]]
    assert (shown["class_name"], shown["units"]) == ("ResNet", 2880)
    assert inspect_json("timm:resnet18", "--input", "1,3,64,64")["input_shapes"] == [[1, 3, 64, 64]]
    result = invoke("inspect", "timm:resnat18")
    assert "no model 'timm:resnat18'; nearest timm names: resnet18" in result.stderr


@pytest.mark.slow
def test_models_that_look_positions_up_are_built_with_their_data(monkeypatch):
    """A relative position index without data would pin the heads that swanify gates."""

    def small(**options):
        sizes = {"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4]}
        return torchvision.models.SwinTransformer([4, 4], **sizes, window_size=[7, 7])

    monkeypatch.setitem(torchvision.models._api.BUILTIN_MODELS, "swin_t", small)
    shown = inspect_json("swin_t", "--input", "1,3,64,64")
    assert shown["gated_channels"] == shown["channels"] - 1000  # the classes alone stay


def test_timm_that_is_not_installed_is_one_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    result = invoke("inspect", "timm:resnet18")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: timm is not installed")
    assert "pip install timm" in result.stderr


@pytest.mark.thorough
def test_detection_models_get_a_list_of_images():
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    before = torch.get_rng_state()
    shown = inspect_json(name)
    assert torch.equal(before, torch.get_rng_state())
    assert shown["input_shapes"] == [[3, 320, 320]]
    assert shown["units"] > 5000
    two = inspect_json(name, "--input", "3,64,64", "--input", "3,64,96")
    assert two["input_shapes"] == [[3, 64, 64], [3, 64, 96]]
    assert two["units"] == shown["units"]


@pytest.mark.parametrize("name", ["fcn_resnet50", "torchvision:resnet18", "googlenet"])
def test_no_weights_are_ever_asked_for(name, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    model = build_model(name).model
    assert all(parameter.is_meta for parameter in model.parameters())


ERRORS = {
    "unknown model": (("inspect", "resnat18"), "nearest torchvision names: resnet18"),
    "unknown module": (("inspect", "no.such:thing"), "cannot import 'no.such'"),
    "unknown factory": (("inspect", "tests.test_cli:nothing"), "has no function 'nothing'"),
    "factory with a typo": (("inspect", "tests.test_cli:brokn"), "nearest names: broken"),
    "a file's path": (("inspect", "tests/test_cli.py:net"), "tests.test_cli:net"),
    "a file alone": (("inspect", "test_cli.py"), "test_cli:FUNCTION"),
    "failing factory": (("inspect", "tests.test_cli:broken"), "first line second line"),
    "not a module": (("inspect", "tests.test_cli:number"), "returned int"),
    "not inputs": (
        ("inspect", "tests.test_cli:badly_paired"),
        "a model and int: example inputs are a tensor",
    ),
    "wrong arity": (("inspect", "tests.test_cli:needs_two"), "Tokens.forward(ids, mask): missing"),
    "no type": (("inspect", "tests.test_cli:tokens", "--input", "3,5:int65"), "1,16:int64"),
    "quantized": (("inspect", "tests.test_cli:quantized"), "prune first, then quantize"),
    "token ids": (("inspect", "tests.test_cli:tokens", "--input", "3,5"), "missing a required"),
    "no shape": (("inspect", "resnet18", "--input", "1,3,x"), "'1,3,x' is not a shape"),
    "wrong shape": (("inspect", "resnet18", "--input", "1,4,64,64"), "1, 4, 64, 64"),
    "shape not guessable": (("inspect", "r3d_18"), "--input 1,3,224,224"),
    "guess misses": (("inspect", "tests.test_cli:flat"), "like --input 1,3,32,32"),
    "guess misses a cut": (
        ("prune", "tests.test_cli:flat", "--macs", "0.5", "-o", "never.swan"),
        "like --input 1,3,32,32",
    ),
    "no argument": (("inspect",), "Missing argument"),
    "unknown option": (("inspect", "resnet18", "--deep"), "No such option"),
    "unknown command": (("cut",), "No such command 'cut'"),
    "too few epochs": (("demo", "--epochs", "2"), "at least 3 epochs"),
    "no seed": (("demo", "--seeds", "0"), "greater than or equal to 1"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line_with_exit_code_2(case):
    words, expected = ERRORS[case]
    result = invoke(*words)
    assert result.exit_code == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert expected in lines[0]
    assert "Traceback" not in result.output


def test_a_torchvision_of_another_torch_stops_its_own_models_alone(monkeypatch):
    def missing(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("swan_surgery_cli.work.models.import_module", missing)
    result = invoke("inspect", "resnet18")
    assert result.exit_code == 2
    assert "install both in one pip command" in result.stderr
    assert inspect_json("tests.test_cli:flat", "--input", "1x3x8x8")["input_shapes"] == [
        [1, 3, 8, 8]
    ]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke("demo", "--epochs", "3", "--out", tmp_path / "file")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: cannot write to ")


@pytest.mark.parametrize(
    "words", [("--debug", "inspect", "resnat18"), ("inspect", "resnat18", "--debug")]
)
def test_debug_lets_the_traceback_through(words):
    result = invoke(*words)
    assert isinstance(result.exception, swan.InputError)


def test_an_unexpected_error_names_its_class(monkeypatch):
    def fail(*args):
        raise KeyError("odd")

    monkeypatch.setattr("swan_surgery_cli.work.inspecting.inspect_model", fail)
    result = invoke("inspect", "resnet18")
    assert result.exit_code == 2
    assert "KeyError: 'odd'" in result.stderr
    assert "--debug" in result.stderr


@pytest.mark.parametrize("fails", [False, True])
def test_inspect_runs_on_one_thread_and_gives_the_others_back(monkeypatch, fails):
    seen = []

    def watch(name):
        seen.append(torch.get_num_threads())
        return build_model("resnat18" if fails else name)

    monkeypatch.setattr("swan_surgery_cli.work.inspecting.build_model", watch)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        invoke("inspect", "resnet18", "--input", "1,3,64,64")
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


def test_version():
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("swan-surgery ")


def talks():
    print("said in Python")  # noqa: T201 - that is what it is for
    os.write(1, b"said past Python\n")
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)), torch.randn(2, 1, 8, 8)


def leaves():
    sys.exit(7)


def test_what_a_model_prints_goes_to_stderr(capfd):
    """In this process, and by the file descriptor, where Python's own stdout does not help."""
    with pytest.raises(SystemExit) as left:
        app(["inspect", "tests.test_cli:talks", "--json"])
    out, err = capfd.readouterr()
    assert left.value.code == 0
    assert json.loads(out)["units"] == 4
    assert "said in Python" in err
    assert "said past Python" in err


def test_a_model_that_ends_the_program_is_an_error():
    result = invoke("inspect", "tests.test_cli:leaves", "--json")
    assert result.exit_code == 2
    assert "sys.exit(7)" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 1.0])
def test_an_interrupt_while_the_command_is_imported_says_nothing(delay, tmp_path):
    """At the first import of torch, and some time later."""
    (tmp_path / "swan-surgery").write_text(
        "import os, signal, sys, threading, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # jobs of a script ignore it
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        "            def strike():\n"
        f"                time.sleep({delay})\n"
        "                os.kill(os.getpid(), signal.SIGINT)\n"
        "            threading.Thread(target=strike, daemon=True).start()\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from swan_surgery_cli import main\n"
        "main()\n"
    )
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, tmp_path / "swan-surgery", "latency", "resnet18"],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 130
    assert "Traceback" not in done.stderr


def test_the_process_itself_exits_with_2_and_keeps_stdout_clean(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["swan-surgery", "inspect", "resnat18"])
    with pytest.raises(SystemExit) as stopped:
        main()
    told = capfd.readouterr()
    assert stopped.value.code == 2
    assert told.out == ""
    assert told.err.count("\n") == 1


@pytest.mark.parametrize("words", [(), ("--help",)])
def test_help_is_printed_by_itself_and_on_request(words):
    result = invoke(*words)
    assert (result.exit_code, result.stderr) == (0, "")
    assert all(f"\n  {name} " in result.stdout for name in WORK)


@pytest.mark.parametrize("name", WORK)
def test_a_command_takes_what_its_work_takes(name):
    """It is declared in one place and done in another."""
    (declared,) = (own.callback for own in app.registered_commands if own.name == name)
    does = work_of(name)
    assert list(inspect.signature(declared).parameters) == list(inspect.signature(does).parameters)
    assert get_type_hints(declared) == get_type_hints(does)


def run_command_line(code, *words, **environment):
    """In a process of its own, the package from here."""
    root = Path(__file__).resolve().parent.parent
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        env={**os.environ, "PYTHONPATH": str(root), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


LOADED = """
import atexit, sys
sys.argv[0] = "swan-surgery"
atexit.register(lambda: sys.stderr.write(str(sorted(sys.modules))))
from swan_surgery_cli import main
main()
"""


CONFIG = "swan_surgery.experiments.classifier"
COMPLETE = {
    "_SWAN_SURGERY_COMPLETE": "complete_zsh",
    "_TYPER_COMPLETE_ARGS": "swan-surgery prune --r",
}


@pytest.mark.parametrize(
    ("words", "environment", "told"),
    [
        (("--help",), {}, "inspect"),
        (("prune", "--help"), {}, "--round-to"),
        (("--version",), {}, "swan-surgery"),
        ((), COMPLETE, "--round-to"),
    ],
)
def test_help_and_completion_import_no_library(words, environment, told):
    """Torch alone takes seconds."""
    done = run_command_line(LOADED, *words, **environment)
    assert done.returncode == 0
    assert told in done.stdout
    heavy = ("torch", "numpy", "scipy", "torchvision", "swan_surgery")
    assert "'swan_surgery_cli'" in done.stderr
    assert [name for name in heavy if f"'{name}'" in done.stderr] == []
    assert "'rich.console'" not in done.stderr


def test_the_package_runs_as_a_module():
    """As launchers of several processes start it."""
    done = run_command_line(
        "import runpy; runpy.run_module('swan_surgery_cli', run_name='__main__')", "--version"
    )
    assert (done.returncode, done.stdout.split()[0]) == (0, "swan-surgery")


def test_without_typer_the_command_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; from swan_surgery_cli import main; main()"
    done = run_command_line(code, "--help")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("error: the command line needs typer; pip install 'swan-surgery[cli]'\n")


@pytest.mark.parametrize(
    ("missing", "words", "again"),
    [
        ("torchvision", ("inspect", "resnet18"), ()),  # imported where it is wanted
        (
            "yaml",
            ("train", "--template"),
            ("swan_surgery_cli.work.training", CONFIG, f"{CONFIG}.config"),
        ),
    ],
)
def test_without_the_rest_of_its_extra_a_command_says_what_to_install(
    monkeypatch, missing, words, again
):
    """Those modules alone are imported again, and fail, so that the others stay the same objects."""
    for name in again:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    result = invoke(*words)
    assert result.exit_code == 2
    assert result.stderr == (
        f"error: {missing} is not installed; pip install 'swan-surgery[cli]'\n"
    )
