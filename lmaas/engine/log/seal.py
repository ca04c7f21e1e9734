"""The seal of an engine's log: the file that marks the moment from which the engine serves tenants.

The supervisor writes it, and the engine's processes look for it. It holds a random mark. From then on each log record starts with that
mark on every line. Lines without it come from libraries that print what they like, tenants' text included.
"""

import secrets
from pathlib import Path

#: The environment variable of an engine that names its seal file. Where it is unset, logs stay as vLLM writes them.
VARIABLE = "LMAAS_LOG_SEAL"
#: The longest record, in characters. With the marks of its lines it stays below 4,096 bytes, which a pipe takes as a whole.
RECORD_CHARACTERS = 2000


def make_mark() -> str:
    """A new mark. The control character keeps it from looking like a word of a log."""
    return f"\x02{secrets.token_hex(8)} "


def write_seal(path: Path, mark: str) -> None:
    """Create the seal file at once, so that no process reads half of it. Raises OSError."""
    draft = path.with_name(path.name + ".new")
    draft.write_text(mark)
    draft.replace(path)


def read_seal(path: str) -> str | None:
    """The mark. None until the log is sealed."""
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return None
