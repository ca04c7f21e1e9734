"""Processes and ports of this machine."""

import socket

import psutil


def command_of(process: psutil.Process) -> list[str]:
    """A process's command line; empty of one that is gone."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
