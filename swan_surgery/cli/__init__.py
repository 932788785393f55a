"""The command line: `swan-surgery inspect` and `swan-surgery demo`."""

from swan_surgery.cli.commands import app, main


__all__ = ["app", "main"]
