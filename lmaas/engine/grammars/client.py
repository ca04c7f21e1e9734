"""Checks grammars and reads prompts on this machine, with one checker process for each base model, started on demand."""

import asyncio
import contextlib
import hashlib
import importlib
import logging
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from lmaas.engine.activity import Standstill, activity_of, family_of
from lmaas.engine.grammars.prompts import TOO_LONG
from lmaas.engine.grammars.verdict import INVALID, MAX_QUESTION_BYTES, TOO_COMPLEX, Prompt, Question, Tokens, Verdict, decode_told, encode
from lmaas.engine.launch import VLLM, EngineSpec, command_line, environment, shared_environment
from lmaas.engine.zygote import client as zygote
from lmaas.engine.zygote import wire
from lmaas.engine.zygote.client import ForkedProcess, NoZygote, Order
from lmaas.engine.zygote.progress import plain_imports
from lmaas.process import bound_command
from lmaas.states import PoolKind

log = logging.getLogger(__name__)

MODULE = "lmaas.engine.grammars.checker"
#: The time after which an idle checker ends.
IDLE_S = 300.0
#: The time that a check waits for a checker that is starting, and for its verdict. Several checks may be queued before it.
START_S, ANSWER_S = 90.0, 60.0
#: A checker that makes no progress for this long during its start has stalled. One that makes progress continues to start even if no check
#: waits for it.
STILL_S, LOOK_S = 15.0, 1.0
POLL_S = 0.02


def key_of_arguments(arguments: list[str]) -> str:
    """Return the key of the checker for engines with these arguments."""
    return hashlib.sha256(msgspec.json.encode(arguments)).hexdigest()[:16]


class NoVerdict(Exception):
    """The grammar could not be checked, or the prompt not be read, for the reason given."""


