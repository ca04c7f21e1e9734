"""A batch that runs as background load during a run."""

import json
import logging
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lmaas.api import table
from lmaas.errors import ApiError
from loadtest.population import Target
from loadtest.service import Service

log = logging.getLogger(__name__)
ENDPOINT = "/v1/chat/completions"
ANSWER_TOKENS = 64


@contextmanager
def background_batch(service: Service, target: Target, lines: int) -> Iterator[None]:
    """Create a batch of this many requests to a target, cancel it at the end of the block, and report how many have run."""
    client = service.client.with_key(target.key)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "load-test.jsonl"
        path.write_text("".join(_line(target.model, number) for number in range(lines)))
        file = client.upload_file(path, "batch")
    body = {"input_file_id": file["id"], "endpoint": ENDPOINT, "completion_window": "24h"}
    batch = client.send(table.CREATE_BATCH, body)
    try:
        yield
    finally:
        with suppress(ApiError):  # it has ended
            client.send(table.CANCEL_BATCH, batch=batch["id"])
        counts = client.send(table.GET_BATCH, batch=batch["id"])["request_counts"]
        log.info("Batch in the background: %d of %d lines completed, %d failed.", counts["completed"], lines, counts["failed"])
        client.close()


def _line(model: str, number: int) -> str:
    words = random.Random(number).choices(["river", "city", "winter", "answer", "seven", "bread", "light", "market", "engine"], k=40)
    body = {"model": model, "max_tokens": ANSWER_TOKENS, "messages": [{"role": "user", "content": " ".join(words)}]}
    return json.dumps({"custom_id": str(number), "method": "POST", "url": ENDPOINT, "body": body}) + "\n"
