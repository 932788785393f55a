"""Tells which torch function of a module's code is running, and keeps what leaves torch there."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from swan_surgery.calls.arguments import leaves_of, numbers_of
from swan_surgery.calls.functions import FUNCTIONS, LEAVING
from swan_surgery.calls.mode import Called, NumberingMode
from swan_surgery.calls.slim_forms import SLIM_FORMS
from swan_surgery.channels.labels.labels import Labels
from swan_surgery.channels.labels.makers import Makers
from swan_surgery.channels.labels.recording import Frame, Reason
from swan_surgery.channels.runs.whole import whole_op


class FrameMode(NumberingMode):
    """Tells the labels which torch function is running, if it can be weighted or resized."""

    def __init__(self, labels: Labels, makers: Makers) -> None:
        super().__init__(frozenset(FUNCTIONS) | LEAVING)
        self.labels = labels
        self.makers = makers
        self.recover: Callable[[Frame], Any] | None = None
        self.step: Callable[[Any, Any, Any], Any] | None = None
        self.left: Iterator[Any] | None = None

    def around(self, func: Any, args: Any, kwargs: dict[str, Any], called: Called) -> Any:
        """Run the call inside its frame."""
        if called.function in LEAVING:
            return self._leaving(func, args, kwargs, called.module)
        leaves = numbers_of(args, kwargs)
        frame = Frame(called.module, called.function, called.number, leaves, called.site)
        self.labels.frame = frame
        whole = whole_op(called.function, args)
        try:
            if whole is not None and self.step is not None:
                out = self.step(whole, args, kwargs)
            else:
                out = SLIM_FORMS.get(called.function, func)(*args, **kwargs)
        except (RuntimeError, ValueError, IndexError):
            if self.recover is None:
                raise
            return self.recover(frame)
        finally:
            self.labels.frame = None
        ops = self.labels.recording.ops
        if ops and ops[-1].frame is frame:
            ops[-1].returned = self.makers.returned(out)
        return out

    def _leaving(self, func: Any, args: Any, kwargs: dict[str, Any], module: str) -> Any:
        """Values that go on as plain numbers: nobody sees where, so their channels stay.

        A rehearsal gives the values of the recording: those of a narrower model are others.
        """
        labels = self.labels
        why = Reason("their values leave torch", func.__name__, module)
        with _disable_current_modes():  # no operation of ours belongs to the run
            for tensor in (own for own in leaves_of((args, kwargs)) if isinstance(own, Tensor)):
                for field in labels.fields(tensor):
                    labels.pin_because(field, why)
        values = func(*args, **kwargs)
        known = next(self.left, None) if self.left is not None else None
        if known is not None and np.shape(known) == np.shape(values):
            return copy.deepcopy(known)
        labels.recording.left.append(copy.deepcopy(values))
        return values
