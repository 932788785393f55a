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

    def look(block: nn.Module, args: Any, kwargs: Any, *, name: str) -> None:
        assert isinstance(block, AdaptiveBlock)  # noqa: S101 - hooked below
        found[name].append(block.features((args, kwargs)).cpu())

    handles = [
        adapted.blocks()[name].register_forward_pre_hook(partial(look, name=name), with_kwargs=True)
        for name in found
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


__all__ = ["watching"]
