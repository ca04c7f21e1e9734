"""Loads what the zygote keeps in memory: vLLM's modules, the plugins of lmaas, and what engines would otherwise compute at each start.

Everything here runs before the fork, in one thread, without an OpenMP region and without CUDA. `Preloaded.unfit` reports violations. The
replacements inside vLLM are those that a fork needs. They use the names and places of vLLM 0.32.0; where one is missing, nothing is
replaced.
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

#: The modules that a server, its engine core and its worker import. The first ones are slow parts of the server's imports, listed
#: separately so that progress is reported in more stages.
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
    "vllm.model_executor.models.bert",
    "vllm.entrypoints.pooling.pooling.api_router",
    "vllm.entrypoints.pooling.embed.api_router",
    "vllm.entrypoints.pooling.scoring.api_router",
    "vllm.lora.model_manager",
    "vllm.lora.worker_manager",
    "vllm.v1.structured_output.backend_xgrammar",
    "vllm.renderers.online_renderer",
    "xgrammar",
    "lmaas.engine.cpu_lora.hooks",
)
#: The modules that are also imported on a CPU.
CPU_MODULES = ("vllm.v1.worker.cpu_worker", "lmaas.engine.cpu_lora.wrapper")
#: The modules that a checker of grammars and a supervisor import.
OTHERS = ("lmaas.engine.grammars.checker", "lmaas.cli", "lmaas.app")
#: A file beside the one with the prepared command lines. It lists those whose preparation leaves a thread or CUDA behind. Their engines are
#: forked without preparation.
AVOIDED = "commands-avoided.json"


class Preloaded:
    """Imports everything that engines, checkers and supervisors need. A module that cannot be imported is skipped, and imported later by
    the process that needs it.

    `commands` is the file with the command lines of engines to prepare for: those of forked engines, and those that other processes expect.
    `report` is called with the number of finished stages and the number of all stages.
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
            # vLLM spawns regardless of this once CUDA is initialised in the process that would fork.
            os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "fork")
        _inspect_in_process()
        self._reuse_renderers()

    def _prepare_all(self) -> None:
        for command in read_commands(self._commands):
            if not self._try(command):
                return  # this process cannot be forked any more; the next zygote skips this command line

    def _import(self, module: str) -> None:
        try:
            importlib.import_module(module)
        except ImportError as error:
            log.warning("not preloaded: %s (%r)", module, error)

    def unfit(self) -> str:
        """Return the reason why this process must not be forked, or an empty string if it may be."""
        import torch  # noqa: PLC0415 (imported by vLLM)

        threads = len(os.listdir("/proc/self/task"))
        if threads > 1:
            return f"it has {threads} threads, of which a fork would keep one"
        if torch.cuda.is_initialized():
            return "CUDA is initialised, which does not survive a fork"
        return ""

    def learn(self, arguments: list[str]) -> None:
        """Prepare for further engines with the arguments of one that was forked, also after a restart of the zygote. Raises OSError if the
        arguments cannot be stored."""
        key = command_key(arguments)
        if self._try(key):
            remember(self._commands, key)

    def _try(self, command: list[str]) -> bool:
        """Prepare for a command line, unless its preparation is listed as harmful. Return False if this process must not be forked
        afterwards; a harmful command line is then added to the list."""
        if command in read_commands(self._avoided):
            return True
        if self.unfit():
            return False  # the reason lies elsewhere
        self._prepare(command)
        reason = self.unfit()
        if reason:
            log.error("no zygote is prepared for %s any more: %s", " ".join(command), reason)
            remember(self._avoided, command)
        return not reason

    def _prepare(self, command: list[str]) -> None:
        """Load the model's configuration and tokenizer as the server does. An error here also occurs in the server, which reports it."""
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
        """Make servers use the tokenizer that was prepared for their command line, if the model's files have not changed."""
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
    """Return the names, times and sizes of the model's small files, which contain its configuration and tokenizer. None if the model is not
    a local folder."""
    with contextlib.suppress(ValueError, OSError):
        folder = Path(command[command.index("--model") + 1])
        if folder.is_dir():
            small = [path for path in sorted(folder.iterdir()) if path.suffix != ".safetensors"]
            return [(path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in small]
    return None


def _renderer(command: list[str]) -> Any:
    """Return the renderer that a server with this command line would create. It is used once. None for models that accept more than
    text."""
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


def _inspect_in_process() -> None:
    """Make vLLM inspect a model's class in this process if its module is imported already. Otherwise it starts a process that imports all
    of vLLM, once for each class on a machine."""
    from vllm.model_executor.models import registry  # noqa: PLC0415 (imported above)

    lazy, information = getattr(registry, "_LazyRegisteredModel", None), getattr(registry, "_ModelInfo", None)
    if lazy is None or information is None:
        return
    original = lazy.inspect_model_cls

    @functools.wraps(original)
    def inspect_model_cls(model: Any) -> Any:
        if model.module_name not in sys.modules:
            return original(model)
        return information.from_model_cls(model.load_model_cls())

    lazy.inspect_model_cls = inspect_model_cls


def _fork_on_cpu(platform: Any) -> None:
    """Make vLLM's CPU platform fork its processes. It spawns them by default, because libgomp reads its OpenMP settings when it is loaded.
    In a forked worker, `bind_threads` applies these settings."""
    from vllm.v1.executor.multiproc_executor import WorkerProc  # noqa: PLC0415 (imported above)

    configure = platform.check_and_update_config

    def check_and_update_config(_cls: type, config: Any) -> None:
        configure(config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    platform.check_and_update_config = classmethod(check_and_update_config)
    # This searches every name of every module, which takes a third of a second. Once is enough.
    platform.register_triton_kernel_overrides()
    platform.register_triton_kernel_overrides = classmethod(lambda _cls: None)
    worker_main: Callable[..., None] = WorkerProc.worker_main

    def bound_worker_main(*args: Any, **kwargs: Any) -> None:
        bind_threads(os.environ.get("OMP_NUM_THREADS"), os.environ.get("GOMP_CPU_AFFINITY"))
        worker_main(*args, **kwargs)

    WorkerProc.worker_main = staticmethod(bound_worker_main)


def bind_threads(number: str | None, processors: str | None) -> None:
    """Do what libgomp does when it is loaded with OMP_NUM_THREADS and GOMP_CPU_AFFINITY (a list of numbers): create `number` threads, one
    on each of these processors. Must be called before the first OpenMP region of a process."""
    import torch  # noqa: PLC0415 (only inside an engine)

    threads = int(number) if number else len(os.sched_getaffinity(0))
    order = [int(processor) for processor in processors.split()] if processors else []
    if order:
        os.sched_setaffinity(0, {order[0]})
    torch.set_num_threads(threads)  # may start a thread of torch, which then keeps the affinity of this one
    if threads < 2 or not order:
        return
    before = set(os.listdir("/proc/self/task"))
    torch.ones(1 << 22).mul_(2.0)  # starts the threads of torch's thread pool
    for place, thread in enumerate(sorted(set(os.listdir("/proc/self/task")) - before, key=int), start=1):
        os.sched_setaffinity(int(thread), {order[place % len(order)]})
