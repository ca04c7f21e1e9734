"""Real vLLM engines forked by a zygote, and kills at every stage."""

import asyncio
import os
import pickle
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest

from lmaas.engine.client import EngineClient
from lmaas.engine.launch import EngineProcess, EngineSpec, launched
from lmaas.engine.zygote.client import ForkedProcess, NoZygote
from tests.support.conditions import until
from tests.system.engine.zygote.place import Place

ADAPTER = Path(__file__).parents[4] / "tenants" / "adapters" / "acme-json"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def engine_of(place: Place, spec: EngineSpec, log: Path) -> AsyncIterator[tuple[EngineProcess, EngineClient]]:
    async with EngineClient() as client, launched(spec, free_port(), log, place.home) as engine:
        assert engine.by == "zygote"

        async def ready() -> bool:
            assert engine.running, engine.last_words()
            return await client.healthy(engine.url)

        await until(ready, timeout_s=120)
        yield engine, client


def family(pid: int) -> list[psutil.Process]:
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def gone(processes: list[psutil.Process]) -> Callable[[], bool]:
    def all_gone() -> bool:
        return not [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]

    return all_gone


async def test_two_engines_of_one_zygote_serve_with_the_plugin_and_leave_nothing(place: Place, spec: EngineSpec, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMAAS_REDIS_URL", "redis://secret")
        async with engine_of(place, spec, tmp_path / "1.log") as (first, client), engine_of(place, spec, tmp_path / "2.log") as (second, _):
            families = family(first.pid) + family(second.pid)
            for number, engine in enumerate((first, second)):
                assert engine.keeps_adapters_apart()
                await client.load_adapter(engine.url, f"adapter-{number}", str(ADAPTER))
                for model in ("base", f"adapter-{number}"):
                    assert (await client.generate_token(engine.url, model, "one", 60)).completion_tokens == 1
                marks = engine.marks()
                assert engine.began - 1 < marks["loading"] < marks["loaded"] < marks["cached"]
            worker = next(one for one in families if "Worker" in " ".join(one.cmdline()))
            assert len(worker.cpu_affinity()) < len(os.sched_getaffinity(0)) or len(os.sched_getaffinity(0)) == 1
            for process in families:
                assert "redis://secret" not in process.environ().values()
            assert {os.getpgid(one.pid) for one in families} == {first.pid, second.pid}
        # After SIGTERM, vLLM's server may end with 0 or 1.
        assert not first.running
        assert not second.running
        await until(gone(families))


async def test_a_forked_engine_has_the_hooks(place: Place, spec: EngineSpec, tmp_path: Path) -> None:
    marker = "MaRkEr5e4c2f"
    schema = {"type": "string", "pattern": "^" * 400 + marker}
    log = tmp_path / "engine.log"
    async with engine_of(place, spec, log) as (engine, _), httpx.AsyncClient(base_url=engine.url, timeout=60) as http:
        engine.seal_log()
        before = len(log.read_text())
        body = {"model": "base", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        constrained = {"response_format": {"type": "json_schema", "json_schema": {"name": marker, "schema": schema}}}
        await http.post("/v1/chat/completions", json=body | constrained)
        assert (await http.post("/v1/chat/completions", json=body | {"messages": marker})).status_code == 400
        assert (await http.post("/v1/chat/completions", json=body | {"response_format": {"type": "json_object"}})).status_code == 200
        # The engine core has compiled a grammar.
        (core,) = [one for one in family(engine.pid) if "EngineCore" in " ".join(one.cmdline())]
        assert str(core.pid) in {path.name for path in (tmp_path / "engine.compiling").iterdir()}
        assert engine.stuck_grammar() == ""
        core.kill()
        await until(lambda: not engine.running)
        assert "EngineCore" in engine.last_words() or "EngineDead" in engine.last_words()
        assert marker not in log.read_text()
        assert len(log.read_text()) - before < 16384


@pytest.mark.parametrize("which", ["server", "core", "worker", "keeper"])
async def test_an_engine_that_loses_a_process_is_gone_whole(place: Place, spec: EngineSpec, tmp_path: Path, which: str) -> None:
    async with engine_of(place, spec, tmp_path / "engine.log") as (engine, _):
        server, *others = family(engine.pid)
        names = {"core": "EngineCore", "worker": "Worker"}
        if which in names:
            victim = next(one for one in others if names[which] in " ".join(one.cmdline()))
        else:
            victim = server if which == "server" else psutil.Process(server.ppid())
        assert which != "keeper" or "keeps engine" in " ".join(victim.cmdline())
        victim.kill()
        async with asyncio.timeout(60):
            code = await engine.exited()
        if which in ("server", "keeper"):
            assert code == -signal.SIGKILL
        await until(gone([server, *others, victim]))


async def test_an_engine_outlives_its_zygote_and_the_next_starts_plainly(place: Place, spec: EngineSpec, tmp_path: Path) -> None:
    async with engine_of(place, spec, tmp_path / "engine.log") as (engine, client):
        os.kill(place.pid, signal.SIGKILL)
        await until(lambda: place.pid == 0)
        assert (await client.generate_token(engine.url, "base", "one", 60)).completion_tokens == 1
        processes = family(engine.pid)
        async with launched(spec, free_port(), tmp_path / "plain.log", place.home) as plain:
            assert plain.by == "plain"
            assert plain.running
        await place.imported()  # its owner starts another
        os.kill(engine.pid, signal.SIGTERM)
        assert await engine.exited() == 0
    await until(gone(processes))


async def test_an_engine_ends_with_whoever_ordered_it(place: Place, spec: EngineSpec, tmp_path: Path) -> None:
    script = (
        "import asyncio, pickle, sys; from pathlib import Path; from lmaas.engine.launch import *\n"
        "async def main():\n"
        f"    async with launched(pickle.loads({pickle.dumps(spec)!r}), {free_port()}, Path({str(tmp_path / 'e.log')!r}), "
        f"Path({str(place.home)!r})) as engine:\n"
        "        print(engine.by, engine.pid, flush=True); await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    for stage in ("", "Starting to load model", "Application startup complete"):
        supervisor = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
        try:
            assert supervisor.stdout is not None
            by, pid = (await supervisor.stdout.readline()).split()
            assert by == b"zygote"
            log = tmp_path / "e.log"
            await until(lambda log=log, stage=stage: log.exists() and stage in log.read_text(), timeout_s=120)
            processes = family(int(pid))
        finally:
            supervisor.kill()
            await supervisor.wait()
        await until(gone(processes))
        log.unlink()


async def test_the_last_words_of_a_forked_engine_are_told(place: Place, spec: EngineSpec, tmp_path: Path) -> None:
    wrong = replace(spec, extra_args="--no-such-option")
    async with launched(wrong, free_port(), tmp_path / "engine.log", place.home) as engine:
        assert engine.by == "zygote"
        async with asyncio.timeout(60):
            assert await engine.exited() == 2
        assert "no-such-option" in engine.last_words()


async def test_what_is_not_kept_outlives_whoever_ordered_it_and_does_not_run_without_a_word(place: Place, tmp_path: Path) -> None:
    log = tmp_path / "cli.log"
    silent = await place.fork("lmaas.cli", ["--help"], log, kept=False)
    processes = family(silent.pid)
    silent.connection.close()
    await until(gone(processes))
    assert not log.exists()


async def test_a_zygote_with_another_environment_is_not_used(place: Place, spec: EngineSpec, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
        with pytest.raises(NoZygote, match="VLLM_LOGGING_LEVEL"):
            await place.fork("lmaas.cli", [], tmp_path / "log", kept=True)
        async with launched(spec, free_port(), tmp_path / "engine.log", place.home) as engine:
            assert engine.by == "plain"


async def test_a_forked_process_tells_how_it_ended(place: Place, tmp_path: Path) -> None:
    process = ForkedProcess(await place.fork("lmaas.cli", ["no-such-command"], tmp_path / "log", kept=True))
    assert await process.wait() == 2
    with pytest.raises(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
