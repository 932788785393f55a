"""What blocks read of their inputs while a model runs."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from swan_surgery.adaptive.adaptive_model import AdaptiveModel
from swan_surgery.adaptive.block import AdaptiveBlock


@contextmanager
def watching(adapted: AdaptiveModel, names: Iterable[str]) -> Iterator[Mapping[str, list[Tensor]]]:
    """Collects what efforts would read, batch by batch."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def look(_entry: nn.Module, args: Any, kwargs: Any, *, block: AdaptiveBlock) -> None:
        found[block.name].append(block.features((args, kwargs)).cpu())

    blocks = adapted.blocks()
    handles = [
        blocks[name].entry.register_forward_pre_hook(
            partial(look, block=blocks[name]), with_kwargs=True
        )
        for name in found
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


__all__ = ["watching"]
