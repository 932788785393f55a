"""Inputs that take another path than the mapped one: an error, never a wrong result."""

import pytest
import torch
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.calls.sites import PathGuard, call_site
from swan_surgery.cutting.verification import tensor_error
from tests.closing import TOLERANCE, close_random_, image, prepared


LONG = 12  # more than twice the length that is mapped: maps are made at two sizes


class Scaled(nn.Module):
    """A long input is scaled before the number that repeats a width is met."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > LONG:
            x = x * 0.5
        q = self.inner(x)
        return self.out(torch.relu(q * q.shape[-1] ** -0.5))


class Centred(nn.Module):
    """A long input is centred over its tokens first: the mean over channels is then the second."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > LONG:
            x = x - x.mean(1, keepdim=True)
        q = self.inner(x)
        return self.out(torch.relu(q - q.mean(-1, keepdim=True)))


class Brief(nn.Module):
    """A long input skips the number that repeats a width."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        q = self.inner(x)
        if x.shape[1] <= LONG:
            q = q * q.shape[-1] ** -0.5
        return self.out(torch.relu(q))


def gate_and_cut(block: nn.Module) -> tuple[swan.GatedModel, nn.Module]:
    gated = swan.swanify(prepared(nn.Sequential(nn.Linear(3, 8), block)), image(2, 5, 3)).eval()
    close_random_(gated, 0.4, 0)
    return gated, swan.prune(gated)


@pytest.mark.parametrize("block", [Scaled, Centred, Brief])
def test_another_size_on_the_mapped_path_is_exact(block: type[nn.Module]) -> None:
    gated, pruned = gate_and_cut(block())
    x = image(3, LONG, 3)
    with torch.no_grad():
        assert tensor_error(gated(x), pruned(x)) <= TOLERANCE


@pytest.mark.parametrize("block", [Scaled, Brief])
def test_a_pruned_model_refuses_another_path(block: type[nn.Module]) -> None:
    _, pruned = gate_and_cut(block())
    with pytest.raises(swan.PathError, match=rf"mul\(\).*{block.__name__}.forward.*example inputs"):
        pruned(image(2, 15, 3))
    pruned(image(2, 5, 3))  # and works on


def test_a_gated_model_refuses_another_path() -> None:
    gated, _ = gate_and_cut(Centred())
    before = gated.model[1].forward
    with pytest.raises(swan.PathError, match=r"mean\(\)"):
        gated(image(2, 15, 3))
    assert gated.model[1].forward == before


def test_mapped_with_an_input_of_the_other_kind_it_runs_there() -> None:
    gated = swan.swanify(prepared(nn.Sequential(nn.Linear(3, 8), Scaled())), image(2, 15, 3)).eval()
    close_random_(gated, 0.4, 0)
    x = image(2, 18, 3)
    with torch.no_grad():
        assert tensor_error(gated(x), swan.prune(gated)(x)) <= TOLERANCE


def test_a_site_is_a_function_and_a_line_in_it() -> None:
    def here() -> tuple[str, str]:
        first = call_site()
        return first, call_site()

    first, second = here()
    assert first.endswith("here+1")
    assert second.endswith("here+2")


def test_a_guard_wants_every_call_once_the_module_has_run() -> None:
    guard = PathGuard({("view", 1): "f+1"})
    guard.check(("mul", 1))  # not one of the named
    with pytest.raises(swan.PathError, match=r"call 1 of view\(\) at f\+1 was not made"):
        guard.finish()
    PathGuard({}).finish()


@pytest.mark.parametrize("block", [Scaled, Centred, Brief])
def test_a_path_that_the_second_mapped_size_takes_is_exact_or_refused(
    block: type[nn.Module], monkeypatch
) -> None:
    monkeypatch.setitem(globals(), "LONG", 6)
    gated, pruned = gate_and_cut(block())
    for length in (3, 5, 9, 12):
        x = image(2, length, 3)
        try:
            with torch.no_grad():
                assert tensor_error(gated(x), pruned(x)) <= TOLERANCE
        except swan.PathError:
            assert length > LONG
            assert block is not Centred
