"""What a base model may set of its engine's command line."""

import json
import subprocess
import sys

import pytest

from lmaas.engine.arguments import SWITCHES, VALUED, refusal
from lmaas.engine.launch import has_engine


@pytest.mark.parametrize(
    "text",
    [
        "",
        "--enforce-eager",
        "--no-enable-prefix-caching --gpu-memory-utilization 0.85",
        "--gpu_memory_utilization=0.85 --tensor-parallel-size=2 --kv-cache-dtype fp8_e4m3",
        "--tool-call-parser llama3_json",
        "--fake-token-ms 20",
    ],
)
def test_what_may_be_set(text: str) -> None:
    assert refusal(text) is None


@pytest.mark.parametrize(
    "text",
    [
        # Code.
        *("--tool-parser-plugin /tmp/x.py", "--reasoning-parser-plugin=/tmp/x.py", "--logits-processors a:B", "--worker-cls a.B"),
        *("--worker-extension-cls a.B", "--scheduler-cls a.B", "--distributed-executor-backend a.B", "--kv-transfer-config {}"),
        *("--trust-remote-code", "--trust_remote_code", "--trust-rem", "--middleware a.b", "--io-processor-plugin x", "--model-impl x"),
        *("--compilation-config {}", "-cc.backend=a.B", "--additional-config {}", "--load-format x", "--spec-model x"),
        # Prompts in logs, or elsewhere.
        *("--enable-log-requests", "--enable-log-outputs", "--otlp-traces-endpoint x", "--max-log-len 5", "--kv-events-config {}"),
        # Other weights and templates.
        *("--tokenizer x", "--revision x", "--hf-overrides {}", "--hf-overrides.a 1", "--chat-template x", "--lora-modules a=b"),
        # Where it listens, and what we say ourselves.
        *("--grpc", "--api-server-count 2", "--host=0.0.0.0", "--port 1", "--no-enable-lora", "--model x", "--uds x", "--headless"),
        # Other spellings.
        *("--enforce-eag", "--gpu-mem 0.5", "-tp 2", "-O3", "-q x", "--attention-config.backend x", "--enforce-eager.x 1", "--", "-"),
        *("--no-no-enforce-eager", "--no-seed 1", "--enforce-eager=1", "--ENFORCE-EAGER", "-enforce-eager", "enforce-eager"),
        # Values.
        *("--seed", "--seed --host", "--seed=--host", "--seed 1 2", "--quantization /etc/passwd", "--quantization '{}'", "--seed ''"),
        *("--seed=", "'", "--fake-truth /tmp/x", "--seed 1\u00a0--host"),
    ],
)
def test_what_may_not(text: str) -> None:
    assert refusal(text)


@pytest.mark.skipif(not has_engine(), reason="vLLM is not installed")
def test_vllm_knows_them_as_we_do() -> None:
    code = (
        "import json; from vllm.utils.argparse_utils import FlexibleArgumentParser;"
        "from vllm.entrypoints.launchers.cli_args import make_arg_parser;"
        "parser = make_arg_parser(FlexibleArgumentParser());"
        "print('\\n' + json.dumps({name: action.nargs for action in parser._actions for name in action.option_strings}))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True)
    known = json.loads(done.stdout.splitlines()[-1])
    assert {f"--{name}": known.get(f"--{name}", "unknown") for name in VALUED} == {f"--{name}": None for name in VALUED}
    for name in SWITCHES:
        assert (known.get(f"--{name}"), known.get(f"--no-{name}")) == (0, 0), name
