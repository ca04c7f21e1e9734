"""The gateway, the controller, the job runner and the console of a stack, as child processes."""

import asyncio
import os
import subprocess
import sys
import time
from contextlib import suppress

import httpx

from lmaas.config import Settings
from lmaas.errors import SettingsError
from lmaas.process import bound_command

#: The time after which a controller or a job runner counts as started. One that cannot start ends earlier.
SETTLED_S = 3.0


class Child:
    """A process of this stack, such as `lmaas gateway`. It ends with this process, however this one ends."""

    def __init__(self, name: str, settings: Settings, title: str = "") -> None:
        self.name, self.title = name, title or f"The {name}"
        self.process: subprocess.Popen[bytes] | None = None
        self._environment = os.environ | settings.environment()
        self._launched = 0.0
        self._log = settings.home / "logs" / f"{name}.log"
        self._root = settings.base_url.removesuffix("/v1") if name == "gateway" else None

    def launch(self) -> None:
        """Start the process. Ctrl-C in a terminal does not reach it; `stop` ends it. Raises SettingsError."""
        self._launched = time.monotonic()
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("ab") as log:
                self.process = subprocess.Popen(
                    bound_command([sys.executable, "-m", "lmaas", self.name]),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    env=self._environment,
                )
        except OSError as error:
            raise SettingsError(f"{self.title} cannot be started: {error}.") from error

    def answers(self) -> bool:
        """Return whether the gateway takes requests, or another process has run for SETTLED_S seconds."""
        if self.process is None or self.process.poll() is not None:
            return False
        if self._root is None:
            return time.monotonic() - self._launched > SETTLED_S
        try:
            return httpx.get(f"{self._root}/healthz", timeout=2, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def failure(self) -> str:
        """Return the last line of the process's log and the path of the log."""
        return f"{self.last_words(1).rstrip('.') or 'it has not written why'}. Its log is {self._log}."

    def last_words(self, lines: int = 8) -> str:
        """Return the end of the process's log."""
        try:
            return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])
        except OSError as error:
            return f"{self._log} cannot be read: {error.strerror}"

    async def stop(self, grace_s: float, hurry: asyncio.Event) -> None:
        """Send SIGTERM to the process, and kill it after `grace_s` seconds or once `hurry` is set."""
        if self.process is None:
            return
        with suppress(ProcessLookupError):
            self.process.terminate()
        deadline = asyncio.get_running_loop().time() + grace_s
        while self.process.poll() is None:
            if hurry.is_set() or asyncio.get_running_loop().time() > deadline:
                with suppress(ProcessLookupError):
                    self.process.kill()
            await asyncio.sleep(0.05)
