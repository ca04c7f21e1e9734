"""The `lmaas` command: runs the processes of the service, and manages a service over its HTTP API."""

from lmaas.cli.commands import main

__all__ = ["main"]
