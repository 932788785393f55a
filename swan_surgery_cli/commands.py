"""All commands, declared; importing this declares them."""

import swan_surgery_cli.looking
import swan_surgery_cli.making  # noqa: F401 - declares
from swan_surgery_cli.app import app


__all__ = ["app"]
