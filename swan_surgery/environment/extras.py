"""What may or may not be there: optional packages, and functions that users name."""

import difflib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from swan_surgery.errors import InputError, MissingExtraError


@contextmanager
def needed_from(extra: str) -> Iterator[None]:
    """Import what an optional extra installs, inside the block.

    Raises:
        MissingExtraError: says what to install.
    """
    try:
        yield
    except ImportError as err:
        raise MissingExtraError(
            f"{err.name or err} is not installed; pip install 'swan-surgery[{extra}]'"
        ) from err


def named_function(name: str) -> Callable[..., Any]:
    """What `package.module:function` names; the working folder counts as on the path.

    Raises:
        InputError: no such module, or nothing in it that can be called.
    """
    module_name, _, attribute = name.partition(":")
    if module_name.endswith(".py"):
        dotted = module_name.removesuffix(".py").replace("/", ".")
        raise InputError(
            f"{name!r} is a file: name it as Python imports it, {dotted}:{attribute or 'FUNCTION'}"
        )
    # A console script does not have the working folder on its path; `python -m` has.
    folder = str(os.getcwd())  # noqa: PTH109 - sys.path wants a string
    added = folder not in sys.path
    if added:
        sys.path.insert(0, folder)
    try:
        module = import_module(module_name)
    except ImportError as err:
        raise InputError(f"cannot import {module_name!r}: {err}") from err
    finally:
        if added:
            sys.path.remove(folder)
    function: Callable[..., Any] | None = getattr(module, attribute, None)
    if not callable(function):
        names = [own for own, value in vars(module).items() if callable(value)]
        near = difflib.get_close_matches(attribute, names, n=3, cutoff=0.5)
        told = f"; nearest names: {', '.join(near)}" if near else ""
        raise InputError(f"module {module_name!r} has no function {attribute!r}{told}")
    return function
