"""Blocks that draw random numbers leave the streams alone, and queue nothing for devices that are not there."""

import pytest
import torch

from swan_surgery.environment.random_streams import streams_kept


@pytest.mark.parametrize("seed", [None, 3])
def test_the_stream_goes_on_behind_the_block_also_when_it_raises(seed) -> None:
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    with pytest.raises(RuntimeError, match="size"), streams_kept(seed):
        torch.rand(5).view(3)
    assert torch.equal(torch.rand(3), wanted)


def test_with_a_seed_the_block_starts_where_manual_seed_does() -> None:
    with streams_kept(3):
        drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there its streams start at the seed")
def test_nothing_is_queued_for_devices_that_are_not_there() -> None:
    queued = torch.cuda._queued_calls
    before = len(queued)
    with streams_kept(3):
        pass
    assert len(queued) == before
