"""Gated and pruned models go to other processes: classes made on the spot are found, or made, again."""

import copy
import io
import pickle  # noqa: TID251 - people's workers do
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.calls.resizing import Resized


class Heads(nn.Module):
    """Repeats its widths as numbers in its code."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.qkv, self.last = nn.Linear(6, 32), nn.Linear(32, 96), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        parted = self.qkv(torch.relu(self.first(x))).view(x.shape[0], -1, 3, 4, 8)
        q, k, v = parted.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.last(mixed.reshape(x.shape[0], -1, 32))


class Plain(nn.Module):
    """Traced, with a module of its own inside and functions of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.block = Inner()

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.block(self.inner(x)).clamp(-1, 1), approximate="tanh")


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.sigmoid(x) * 2)


def example() -> Tensor:
    return torch.linspace(-1, 1, 60).view(2, 5, 6)


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    base = {"heads": Heads, "plain": Plain}[kind.rsplit(maxsplit=1)[-1]]()
    gated = swan.swanify(base, example(), in_place="graph" not in kind).eval()
    with torch.no_grad():
        gated.gates.logits[::3] = -3.0
    return swan.prune(gated).eval() if "pruned" in kind else gated


KINDS = ["gated graph plain", "gated plain", "gated heads", "pruned plain", "pruned heads"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_and_its_copies_are_the_same(kind) -> None:
    model = made(kind)
    file = io.BytesIO()
    torch.save(model, file)  # noqa: TID251 - people do
    file.seek(0)
    others = (
        pickle.loads(pickle.dumps(model)),  # noqa: S301 - made here
        torch.load(file, weights_only=False),  # noqa: TID251 - made here
        copy.deepcopy(model),
        copy.deepcopy(pickle.loads(pickle.dumps(model))),  # noqa: S301 - made here
    )
    for other in others:
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(other(example()), model(example()))


def test_the_class_of_a_pruned_model_is_the_given_one_unless_its_code_repeats_a_width() -> None:
    assert type(made("pruned plain")) is Plain
    small = made("pruned heads")
    assert isinstance(small, Heads)
    assert isinstance(small, Resized)
    assert type(small).__name__ == "ResizedHeads"


def run(model: nn.Module) -> Tensor:
    return model(example()).detach()


@pytest.mark.slow
def test_workers_that_spawn_run_them() -> None:
    models = [made(kind) for kind in KINDS]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        for model, found in zip(models, pool.map(run, models), strict=True):
            torch.testing.assert_close(found, run(model))
