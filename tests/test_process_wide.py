"""Settings of the whole process come back whatever threads overlap."""

import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import swan_surgery as swan
from swan_surgery.environment.process_wide import (
    attention_in_products,
    without_fast_path,
    without_warnings,
)


Block = Callable[[], AbstractContextManager[None]]


def settings() -> tuple[Any, ...]:
    """What swan_surgery changes while it looks at a model, and threads share."""
    return (
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        list(warnings.filters),
    )


def run(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@pytest.mark.parametrize("block", [without_fast_path, attention_in_products, without_warnings])
@pytest.mark.parametrize("first_out", ["first in", "last in"])
def test_blocks_of_two_threads_overlap(block: Block, first_out: str) -> None:
    before = settings()
    one, two = block(), block()
    one.__enter__()
    changed = settings()
    assert changed != before
    run(two.__enter__)
    first, last = (one, two) if first_out == "first in" else (two, one)
    run(partial(first.__exit__, None, None, None))
    assert settings() == changed  # somebody is still inside
    run(partial(last.__exit__, None, None, None))
    assert settings() == before


@pytest.mark.parametrize("block", [without_fast_path, attention_in_products, without_warnings])
def test_a_block_that_fails_lets_go(block: Block) -> None:
    before = settings()
    with pytest.raises(ValueError, match="within"), block():
        raise ValueError("within")
    assert settings() == before


class Calls(nn.Module):
    """Does something else while it runs."""

    meanwhile: Callable[[], object]  # of the class: models are copied, and what waits cannot be

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        type(self).meanwhile()
        return self.two(self.one(x).relu())


@pytest.mark.parametrize("look", [swan.count_macs, swan.channel_map, swan.swanify])
def test_two_threads_look_at_models(look: Callable[..., object]) -> None:
    """One comes in while the other is inside, and leaves after it."""
    before, x = settings(), torch.zeros(2, 4)
    inside, both, left = threading.Event(), threading.Event(), threading.Event()

    def waits(runs: threading.Event, for_: threading.Event) -> Callable[[], object]:
        def meet() -> None:
            runs.set()
            for_.wait(timeout=60)

        return meet

    class First(Calls):
        meanwhile = staticmethod(waits(inside, both))

    class Second(Calls):
        meanwhile = staticmethod(waits(both, left))

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(look, First(), x)
        first.add_done_callback(lambda _: left.set())
        assert inside.wait(timeout=60)
        second = pool.submit(look, Second(), x)
        first.result()
        second.result()
    assert settings() == before


def cut_and_compensated(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3))
    for parameter in model.eval().parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    data = [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(3)]
    gated = swan.swanify(model, data[0])
    scores = swan.importance(gated, "magnitude")
    small = swan.prune_by_score(gated, scores, macs=0.5, compensate=data)
    return [tensor.clone() for tensor in small.state_dict().values()]


def test_threads_cut_and_compensate_as_one_does() -> None:
    before = settings()
    wanted = [cut_and_compensated(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(cut_and_compensated, range(4)))
    for one, other in zip(found, wanted, strict=True):
        assert all(map(torch.equal, one, other))
    assert settings() == before
