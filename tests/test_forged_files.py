"""Files that anybody can write, with a right checksum: refused, whatever they hold, and in little memory."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import swan_surgery as swan
from swan_surgery.artifacts import container
from swan_surgery.artifacts.structures import pack, unpack


INFINITE = float("inf")


class Drops(nn.Module):
    """Beside layers: numbers, texts and flags of its own, and a width that follows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))
        self.drop, self.mode, self.is_on, self._width = 0.5, "1", True, 8

    def forward(self, x):
        x = self.layers[2](self.layers[1](self.layers[0](x)))
        return self.layers[3](x.view(-1, self._width))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    gated = swan.swanify(Drops(), torch.randn(2, 6))
    with torch.no_grad():
        gated.gates.logits[::2] = -3.0
    path = tmp_path_factory.mktemp("whole") / "x.swan"
    swan.save(swan.prune(gated), path)
    return path


def forged(whole: Path, path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The file with another header; `provenance` and its first `plan` are handed over as data."""
    header, tensors = container.read(whole)
    provenance = json.loads(unpack(header["provenance"]))
    plan = json.loads(provenance["steps"][0]["data"]["plan"])
    change({"header": header, "provenance": provenance, "plan": plan})
    provenance["steps"][0]["data"]["plan"] = json.dumps(plan)
    header["provenance"] = pack(json.dumps(provenance))
    container.write(path, header, tensors)
    return path


def test_a_private_width_follows_and_is_set_again(whole) -> None:
    assert swan.load(whole, Drops())._width == 4


@pytest.mark.parametrize(
    "entry",
    [
        ["", "drop", None, 5],
        ["", "mode", 0, 5],
        ["", "is_on", None, 0],
        ["layers.1", "eps", None, 1],
        ["layers.2", "inplace", None, 1],
        ["layers.0", "in_features", None, 3],
        ["layers.1", "normalized_shape", 1, 3],
        ["", "_width", None, 8],
        ["", "_width", None, 10**9],
        ["", "_width", None, -1],
        ["", "_width", None, 3.0],
        ["", "_width", None, True],
        ["", "nothing", None, 3],
        ["", ["_width"], None, 3],
        ["layers.9", "_width", None, 3],
    ],
    ids=str,
)
def test_a_plan_sets_nothing_but_widths_and_makes_them_smaller(entry, whole, tmp_path) -> None:
    def change(parts: dict[str, Any]) -> None:
        parts["plan"]["attributes"] = [entry]

    with pytest.raises(swan.ArtifactError):
        swan.load(forged(whole, tmp_path / "x.swan", change), Drops())


FORGED: dict[str, Callable[[dict[str, Any]], object]] = {
    "infinite MACs": lambda f: f["provenance"]["steps"][0]["macs"].update(before=INFINITE),
    "infinite shape": lambda f: f["provenance"]["shapes"].update({"layers.0.weight": [INFINITE]}),
    "infinite units": lambda f: f["plan"].update(num_units=INFINITE),
    "infinite axis": lambda f: f["plan"]["positions"].append(["layers.0.weight", INFINITE, 0]),
    "infinite number": lambda f: f["plan"]["numbers"].append(["", "view", 1, 1, True, INFINITE, ""]),
    "true for a number": lambda f: f["plan"]["numbers"].append(["", "view", 1, 1, True, True, ""]),
    "infinite norm": lambda f: f["header"].update(bare_norms={"layers.1": INFINITE}),
    "width of what is no norm": lambda f: f["header"].update(bare_norms={"layers.0": 4}),
    "axis before the first": lambda f: f["plan"]["positions"].append(["layers.3.bias", -1, 0]),
    "an axis twice": lambda f: f["plan"]["positions"].append(f["plan"]["positions"][0]),
    "positions of no axis": lambda f: f["plan"]["kept"].append("f"),
    "positions below zero": lambda f: f["plan"].update(kept=["-f"] * len(f["plan"]["kept"])),
    "positions past the axis": lambda f: f["plan"].update(kept=["fff"] * len(f["plan"]["kept"])),
    "more units than positions": lambda f: f["plan"].update(num_units=10**6, open_units="f" * 10**5),
    "open units past all": lambda f: f["plan"].update(open_units="f" * 10),
    "modes of nothing": lambda f: f["header"].update(other_mode=5),
    "gates of nothing": lambda f: f["header"].update(kind="gated", gating={"inputs": 3}),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_whatever_a_header_holds_it_is_an_artifact_error(name, whole, tmp_path) -> None:
    with pytest.raises(swan.ArtifactError):
        swan.load(forged(whole, tmp_path / "x.swan", FORGED[name]), Drops())


@pytest.mark.parametrize("text", ['"x"', "null", "5", "[]", '{"sha256": null}'])
def test_a_header_that_is_no_object(text, tmp_path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.swan", {"swan_surgery": text})
    with pytest.raises(swan.ArtifactError, match=r"not a whole file written by swan\.save"):
        swan.load(tmp_path / "x.swan", Drops())


def test_a_digest_that_is_a_list(tmp_path) -> None:
    header = json.dumps({"sha256": ["a"] * 64})
    save_file({"a": torch.zeros(1)}, tmp_path / "x.swan", {"swan_surgery": header})
    with pytest.raises(swan.ArtifactError):
        swan.load(tmp_path / "x.swan", Drops())


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "loop"])
def test_names_that_the_system_refuses(name, tmp_path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(swan.ArtifactError):
        swan.load(tmp_path / name, Drops())
    with pytest.raises(swan.WritingError, match="cannot write"):
        swan.save(Drops(), tmp_path / name)


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f["plan"]["kept"].append("f" * 4_000_000),
        lambda f: f["plan"]["kept"].extend(["f"] * 1_000_000),
        lambda f: f["plan"].update(open_units="f" * 4_000_000, num_units=16_000_000),
        lambda f: f["provenance"].update(shapes=[[]] * 4_000_000),
    ],
    ids=["long set", "many sets", "units", "brackets"],
)
def test_memory_is_in_proportion_to_the_file(change, whole, tmp_path) -> None:
    path = forged(whole, tmp_path / "x.swan", change)
    assert path.stat().st_size < 100_000
    tracemalloc.start()
    try:
        with pytest.raises(swan.ArtifactError):
            swan.load(path, Drops())
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()
