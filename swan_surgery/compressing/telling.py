"""What a long call is at, as one line on stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, TimeRemainingColumn


Tell = Callable[[str, float], None]  # what is going on, and how much of it is done, in [0, 1]


@contextmanager
def told(progress: bool) -> Iterator[Tell]:  # noqa: FBT001 - one switch
    """A line on stderr: what is going on, how much of it is done, how long it will take."""
    if not progress:
        yield lambda _text, _share: None
        return
    columns = (*Progress.get_default_columns()[:3], TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)

        def tell(text: str, share: float) -> None:
            if bar.tasks[0].description != text:
                bar.reset(task, description=text)
            bar.update(task, completed=share)

        yield tell


__all__ = ["Tell", "told"]
