"""vLLM's own `run-batch`, with an engine that keeps running: `python -m bench.offline OPTIONS` prints `ready`, and then runs the file
named in each line of its input and prints the seconds that it took. `OPTIONS` are those of the engine."""

import asyncio
import sys
import time
from argparse import Namespace
from pathlib import Path

from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
from vllm.entrypoints.launchers.run_batch import make_arg_parser, run_batch
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser


async def main() -> None:
    """Run batches until the input ends."""
    args: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args(["-i", "none", "-o", "none", *sys.argv[1:]])
    async with build_async_engine_client(args, usage_context=UsageContext.OPENAI_BATCH_RUNNER) as engine:
        say("ready")
        while line := (await asyncio.to_thread(sys.stdin.readline)).strip():
            args.input_file, args.output_file = line, f"{line}.out"
            began = time.perf_counter()
            await run_batch(engine, args)
            say(f"{time.perf_counter() - began} {answers(Path(args.output_file))}")


def answers(output: Path) -> int:
    """Return the number of lines that have an answer."""
    return output.read_text().count('"completion_tokens":')


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"offline: {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main())
