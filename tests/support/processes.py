"""Processes and ports of this machine."""

import socket

import psutil


def command_of(process: psutil.Process) -> list[str]:
    """Return a process's command line, or an empty one if the process has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
