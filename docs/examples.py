"""The docstrings' `Example:` for griffe, which knows examples as `Examples:` alone."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Has examples rendered as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section before it is parsed."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
