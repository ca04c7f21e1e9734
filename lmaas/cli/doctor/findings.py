"""Findings of the checks. The judgements are pure: facts in, a finding out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

MIB, GIB = 1024**2, 1024**3
#: With less free space than this, servers fail to write; with less than the second, they soon may.
FULL_BYTES, LOW_BYTES = 64 * MIB, 5 * GIB
FEW_INODES = 1000
#: The memory that an engine of the default model takes besides its KV cache, and the memory that the other processes need.
ENGINE_BYTES, PROCESSES_BYTES = 1536 * MIB, 512 * MIB
FEWEST_FILES = 1024
#: The difference between two clocks that is normal, and the one from which times in reports and limits are wrong.
SMALL_SKEW_S, LARGE_SKEW_S = 2.0, 30.0
MOST_NAMES = 5


class Level(StrEnum):
    """The severity of a finding."""

    OK = "ok"
    #: It works, but less well, or not for long.
    WARNING = "warning"
    #: Something does not work.
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check: a sentence, and unless all is well, a remedy."""

    level: Level
    check: str
    says: str
    do: str = ""


def ok(check: str, says: str) -> Finding:
    """Return a finding that all is well."""
    return Finding(Level.OK, check, says)


def warning(check: str, says: str, do: str) -> Finding:
    """Return a finding of something that works less well."""
    return Finding(Level.WARNING, check, says, do)


def wrong(check: str, says: str, do: str) -> Finding:
    """Return a finding of something that does not work."""
    return Finding(Level.WRONG, check, says, do)


def size(count: float) -> str:
    """Return a number of bytes in words."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"


def names(found: Sequence[str]) -> str:
    """Return the first names of a list, and how many more there are."""
    more = f" and {len(found) - MOST_NAMES} more" if len(found) > MOST_NAMES else ""
    return ", ".join(found[:MOST_NAMES]) + more


def judge_disk(check: str, folder: str, free: int, inodes: int | None) -> Finding:
    """Judge the free space of a folder's disk. `inodes` are the files that it can still take, None if it has no such limit."""
    says = f"{size(free)} are free on the disk of {folder}."
    if free < FULL_BYTES:
        return wrong(check, says, "Free some space, or choose a folder on another disk with LMAAS_HOME or LMAAS_CACHE.")
    if inodes is not None and inodes < FEW_INODES:
        return wrong(check, f"The disk of {folder} can take only {inodes} more files.", "Remove files, or choose a folder on another disk.")
    if free < LOW_BYTES:
        return warning(check, says, f"Free some: models, adapters and logs grow, and {size(LOW_BYTES)} or more are usual.")
    return ok(check, says)


def judge_memory(available: int, total: int, kv_cache_bytes: int, *, is_running: bool) -> Finding:
    """Judge the memory for one more engine. A running stack may have its engine already."""
    needed = PROCESSES_BYTES if is_running else PROCESSES_BYTES + ENGINE_BYTES + kv_cache_bytes
    says = f"{size(available)} of {size(total)} are available."
    if available >= needed:
        return ok("memory", says)
    do = "Stop other programs, or set LMAAS_ENGINE_KV_CACHE_BYTES to a smaller size."
    if available < PROCESSES_BYTES:
        return wrong("memory", says, do)
    return warning("memory", f"{says} The default engine with its KV cache needs about {size(needed)}.", do)


def judge_files(limit: int, max_connections: int) -> Finding:
    """Judge the number of files that a process may open. A gateway uses at most half of them for connections."""
    says = f"A process may open {limit:,} files."
    if limit < FEWEST_FILES:
        return wrong("file limit", says, f"Raise the hard limit to {2 * max_connections:,} (ulimit -Hn, LimitNOFILE in systemd).")
    if limit < 2 * max_connections:
        return warning(
            "file limit",
            f"{says} A gateway then takes {limit // 2:,} connections, not {max_connections:,} (LMAAS_MAX_CONNECTIONS).",
            f"For more, raise the hard limit to {2 * max_connections:,} (ulimit -Hn, LimitNOFILE in systemd).",
        )
    return ok("file limit", says)


