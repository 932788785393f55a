"""What is shown while a command works."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import torch
import typer
from rich.console import Console

from swan_surgery.errors import InputError, SwanWarning
from swan_surgery_cli.wording import spoken


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """A spinner on stderr, so that stdout holds the result alone; models run inside."""
    with warnings_told(), foreign_code(), Console(stderr=True).status(text):
        yield


@contextmanager
def warnings_told() -> Iterator[None]:
    """The library's own are told, one line each, on stderr, when all is done; those of others are for their authors."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", SwanWarning)
        yield
    for own in dict.fromkeys(" ".join(str(one.message).split()) for one in seen):
        typer.echo(f"warning: {spoken(own)}", err=True)


@contextmanager
def foreign_code() -> Iterator[None]:
    """People's own code runs inside: what it prints goes to stderr, and does not end the command.

    Raises:
        InputError: it called `sys.exit`.
    """
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)  # what is written past Python as well
    try:
        with redirect_stdout(sys.stderr):
            yield
    except SystemExit as err:
        raise InputError(f"the model's own code ended the program: sys.exit({err.code!r})") from err
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


@contextmanager
def on_threads(count: int | None) -> Iterator[None]:
    """So many threads of torch; None: as many as now.

    One where only labels or tiny images run: more wait for each other, on a busy machine long. Measured
    with two shared cores under load: the map of vit_b_16 takes 2 s with one thread, 38 s with two;
    inspecting maskrcnn_resnet50_fpn, which runs on data, takes 20 s and 50 s.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
