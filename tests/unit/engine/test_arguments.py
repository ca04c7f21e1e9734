"""The arguments of its engine's command line that a base model may set."""

import pytest

from lmaas.engine.arguments import refusal


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
        # Addresses, and arguments that lmaas sets itself.
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
