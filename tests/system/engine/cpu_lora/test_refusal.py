"""The real server does not start with LoRA where its responses could belong to another tenant."""

import subprocess
from pathlib import Path

import pytest

from lmaas.config import Settings
from lmaas.engine.launch import EngineSpec, command_line, environment, has_cpu_build
from tests.system.engine.cpu_lora.tiny import build_model

pytestmark = pytest.mark.skipif(not has_cpu_build(), reason="the plugin does nothing on GPUs")

#: Python runs this module at the start of each of the server's processes.
ANOTHER_VERSION = """
import importlib.util, sys

class Version:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return importlib.util.spec_from_loader(name, Version) if name == "vllm._version" else None

    @staticmethod
    def create_module(spec):
        return None

    @staticmethod
    def exec_module(module):
        module.__version__, module.__version_tuple__ = "0.99.0", (0, 99, 0)

sys.meta_path.insert(0, Version)
"""


def test_a_server_of_another_version_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(ANOTHER_VERSION)
    build_model(tmp_path / "model")
    spec = EngineSpec(
        module=Settings().engine_module, source=str(tmp_path / "model"), name="base", dtype="float32", max_model_len=64, max_num_seqs=4,
        max_loras=2, max_lora_rank=8, max_cpu_loras=4, kv_cache_bytes=64 * 1024 * 1024, extra_args="--skip-tokenizer-init",
    )  # fmt: skip
    variables, log = environment(spec) | {"PYTHONPATH": str(tmp_path)}, tmp_path / "log"
    with log.open("w") as output:
        # No port is needed: the server ends before it listens.
        server = subprocess.run(command_line(spec, 0), env=variables, stdout=output, stderr=output, timeout=300, check=False)
    assert server.returncode != 0
    assert "UnknownVllmError: LoRA on CPU is refused: lmaas corrects it in vLLM 0.32.0, this is 0.99.0" in log.read_text()
