"""Records of vLLM's and uvicorn's own loggers contain nothing of a request."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from lmaas.engine.log.seal import VARIABLE, write_seal

SECRET = "SECRETTEXT"


MARK = "\x020123456789abcdef "


SCRIPT = """
import logging, logging.config, sys
from lmaas.engine.hooks import records
records.install()
import vllm.logger
vllm.logger._configure_vllm_root_logger()
from uvicorn.config import LOGGING_CONFIG
logging.config.dictConfig(LOGGING_CONFIG)
secret = sys.argv[1]
vllm.logger.init_logger("vllm.a").error("vllm %s", secret)
vllm.logger.init_logger("vllm.a").warning_once("once %d", 5)
try:
    int(secret)
except ValueError:
    logging.getLogger("uvicorn.error").error("uvicorn\\n", exc_info=True)
    vllm.logger.init_logger("vllm.a").exception("vllm failed: %s", secret)
logging.getLogger("another.library").warning("library " + secret)
vllm.logger.init_logger("vllm.v1.metrics.loggers").info("Avg " + "throughput: %s", "1.0")
"""


def test_vllms_uvicorns_and_other_loggers_are_covered_also_when_they_are_configured_later(tmp_path: Path) -> None:
    write_seal(tmp_path / "sealed", MARK)
    variables: dict[str, Any] = os.environ | {VARIABLE: str(tmp_path / "sealed")}
    done = subprocess.run([sys.executable, "-c", SCRIPT, SECRET], env=variables, capture_output=True, text=True, check=True)
    output = done.stdout + done.stderr
    assert SECRET not in output
    lines = [line.removeprefix(MARK) for line in output.splitlines() if line.startswith(MARK)]
    text = "\n".join(lines)
    assert ") ERROR " in text
    assert "vllm <10 characters>" in text
    assert "once 5" in text
    assert "Avg throughput: 1.0" in text
    assert "ERROR:    uvicorn" in text
    assert text.count("ValueError: (text left out)") == 2
    assert "(computed message of 18 characters left out)" in text
