"""Loads what the zygote has in memory: vLLM's modules, the plugins of lmaas, and what engines would compute at each start.

Everything here runs before the fork, in one thread, without an OpenMP region and without CUDA: `Preloaded.unfit` reports violations.
What is replaced in vLLM is what a fork needs; names and places are those of vLLM 0.32.0, and where one is missing, nothing is replaced.
"""

import contextlib
import functools
import importlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmaas.engine import hooks, marks
from lmaas.engine.zygote.commands import SERVER, command_key, read_commands, remember

log = logging.getLogger(__name__)

#: What a server, its engine core and its worker import. The first of them are parts of the server's imports that take long, so that there
#: are more stages to report.
MODULES = (
    "vllm.env_override",
    "vllm.config",
    "vllm.engine.arg_utils",
    SERVER,
    "vllm.entrypoints.launchers.app",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.entrypoints.launchers.api_server.app_state",
    "vllm.entrypoints.launchers.api_server.routers",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.worker_base",
    "vllm.v1.worker.gpu_worker",
    "vllm.model_executor.models.llama",
    "vllm.lora.model_manager",
    "vllm.lora.worker_manager",
    "vllm.v1.structured_output.backend_xgrammar",
    "vllm.renderers.online_renderer",
    "xgrammar",
    "lmaas.engine.cpu_lora.hooks",
)
#: On a CPU besides.
CPU_MODULES = ("vllm.v1.worker.cpu_worker", "lmaas.engine.cpu_lora.wrapper")
#: What a checker of grammars and a supervisor import.
OTHERS = ("lmaas.engine.grammars.checker", "lmaas.cli", "lmaas.app")
#: Beside the file with the command lines to prepare for: those that leave a thread or CUDA behind. Their engines are forked all the same.
AVOIDED = "commands-avoided.json"


class Preloaded:
    """Imports everything that engines, checkers and supervisors need; a module that is missing is imported later, where it is needed.

    `commands` is the file with the command lines of engines to prepare for: those that were forked, and those that others expect. `report`
    is called with the number of stages that are done, and of all.
    """

    def __init__(self, commands: Path, report: Callable[[int, int], None] = lambda _done, _stages: None) -> None:
        self._commands, self._avoided = commands, commands.with_name(AVOIDED)
        self._prepared: dict[tuple[str, ...], tuple[object, Any]] = {}
        stages: list[Callable[[], None]] = [functools.partial(self._import, module) for module in MODULES]
        stages += [self._adapt_vllm, self._prepare_all]
        stages += [functools.partial(self._import, module) for module in OTHERS]
        for done, stage in enumerate(stages):
            report(done, len(stages))
            stage()

    def _adapt_vllm(self) -> None:
        from vllm.platforms import current_platform  # noqa: PLC0415 (imported by now)
        from vllm.plugins import load_general_plugins  # noqa: PLC0415 (the same)

        cpu = bool(current_platform.is_cpu())
        for module in CPU_MODULES if cpu else ():
            self._import(module)
        load_general_plugins()
        marks.install()
        hooks.install()
        if cpu:
            _fork_on_cpu(type(current_platform))
        else:
            # vLLM itself spawns all the same once CUDA is initialised in the process that would fork.
            os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "fork")
        self._reuse_renderers()

    def _prepare_all(self) -> None:
        for command in read_commands(self._commands):
            if not self._try(command):
                return  # it cannot be forked any more; the next zygote leaves that command line out

    def _import(self, module: str) -> None:
        try:
            importlib.import_module(module)
        except ImportError as error:
            log.warning("not preloaded: %s (%r)", module, error)

    def unfit(self) -> str:
        """Why this process must not be forked; empty if it may be."""
        import torch  # noqa: PLC0415 (imported by vLLM)

        threads = len(os.listdir("/proc/self/task"))
        if threads > 1:
            return f"it has {threads} threads, of which a fork would keep one"
        if torch.cuda.is_initialized():
            return "CUDA is initialised, which does not survive a fork"
        return ""

    def learn(self, arguments: list[str]) -> None:
        """An engine was forked with these arguments: be prepared for the next, also after a restart. Raises OSError if that cannot be
        remembered."""
        key = command_key(arguments)
        if self._try(key):
            remember(self._commands, key)

    def _try(self, command: list[str]) -> bool:
        """Prepare for a command line, unless that is known to spoil a zygote. False if it did; then it is known from now on."""
        if command in read_commands(self._avoided):
            return True
        if self.unfit():
            return False  # for another reason
        self._prepare(command)
        reason = self.unfit()
        if reason:
            log.error("no zygote is prepared for %s any more: %s", " ".join(command), reason)
            remember(self._avoided, command)
        return not reason

    def _prepare(self, command: list[str]) -> None:
        """Load the model's configuration and tokenizer as the server would. What fails here fails there too, with a message."""
        key = tuple(command)
        stamp = _stamp(command)
        if stamp is None or self._prepared.get(key, (None, None))[0] == stamp:
            return
        before = dict(os.environ)
        argv = sys.argv
        try:
            sys.argv = [SERVER, *command]
            self._prepared[key] = (stamp, _renderer(command))
        except (Exception, SystemExit) as error:  # noqa: BLE001 (whatever a model's files make vLLM raise: a start would be slower, no more)
            log.warning("could not prepare for %s: %r", " ".join(command), error)
        finally:
            sys.argv = argv
            os.environ.clear()
            os.environ.update(before)

    def _reuse_renderers(self) -> None:
        """Have a server take the tokenizers that were prepared for its command line, if the files are still the same."""
        from vllm.v1.engine import async_llm  # noqa: PLC0415 (imported above)

        original = async_llm.renderer_from_config

        @functools.wraps(original)
        def renderer_from_config(config: Any, **kwargs: Any) -> Any:
            command = command_key(sys.argv[1:])
            stamp, renderer = self._prepared.get(tuple(command), (None, None))
            if renderer is None or kwargs or stamp != _stamp(command):
                return original(config, **kwargs)
            renderer.config, renderer.model_config = config, config.model_config
            return renderer

        async_llm.renderer_from_config = renderer_from_config


