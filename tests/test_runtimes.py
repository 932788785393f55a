"""Latency in the runtimes a model is meant for."""

import json

import pytest
import torch
from torch import nn

import swan_surgery as swan
from swan_surgery.models import as_inputs
from swan_surgery.timing.runtimes import forward_pass
from tests.zoo import ZOO


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).train()


X = torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("runtime", ["eager", "onnxruntime"])
def test_says_what_was_measured_where(runtime) -> None:
    model = net()
    found = swan.measure_latency(model, X, runtime=runtime, seconds=0.01)
    own = found.latency
    assert found.runtime == runtime
    assert own.batch == 2
    assert 0 < own.lower_quartile_ms <= own.median_ms <= own.upper_quartile_ms
    assert 3 <= own.repeats <= 200
    assert found.environment.threads == torch.get_num_threads()
    assert model.training
    assert json.loads(json.dumps(found.to_dict()))["latency"]["batch"] == 2
    assert str(found).startswith(f"{runtime}, batch 2: ")


def test_a_pass_runs_a_copy_in_eval_mode() -> None:
    seen = []

    class Probe(nn.Linear):
        def forward(self, x):
            seen.append((self.training, torch.is_grad_enabled(), self))
            return super().forward(x)

    model = Probe(2, 2)
    forward_pass(model, as_inputs(torch.randn(1, 2)), "eager")
    ((training, grads, ran),) = seen
    assert not training
    assert not grads
    assert ran is not model


def test_compiled(monkeypatch) -> None:
    compiled = []

    def stand_in(module):
        compiled.append(module)
        return module

    monkeypatch.setattr(torch, "compile", stand_in)  # a C++ compiler is no part of the tests
    found = swan.measure_latency(net(), X, runtime="compile", seconds=0.01)
    assert found.runtime == "compile"
    assert len(compiled) == 1


def test_the_slower_model_is_slower() -> None:
    slow = nn.Sequential(*[nn.Linear(400, 400) for _ in range(20)])
    fast = nn.Linear(400, 400)
    x = torch.randn(64, 400)
    times = [swan.measure_latency(m, x, seconds=0.1).latency.median_ms for m in (slow, fast)]
    assert times[0] > 2 * times[1]


class TestRefusals:
    def test_runtime(self) -> None:
        with pytest.raises(swan.InputError, match=r"runtime must be one of .* got 'tensorrt'"):
            swan.measure_latency(net(), X, runtime="tensorrt")

    def test_gated(self) -> None:
        with pytest.raises(swan.ModelError, match=r"measure what swan\.prune\(gated\) returns"):
            swan.measure_latency(swan.swanify(*ZOO["vgg"]()), ZOO["vgg"]()[1])

    def test_inputs_that_do_not_fit(self) -> None:
        with pytest.raises(swan.InputError, match="Sequential cannot be run on the inputs"):
            swan.measure_latency(net(), torch.randn(2, 4, 8, 8))
