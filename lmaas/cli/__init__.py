"""The `lmaas` command: processes, and operator's and tenant's work on top of the HTTP API."""

from lmaas.cli.commands import main

__all__ = ["main"]
