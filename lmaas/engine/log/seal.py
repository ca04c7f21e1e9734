"""The seal of an engine's log: a file that exists from the time at which the engine serves tenants.

The supervisor writes the file, and the engine's processes check for it. It contains a random mark. From then on, every line of a log record
starts with that mark. Lines without it come from libraries, whose output may contain tenants' text.
"""

import secrets
from pathlib import Path

#: The environment variable of an engine with the path of its seal file. Without it, logs stay as vLLM writes them.
VARIABLE = "LMAAS_LOG_SEAL"
#: The longest record, in characters. With the marks of its lines it stays below 4,096 bytes, which a pipe writes atomically.
RECORD_CHARACTERS = 2000


def make_mark() -> str:
    """Return a new mark. Its control character keeps it from resembling a word of a log."""
    return f"\x02{secrets.token_hex(8)} "


def write_seal(path: Path, mark: str) -> None:
    """Create the seal file atomically, so that no process reads an incomplete mark. Raises OSError."""
    draft = path.with_name(path.name + ".new")
    draft.write_text(mark)
    draft.replace(path)


def read_seal(path: str) -> str | None:
    """Return the mark, or None if the log is not sealed."""
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return None
