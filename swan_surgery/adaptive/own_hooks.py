"""Hooks that answer to the run that registered them, and not to one that another thread makes of the same model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any


Hook = Callable[..., Any]
_UNDER_WAY: ContextVar[frozenset[object]] = ContextVar("swan_own_hooks", default=frozenset())


@contextmanager
def own_hooks() -> Iterator[Callable[[Hook], Hook]]:
    """Gives what makes a hook one of this run: elsewhere it does nothing."""
    here = object()
    token = _UNDER_WAY.set(_UNDER_WAY.get() | {here})

    def of_this_run(hook: Hook) -> Hook:
        def called(*args: Any, **kwargs: Any) -> Any:
            return hook(*args, **kwargs) if here in _UNDER_WAY.get() else None

        return called

    try:
        yield of_this_run
    finally:
        _UNDER_WAY.reset(token)


__all__ = ["own_hooks"]