def judge_clock(check: str, other: str, skew_s: float) -> Finding:
    """Judge the difference between this clock and that of another machine."""
    ahead = "ahead of" if skew_s < 0 else "behind"
    says = f"The clock of this machine is {abs(skew_s):.0f} s {ahead} that of {other}."
    do = "Synchronise the clocks of both machines, for instance with chrony."
    if abs(skew_s) > LARGE_SKEW_S:
        return wrong(check, says, do)
    if abs(skew_s) > SMALL_SKEW_S:
        return warning(check, says, do)
    return ok(check, f"The clock agrees with that of {other}.")


def judge_packages(needed: Sequence[str], installed: Mapping[str, str], pinned: Mapping[str, str]) -> Finding:
    """Judge the installed packages: all that are `needed`, in the versions that were tested."""
    missing = sorted(name for name in needed if name not in installed)
    if missing:
        return wrong("packages", f"These packages are not installed: {names(missing)}.", "Run `make up`, which installs them.")
    others = sorted(name for name, version in pinned.items() if name in installed and installed[name] != version)
    if others:
        found = names([f"{name} {installed[name]} (tested: {pinned[name]})" for name in others])
        return warning("packages", f"Some versions are not the tested ones: {found}.", "Run `make up`, which installs the tested ones.")
    tested = f", {len(pinned)} in the tested version" if pinned else ""
    return ok("packages", f"All {len(needed)} needed packages are installed{tested}.")


def judge_engine(version: str | None, *, for_cpus: bool, accelerators: int, known: Sequence[str], may_be_unknown: bool) -> Finding:
    """Judge the installed vLLM: its build must fit the machine, and on CPUs its version must be one that lmaas was checked with."""
    if version is None:
        return wrong("engine", "vLLM is not installed, so no engine can start here.", "Run `make up`, which installs it.")
    says = f"vLLM {version}, built for {'CPUs' if for_cpus else 'GPUs'}."
    if not for_cpus and accelerators == 0:
        return wrong("engine", f"{says} This machine has no GPU.", "Remove .venv and run `make up ENGINE=cpu`.")
    if for_cpus and accelerators:
        return warning("engine", f"{says} The GPUs of this machine are not used.", "Remove .venv and run `make up ENGINE=gpu`.")
    if for_cpus and version.partition("+")[0] not in known and not may_be_unknown:
        return wrong(
            "engine",
            f"{says} lmaas corrects LoRA on CPUs only in vLLM {', '.join(known)}, and refuses it in others.",
            "Run `make up`, which installs the right version.",
        )
    return ok("engine", says)


def judge_kernel(*, has_kernel: bool, compiler: str | None) -> Finding:
    """Judge the compiled kernel of LoRA on CPUs, for which a compiler is needed once."""
    if has_kernel:
        return ok("compiler", "The LoRA kernel for CPUs is compiled.")
    says = "The LoRA kernel for CPUs is not compiled, so adapters run at about half the speed."
    if compiler is None:
        return warning(
            "compiler", f"{says} There is no C++ compiler.", "Install one (on Debian: apt install g++), and run `make up` again."
        )
    return warning("compiler", says, "Run `make up` again; if it stays so, `pip install -v -e . --no-deps` shows why.")


def judge_redis(version: str, policy: str, *, is_persistent: bool) -> Finding:
    """Judge a Redis or Valkey server by its release, what it does when its memory is full, and whether it keeps its data."""
    major = int(version.split(".", maxsplit=1)[0]) if version[:1].isdigit() else 0
    if major < 7:
        return wrong("queue", f"The queue's server is release {version}, without functions.", "Use Redis 7 or Valkey 7.2, or a newer one.")
    if policy != "noeviction":
        return wrong(
            "queue",
            f"The queue's server removes keys when its memory is full (maxmemory-policy {policy}).",
            "Set maxmemory-policy to noeviction, since all its data is needed.",
        )
    if not is_persistent:
        return warning(
            "queue",
            f"The queue's server (release {version}) does not write to a disk. Usage that is not in the ledger yet is lost when it ends.",
            "Set appendonly to yes.",
        )
    return ok("queue", f"The queue's server answers (release {version}).")
