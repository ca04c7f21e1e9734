"""The first request to a service that has just started."""

import re
from pathlib import Path

from tests.system.e2e.conftest import MODEL, started


def test_the_first_request_waits_for_the_one_import_there_is(tmp_path: Path, model_folder: Path) -> None:
    assert model_folder.exists()
    body = {"model": MODEL, "stream": True, "max_tokens": 1, "messages": [{"role": "user", "content": "Hi"}]}
    with started(tmp_path / "home", tmp_path / "up.log") as stack:
        with stack.http(stack.key("acme")) as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200
            lines = [line for line in response.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        comments = [line for line in lines if line.startswith(":")]
        assert all(
            re.fullmatch(r": queued position=1 estimated_wait_s=\d+( late_s=\d+)?( start=\w+)? cold_start=yes", line) for line in comments
        )
        (replica,) = stack.replicas()
        assert replica["start"]["by"] == "zygote"
        assert 0 <= replica["start"]["zygote_ms"] < replica["start"]["total_ms"]
