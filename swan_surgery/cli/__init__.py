"""The command line: `swan-surgery inspect`, `train`, `prune`, `report`, `export`, `latency`, `demo`."""

from swan_surgery.cli.commands import app, main


__all__ = ["app", "main"]
