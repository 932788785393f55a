"""Example inputs as data: what comes back of them, and where it is noted."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import swan_surgery as swan
from swan_surgery.models import Inputs
from swan_surgery.models.input_records import inputs_of_json, inputs_to_json
from swan_surgery.models.provenance import provenance_of
from tests.closing import learnt_


def test_shapes_types_and_structure_without_what_they_say() -> None:
    inputs = Inputs(
        (torch.rand(2, 3).half(), [torch.zeros(1, 4)], (3, "mode")),
        {
            "ids": torch.tensor([[4, 9, 2]]),
            "mask": torch.tensor([True, False]),
            "more": {"a": None},
        },
    )
    found = inputs_of_json(json.loads(json.dumps(inputs_to_json(inputs, values=False))))
    assert (found.args[0].shape, found.args[0].dtype) == ((2, 3), torch.half)
    assert found.args[1][0].shape == (1, 4)
    assert found.args[2] == (3, "mode")
    assert found.kwargs["ids"].tolist() == [[9, 9, 9]]
    assert found.kwargs["mask"].tolist() == [True, True]
    assert found.kwargs["more"] == {"a": None}
    whole = inputs_of_json(json.loads(json.dumps(inputs_to_json(inputs))))
    assert whole.kwargs["ids"].tolist() == [[4, 9, 2]]


def test_a_cut_model_remembers_the_last_ones_through_files(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2))
    small = swan.prune(learnt_(swan.swanify(net, torch.zeros(4, 3))), macs=0.8)
    smaller = swan.prune(learnt_(swan.swanify(small, torch.zeros(5, 7, 3))), macs=0.8)
    swan.save(smaller, tmp_path / "x.swan")
    back = provenance_of(swan.load(tmp_path / "x.swan", net))
    assert back is not None
    assert back.inputs is not None
    assert back.inputs.args[0].shape == (5, 7, 3)
    assert provenance_of(net) is None
    swapped = swan.swap_activations(net, "silu", torch.zeros(6, 3), start="fresh")
    assert provenance_of(swapped).inputs.args[0].shape == (6, 3)


@pytest.mark.parametrize(
    "noted",
    [3, [[{"shape": [1 << 20, 1 << 20], "dtype": "float32", "values": None}], {}], [[{}], {}]],
)
def test_what_is_no_record_is_refused_and_the_model_loads(noted: object) -> None:
    net = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2))
    small = swan.prune(learnt_(swan.swanify(net, torch.zeros(4, 3))), macs=0.8)
    text = json.loads(vars(small)["swan_provenance"])
    text["steps"][-1]["data"]["inputs"] = noted
    small.swan_provenance = json.dumps(text)
    known = provenance_of(small)
    with pytest.raises((swan.InputError, swan.ArtifactError), match="example inputs"):
        known.inputs  # noqa: B018 - it is read
