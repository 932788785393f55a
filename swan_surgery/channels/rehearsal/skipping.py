"""A module whose code refuses a width is skipped, so that one rehearsal tells of all that do."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn

from swan_surgery.channels.rehearsal.failures import failure_of
from swan_surgery.channels.rehearsal.rehearsing import RehearsalMode


@contextmanager
def skipping(mode: RehearsalMode, shell: nn.Module, names: Mapping[int, str]) -> Iterator[None]:
    """Inside the block, modules of a private shell that raise return what the recording predicts."""
    before = [
        (module, vars(module).get("forward"))
        for module in shell.modules()
        if module is not shell and not isinstance(module, torch.jit.ScriptModule)
    ]
    for module, _ in before:
        vars(module)["forward"] = _skipped(mode, names, names[id(module)], module.forward)
    try:
        yield
    finally:
        # A cycle, while garbage collection is paused: every shell would stay in memory.
        for module, forward in before:
            del vars(module)["forward"]
            if forward is not None:
                vars(module)["forward"] = forward


def _skipped(
    mode: RehearsalMode, names: Mapping[int, str], name: str, forward: Callable[..., Any]
) -> Callable[..., Any]:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if mode.module != name:  # called past its hooks
            return forward(*args, **kwargs)
        expected = mode.take(name)
        try:
            return forward(*args, **kwargs)
        except Exception as err:
            if expected is None:
                raise
            failure = failure_of(err, mode.next_index, names=names, makers=mode.makers)
            out = mode.skip(expected, failure)
            if out is None:
                raise
            return out

    return run
