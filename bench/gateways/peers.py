"""Proxies of other projects, each installed into its own environment from pinned versions."""

import asyncio
import hashlib
import shutil
import sys
from pathlib import Path

import yaml

from bench.frame import Say
from bench.gateways.processes import Proxy, free_port, running
from bench.gateways.service import Service

PINS = Path(__file__).parent / "peers"
_KEY = "sk-bench"


async def installed(name: str, cache: Path, say: Say) -> Path:
    """Return the folder of the peer's commands, and install the peer if that has not been done. Raises RuntimeError if it cannot be
    installed."""
    pins = PINS / f"{name}.txt"
    folder = cache / f"{name}-{hashlib.sha256(pins.read_bytes() + sys.version.encode()).hexdigest()[:12]}"
    if not (folder / "complete").exists():
        say(f"installing {name} into {folder}")
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        await _run(sys.executable, "-m", "venv", str(folder))
        pip = (str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--quiet")
        await _run(*pip, "install", "--no-deps", "-r", str(pins))
        (folder / "complete").touch()
    return folder / "bin"


async def _run(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
    output, _ = await process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command[:5])} … failed: {output.decode(errors='replace').strip()[-500:]}")


async def litellm(ours: Service, binaries: Path, folder: Path) -> Proxy:
    """Start LiteLLM's proxy with one worker, one key, no database, and no output per request."""
    port = free_port()
    model = {"model": f"openai/{ours.model.name}", "api_base": f"{ours.engine_url}/v1", "api_key": "none"}
    config = {"model_list": [{"model_name": ours.model.name, "litellm_params": model}], "general_settings": {"master_key": _KEY}}
    path = folder / "litellm.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [str(binaries / "litellm"), "--config", str(path), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    # Use the prices in its package, not those on the network.
    variables = {"LITELLM_MODE": "PRODUCTION", "LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    process = await ours.exits.enter_async_context(running(command, folder / "litellm.log", variables))
    return Proxy(process, f"http://127.0.0.1:{port}/v1/chat/completions", ours.model.name, {"authorization": f"Bearer {_KEY}"})


async def vllm_router(ours: Service, binaries: Path, folder: Path) -> Proxy:
    """Start vLLM's router in front of one engine."""
    port = free_port()
    command = [str(binaries / "vllm-router"), "--worker-urls", ours.engine_url, "--policy", "round_robin", "--log-level", "error"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())]
    process = await ours.exits.enter_async_context(running(command, folder / "vllm-router.log"))
    return Proxy(process, f"http://127.0.0.1:{port}/v1/chat/completions", ours.model.name)