class Checkers:
    """The checkers of one machine for one process. `root` contains a folder with sockets and logs for each such process. With a `home`, its
    zygote forks the checkers if it can. `module` is the program of a checker's process."""

    def __init__(self, root: Path, home: Path | None, *, module: str = MODULE) -> None:
        self._root, self._folder, self._home, self._module = root, root / str(os.getpid()), home, module
        self._processes: dict[str, asyncio.subprocess.Process | ForkedProcess] = {}
        self._starting: dict[str, asyncio.Lock] = {}
        #: The checkers that do not listen yet, by process id.
        self._standstills: dict[int, Standstill] = {}
        #: The time of each checker's last verdict, by time.monotonic().
        self._answered: dict[str, float] = {}

    @asynccontextmanager
    async def kept(self) -> AsyncIterator["Checkers"]:
        """Run the block. The checkers' processes end with it, or when this process dies."""
        await asyncio.to_thread(self._sweep)
        try:
            yield self
        finally:
            for process in self._processes.values():
                if process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
                    await process.wait()
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove the folders of processes that were killed."""
        if self._root.is_dir():
            for folder in self._root.iterdir():
                if not Path("/proc", folder.name).exists() or folder == self._folder:
                    shutil.rmtree(folder, ignore_errors=True)

    async def check(self, spec: EngineSpec, question: Question) -> Verdict:
        """Return the verdict on a request to an engine like `spec`. Raises NoVerdict."""
        if spec.module != VLLM:
            return Verdict()  # an engine without a grammar library
        told = await self._ask(spec, question)
        if isinstance(told, Tokens):
            raise NoVerdict("the checker has not sent a verdict")
        return told

    async def tokens(self, spec: EngineSpec, prompt: Prompt) -> Tokens:
        """Return the tokens of a prompt for an engine like `spec`. Raises NoVerdict."""
        if spec.module != VLLM:
            # Another engine brings its own function.
            read: Callable[[Prompt, PoolKind], Tokens] = importlib.import_module(spec.module).read_prompt
            return read(prompt, spec.kind)
        if len(encode(prompt)) > MAX_QUESTION_BYTES:
            return Tokens(TOO_COMPLEX, TOO_LONG)
        told = await self._ask(spec, prompt)
        if isinstance(told, Tokens):
            return told
        # The process that read the prompt has died. A verdict without a code of the prompt's own does not judge the prompt.
        if told.code == TOO_COMPLEX:
            return Tokens(TOO_COMPLEX, TOO_LONG, cpu_s=told.cpu_s)
        if told.code == INVALID:
            return Tokens(INVALID, "The engine cannot read this prompt.", cpu_s=told.cpu_s)
        raise NoVerdict(told.message)

    async def _ask(self, spec: EngineSpec, asked: Question | Prompt) -> Verdict | Tokens:
        arguments = command_line(spec, 0)[3:]
        key = key_of_arguments(arguments)
        try:
            try:
                told = await self._exchange(key, arguments, spec, asked)
            except (ConnectionError, msgspec.DecodeError):
                # The checker has just ended, perhaps with this question in its queue. Try the next one.
                told = await self._exchange(key, arguments, spec, asked)
        except (OSError, msgspec.DecodeError) as error:
            if isinstance(error, TimeoutError):
                self._give_up_on(key)
            raise NoVerdict(repr(error)) from error
        self._answered[key] = time.monotonic()
        return told

    async def _exchange(self, key: str, arguments: list[str], spec: EngineSpec, asked: Question | Prompt) -> Verdict | Tokens:
        async with asyncio.timeout(START_S):
            reader, writer = await self._connected(key, arguments, spec)
        try:
            writer.write(encode(asked))
            writer.write_eof()
            async with asyncio.timeout(ANSWER_S):
                told: Verdict | Tokens = decode_told(await reader.read())
                return told
        finally:
            writer.close()

    def _give_up_on(self, key: str) -> None:
        """Kill a checker that listens but has sent no verdict for as long as one may take. The next check starts another one."""
        process = self._processes.get(key)
        if process is None or process.returncode is not None or process.pid in self._standstills:
            return
        if time.monotonic() - self._answered.get(key, 0.0) > ANSWER_S:
            log.error("a grammar checker stands still and is killed", extra={"action": "grammar", "detail": f"pid {process.pid}"})
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    async def _connected(self, key: str, arguments: list[str], spec: EngineSpec) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        with contextlib.suppress(OSError):
            return await self._connect(key)
        async with self._starting.setdefault(key, asyncio.Lock()):
            while True:
                with contextlib.suppress(OSError):
                    return await self._connect(key)
                process = self._processes.get(key)
                if process is None or process.returncode is not None:
                    process = self._processes[key] = await self._start(key, arguments, spec)
                    self._standstills[process.pid] = Standstill()
                if process.pid in self._standstills:
                    await self._listening(key)
                else:
                    # The checker is ending because it was idle. A refused connection does not yield to the event loop, so this must.
                    await asyncio.sleep(POLL_S)

    async def _connect(self, key: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        with wire.short_path(self._socket(key)) as path:
            return await asyncio.open_unix_connection(path)

    def _socket(self, key: str) -> Path:
        return self._folder / f"{key}.sock"

    async def _listening(self, key: str) -> None:
        """Wait until the checker listens. Raises NoVerdict if it ends or stalls before that."""
        process, path, looked = self._processes[key], self._socket(key), float("-inf")
        standstill = self._standstills[process.pid]
        while not path.exists():
            if process.returncode is not None:
                del self._standstills[process.pid]
                raise NoVerdict(f"the checker ended with code {process.returncode}; see {path.with_suffix('.log')}")
            if time.monotonic() - looked > LOOK_S:
                looked = time.monotonic()
                standstill.look("", activity_of(family_of(process.pid)), looked)
            if standstill.still_s > STILL_S:
                del self._standstills[process.pid]
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
                raise NoVerdict(f"the checker stood still for {standstill.still_s:.0f} s while it started, and is killed")
            await asyncio.sleep(POLL_S)
        del self._standstills[process.pid]

    async def _start(self, key: str, arguments: list[str], spec: EngineSpec) -> asyncio.subprocess.Process | ForkedProcess:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._socket(key)
        path.unlink(missing_ok=True)
        given = [str(path), str(IDLE_S), *arguments]
        output = path.with_suffix(".log")
        output.write_bytes(b"")  # remove the log of the previous checker
        if self._home is not None:
            order = Order(self._module, given, environment(spec), output, kept=True)
            try:
                return ForkedProcess(await zygote.fork_when_there(self._home, order, wire.facts(shared_environment())))
            except (NoZygote, ProcessLookupError) as error:
                log.info("the grammar checker is started plainly", extra={"action": "start", "detail": str(error)})
            # Requests wait for an engine first, so the engine imports alone.
            while plain_imports(self._home):  # noqa: ASYNC110 (another process's doing, seen in files)
                await asyncio.sleep(POLL_S)
        with output.open("ab") as stream:
            return await asyncio.create_subprocess_exec(
                *bound_command([sys.executable, "-m", self._module, *given]),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env=environment(spec) | zygote.ONE_THREAD,
            )