def _stamp(command: list[str]) -> object:
    """Of the model's small files, which say what its configuration and its tokenizer are. None if the model is no folder here."""
    with contextlib.suppress(ValueError, OSError):
        folder = Path(command[command.index("--model") + 1])
        if folder.is_dir():
            small = [path for path in sorted(folder.iterdir()) if path.suffix != ".safetensors"]
            return [(path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in small]
    return None


def _renderer(command: list[str]) -> Any:
    """The renderer that a server with this command line would make, used once. None for models with more than text."""
    from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: PLC0415 (imported by the server's module)
    from vllm.entrypoints.launchers.cli_args import make_arg_parser  # noqa: PLC0415
    from vllm.renderers import ChatParams  # noqa: PLC0415
    from vllm.usage.usage_lib import UsageContext  # noqa: PLC0415
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: PLC0415
    from vllm.v1.engine.async_llm import renderer_from_config  # noqa: PLC0415

    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(command)
    config = AsyncEngineArgs.from_cli_args(parsed).create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    if config.model_config.is_multimodal_model or config.model_config.skip_tokenizer_init:
        return None
    renderer = renderer_from_config(config)
    renderer.warmup(ChatParams(chat_template=None, chat_template_content_format="auto", chat_template_kwargs={}))
    return renderer


def _fork_on_cpu(platform: Any) -> None:
    """vLLM's CPU platform has its processes spawned, since what it sets for OpenMP is read when libgomp is loaded. Here they are forked,
    and what it sets is applied in the worker."""
    from vllm.v1.executor.multiproc_executor import WorkerProc  # noqa: PLC0415 (imported above)

    configure = platform.check_and_update_config

    def check_and_update_config(_cls: type, config: Any) -> None:
        configure(config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    platform.check_and_update_config = classmethod(check_and_update_config)
    # Looks through every name of every module, for a third of a second; once is enough.
    platform.register_triton_kernel_overrides()
    platform.register_triton_kernel_overrides = classmethod(lambda _cls: None)
    worker_main: Callable[..., None] = WorkerProc.worker_main

    def bound_worker_main(*args: Any, **kwargs: Any) -> None:
        bind_threads(os.environ.get("OMP_NUM_THREADS"), os.environ.get("GOMP_CPU_AFFINITY"))
        worker_main(*args, **kwargs)

    WorkerProc.worker_main = staticmethod(bound_worker_main)


def bind_threads(number: str | None, processors: str | None) -> None:
    """What libgomp does when it is loaded with OMP_NUM_THREADS and GOMP_CPU_AFFINITY (a list of numbers): so many threads, one on each of
    these processors. Called before the first OpenMP region of a process."""
    import torch  # noqa: PLC0415 (only inside an engine)

    threads = int(number) if number else len(os.sched_getaffinity(0))
    order = [int(processor) for processor in processors.split()] if processors else []
    if order:
        os.sched_setaffinity(0, {order[0]})
    torch.set_num_threads(threads)  # may begin a thread of torch's own, which stays with this one
    if threads < 2 or not order:
        return
    before = set(os.listdir("/proc/self/task"))
    torch.ones(1 << 22).mul_(2.0)  # the threads of torch's thread pool begin here
    for place, thread in enumerate(sorted(set(os.listdir("/proc/self/task")) - before, key=int), start=1):
        os.sched_setaffinity(int(thread), {order[place % len(order)]})
