"""Decides which lines of an engine's output are kept. Pure: bytes in, bytes out."""

import builtins
import re
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

#: The longest line that is kept, in bytes.
LINE_BYTES = 8192
#: A sealed log grows by at most BURST_BYTES at once and RATE_BYTES a second after that.
BURST_BYTES, RATE_BYTES = 64 * 1024, 1024
#: The number of lines over that limit that are kept in memory. They explain the reason if the engine ends then.
LAST_LINES = 40
#: The minimum time between two notes about omitted lines, in seconds.
NOTE_S = 10.0

#: Python prints its own exceptions by name, and those of a package with the package's name.
_BUILTIN = frozenset(name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, BaseException))
_PACKAGES = sys.stdlib_module_names | {
    *("anyio", "fastapi", "jinja2", "lmaas", "msgspec", "numpy", "openai", "peft", "pydantic", "pydantic_core", "safetensors"),
    *("starlette", "tokenizers", "torch", "transformers", "triton", "uvicorn", "uvloop", "vllm", "xgrammar", "zmq"),
}
#: The suffixes of exception names that are recognised, and the names that explain why an engine ended. Other names are not kept, because
#: they may contain any text.
_EXCEPTION_ENDS = ("Error", "Exception", "Warning", "Exit", "Interrupt")
_KNOWN = frozenset(
    {"OutOfMemoryError", "AcceleratorError", "EngineDeadError", "EngineGenerateError", "VLLMValidationError", "ValidationError"}
)
#: The beginnings of lines that Python, its fault handler, libstdc++ and libc print in a crash.
_FIXED = "|".join(
    re.escape(text)
    for text in (
        "Traceback (most recent call last):",
        *("Aborted", "Bus error", "Illegal instruction", "Killed", "Segmentation fault"),
        *("free(): ", "malloc(): ", "malloc_consolidate(): ", "munmap_chunk(): "),
        *("double free or corruption", "corrupted size vs. prev_size", "corrupted double-linked list", "*** stack smashing detected ***"),
        *("Exception in thread", "Exception ignored in"),
    )
)
_FATAL = "Segmentation fault|Aborted|Bus error|Floating-point exception|Illegal instruction|Cannot recover from stack overflow"
_CRASHES: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], str]], ...] = (
    # The name of a function may contain any text and is not kept. The path of an existing file is not a tenant's text.
    (re.compile(r'\s*File "([^"]{1,500})", line (\d{1,7})'), lambda m: f'  File "{m[1]}", line {m[2]}' if Path(m[1]).is_file() else ""),
    (re.compile(rf"Fatal Python error(: (?:{_FATAL}))?"), lambda m: m[0]),
    (re.compile(r"\*\*\* SIG[A-Z]{2,6} (?=\(@|received at)"), lambda m: f"{m[0]}***"),
    (
        re.compile(r"(?:Current thread|Thread) 0x[0-9a-f]{1,16} .{0,64}\(most recent call first\):"),
        lambda _: "Thread (most recent call first):",
    ),
    (re.compile(r"terminate called( after throwing an instance of '(?:\w{1,40}::)+\w{1,40}')?"), lambda m: m[0]),
    (re.compile(r"((?:[a-z_]\w{0,60}\.){0,8}\w{1,60})(?::|$)"), lambda m: _exception(m[1])),
    (re.compile(_FIXED), lambda m: m[0].strip()),
)


class Sieve:
    """Filters the output of an engine piece by piece and returns the part that belongs in the log.

    Before `seal`, every line is kept. Afterwards, log records, which carry the mark, are kept, and the output of a crash, reduced to words
    that are known in advance. Other lines are counted and left out, as are lines beyond the growth limit. `now` is a time in seconds.
    """

    def __init__(self) -> None:
        self._mark = b""
        self._partial = b""
        self._cut = 0
        self._allowance, self._seen = float(BURST_BYTES), 0.0
        self._late: deque[bytes] = deque(maxlen=LAST_LINES)
        self._lines = self._bytes = 0
        self._noted = float("-inf")

    @property
    def sealed(self) -> bool:
        """True if only records and crashes are kept."""
        return bool(self._mark)

    @property
    def owes_note(self) -> bool:
        """True if lines were left out since the last note."""
        return bool(self._lines)

    def seal(self, mark: str, now: float) -> None:
        """Keep only lines with this mark, and crashes, from now on."""
        self._mark, self._seen = mark.encode(), now

    def feed(self, data: bytes, now: float) -> bytes:
        """Return the text to keep after these bytes."""
        self._allowance = min(BURST_BYTES, self._allowance + (now - self._seen) * RATE_BYTES)
        self._seen = now
        *lines, rest = data.split(b"\n")
        kept = []
        for line in lines:
            self._append(line)
            kept.append(self._keep())
        self._append(rest)
        if now - self._noted >= NOTE_S:
            kept.append(self.note(now))
        return b"".join(kept)

    def note(self, now: float) -> bytes:
        """Return a line that counts the lines left out since the last note, or an empty string if there are none."""
        if not self._lines:
            return b""
        self._noted = now
        text = f"lmaas: {self._lines} lines ({self._bytes} bytes) of the engine's output were left out\n"
        self._lines = self._bytes = 0
        return text.encode()

    def end(self, now: float) -> bytes:
        """Return the text to keep when the engine has ended: an unfinished line, the count of omitted lines, and the last lines over the
        limit."""
        kept = self._keep() if self._partial else b""
        note = self.note(now)
        late = b"".join(self._late)
        self._late.clear()
        return kept + note + late

    def _append(self, part: bytes) -> None:
        line = self._partial + part
        surplus = len(line) - LINE_BYTES
        if surplus > 0:
            # The start of a line is most informative. A sealed log keeps the end instead, where a record may follow library output without
            # a line break.
            line = line[surplus:] if self._mark else line[:LINE_BYTES]
            self._cut += surplus
        self._partial = line

    def _keep(self) -> bytes:
        line, cut = self._partial, self._cut
        self._partial, self._cut = b"", 0
        if not self._mark:
            return line + (f" … {cut} bytes left out\n".encode() if cut else b"\n")
        _, found, record = line.rpartition(self._mark)
        passed = record.rstrip(b"\r") if found else crash_line(line.decode(errors="replace")).encode()
        if not passed:
            self._leave_out(len(line) + cut + 1)
            return b""
        passed += b"\n"
        if len(passed) > self._allowance:
            self._leave_out(len(line) + cut + 1)
            self._late.append(passed)
            return b""
        self._allowance -= len(passed)
        self._late.clear()
        return passed

    def _leave_out(self, size: int) -> None:
        self._lines += 1
        self._bytes += size


def crash_line(line: str) -> str:
    """Return the part to keep of a line without a mark: a crash in words that are known in advance. Empty for every other line."""
    matches = ((pattern.match(line), words) for pattern, words in _CRASHES)
    return next((words(match) for match, words in matches if match), "")


def _exception(name: str) -> str:
    """Return the part to keep of a line that begins with this name: one of Python's own exceptions, or a known exception of the engine's
    packages."""
    package, dot, rest = name.partition(".")
    if not dot:
        return f"{name} (text left out)" if name in _BUILTIN else ""
    if package not in _PACKAGES or not rest.endswith(_EXCEPTION_ENDS):
        return ""
    last = rest.rpartition(".")[2]
    return f"{package}.{last if last in _KNOWN else '…'} (text left out)"
