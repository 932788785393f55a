"""What the library says of its arguments, said by the command line in its own words."""

import re

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import swan_surgery as swan
from swan_surgery_cli.commands import app
from swan_surgery_cli.wording import speak_for, spoken
from tests.closing import learnt_
from tests.test_cli_compress import NAME, TOKENS, digit_net


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A gated model, a small one, samples that fit, and samples that do not."""
    folder = tmp_path_factory.mktemp("files")
    gated = swan.swanify(digit_net(), torch.zeros(1, 1, 8, 8))
    swan.save(gated, folder / "gated.swan")
    swan.save(swan.prune(learnt_(gated), macs=0.5), folder / "small.swan")
    save_file({"inputs": torch.rand(8, 1, 8, 8)}, folder / "x.safetensors")
    save_file({"inputs": torch.rand(8, 5, 8, 8)}, folder / "wide.safetensors")
    return folder


_OUT = ("-o", "{}/out.swan")
_DATA = ("--data", "{}/x.safetensors")
_SMALL = (NAME, "{}/small.swan")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("prune", NAME, *_OUT, "--macs", "0.0001"), "--macs 0.0001 cannot be reached"),
        (("prune", NAME, *_OUT, "--macs", "50"), "--macs is a share"),
        (("prune", NAME, *_OUT, "--macs", "0.5", "--round-to", "0"), "--round-to must be"),
        (
            ("prune", NAME, *_OUT, "--macs", "0.5", "--input", "1,3,8,8"),
            "shapes that it takes by --input",
        ),
        (
            ("prune", TOKENS, *_OUT, "--macs", "0.5"),
            r"--input 1,16:int64 .* factory .* \(model, inputs\)",
        ),
        (
            ("prune", TOKENS, *_OUT, "--macs", "1", "--input", "1,5:int64"),
            "shapes that it takes by --input",
        ),
        (("compress", NAME, *_DATA, *_OUT), "--macs 0.5, --params 0.5 or --latency-ms"),
        (
            ("compress", NAME, *_DATA, *_OUT, "--macs", "1", "--lr", "-1"),
            "--steps and --lr must not",
        ),
        (("compress", NAME, *_DATA, *_OUT, "--latency-ms", "-1"), "--latency-ms is a number"),
        (("compress", NAME, *_DATA, *_OUT, "--macs", "1", "--runtime", "x"), "--runtime must be"),
        (
            ("compress", NAME, "--data", "{}/wide.safetensors", *_OUT, "--macs", "1"),
            "they are the first sample of --data",
        ),
        (
            ("compress", NAME, *_DATA, *_OUT, "--macs", "1", "--weights", "{}/gated.swan"),
            "cut it first: swan-surgery prune",
        ),
        (("export", NAME, "{}/gated.swan", "{}/x.onnx"), "cut it first: swan-surgery prune"),
        (("export", TOKENS, "{}/small.swan", "{}/x.onnx"), "name the model as it was before"),
        (("report", *_SMALL, "--input", "1,3,8,8"), "shapes that it takes by --input"),
        (("latency", *_SMALL, "--runtime", "x"), "--runtime must be"),
        (("adapt", NAME, *_OUT, *_DATA, "--max-macs", "0.0001"), "--max-macs 0.0001 is"),
        (("swap", NAME, *_OUT, "--start", "x"), "--start 'x': there are"),
        (("swap", NAME, *_OUT, "--activation", "x"), "starrelu$"),
    ],
    ids=lambda own: "-".join((own[0], *own[-2:])) if isinstance(own, tuple) else "",
)
def test_errors_speak_of_options(words, said, files) -> None:
    done = CliRunner().invoke(app, [word.replace("{}", str(files)) for word in words])
    assert done.exit_code == 2, done.output
    error = " ".join(done.output.partition("error: ")[2].split())
    assert re.search(said, error), error
    assert not re.search(r"swan\.\w+\(|example_inputs|in_place|round_to|\w=True", error), error


def test_what_is_no_option_of_the_command_stays_as_it_is() -> None:
    (prune,) = (own.callback for own in app.registered_commands if own.name == "prune")
    speak_for(prune.__wrapped__)
    assert spoken("steps=3 and macs=0.5, uniform=True") == "steps=3 and --macs 0.5, uniform=True"
    assert spoken("/data/macs=1.swan: no such file") == "/data/macs=1.swan: no such file"


def test_gates_that_have_not_learnt_are_told_of(files) -> None:
    words = ("prune", NAME, "--weights", "{}/gated.swan", *_OUT, "--macs", "0.5")
    done = CliRunner().invoke(app, [word.replace("{}", str(files)) for word in words])
    assert done.exit_code == 0, done.output
    told = " ".join(done.stderr.split())
    assert told.startswith("warning: the gates have not learnt: the ")
    assert told.endswith("without the gated file: by --score, or by swan-surgery compress")
