"""Forward passes that stop at every event and go on when told: many batches through a model, one layer at a time.

Each pass has a thread of its own, of which exactly one runs at any moment. So the weights of a layer can be
solved for with what all batches bring to it, and every batch goes on with the new weights: one pass instead
of one per layer, through any Python code.
"""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from swan_surgery.environment.memory import hand_back


Event = TypeVar("Event")


class _Abandoned(BaseException):
    """Unwinds a pass that nobody needs any more."""


class Pass(Generic[Event]):
    """Work that is done from event to event.

    Args:
        work: called with `stop_at(event)`, which returns when the pass is told to go on.
    """

    def __init__(self, work: Callable[[Callable[[Event], None]], None]) -> None:
        self._work = work
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._event: Event | None = None
        self._error: BaseException | None = None
        self._ended = self._abandoned = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def next(self) -> Event | None:
        """Go on to the next event; None at the end. Raises what the work raised."""
        if self._ended:
            return None
        self._event = None
        self._go.release()
        self._stopped.acquire()
        hand_back()  # the next thread could not use what this one's has freed
        if self._error is not None:
            raise self._error
        return self._event

    def abandon(self) -> None:
        """End the pass where it stands."""
        if not self._ended:
            self._abandoned = True
            self._go.release()
        self._thread.join()

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._abandoned:
                self._work(self._stop_at)
        except _Abandoned:
            pass
        except BaseException as err:  # noqa: BLE001 - handed to whoever waits
            self._error = err
        finally:
            self._ended = True
            self._stopped.release()

    def _stop_at(self, event: Event) -> None:
        if self._abandoned:  # once more, while the work unwinds: nobody listens any longer
            raise _Abandoned
        self._event = event
        self._stopped.release()
        self._go.acquire()
        self._event = None
        if self._abandoned:
            raise _Abandoned
