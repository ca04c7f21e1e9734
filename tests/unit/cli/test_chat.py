"""`lmaas chat` with a server whose responses are fixed: from a pipe, with a message, and on a terminal."""

import json
import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from click.testing import CliRunner, Result

from lmaas.cli.commands import cli
from tests.unit.cli.test_conversation import DONE, HELLO, STOP, USAGE

ANSWER = "\n\n".join([": queued position=1 estimated_wait_s=6\n" + HELLO, STOP, USAGE, DONE, ""]).encode()


class Server(ThreadingHTTPServer):
    """A service whose model responds to every message with `Hello`. It never ends the response to `hang`, and refuses `refuse`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict[str, Any]] = []
        self.left = threading.Event()

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment of the command."""
        return {"LMAAS_URL": f"http://127.0.0.1:{self.server_port}/v1", "LMAAS_API_KEY": "sk-lmaas-x"}


class Handler(BaseHTTPRequestHandler):
    """The handler of one request."""

    server: Server

    def do_GET(self) -> None:
        """Report that the key is not an operator's."""
        self._answer(403, "application/json", b'{"error": {"message": "This needs an operator\'s key.", "code": "forbidden"}}')

    def do_POST(self) -> None:
        """Respond to a message."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append(body)
        last = body["messages"][-1]["content"]
        if last.startswith("refuse "):
            status = int(last.split()[1])
            self._answer(status, "application/json", b'{"error": {"message": "It is refused.", "code": "refused"}}')
        elif last == "hang":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f"{HELLO}\n\n".encode())
            self.connection.settimeout(30)
            try:
                gone = self.connection.recv(1) == b""
            except ConnectionError:
                gone = True
            if gone:
                self.server.left.set()
        else:
            self._answer(200, "text/event-stream", ANSWER)

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield running
        finally:
            running.shutdown()
            thread.join()


def run(server: Server, *arguments: str, text: str | bytes | None = None) -> Result:
    return CliRunner().invoke(cli, ["chat", "bot", *arguments], env=server.environment, input=text)


@pytest.mark.parametrize(
    ("arguments", "text", "sent"), [(["Hi"], None, "Hi"), ([], "A\nlong text\n", "A\nlong text\n"), (["Hi"], "not read", "Hi")]
)
def test_one_message_gets_one_answer(server: Server, arguments: list[str], text: str | None, sent: str) -> None:
    done = run(server, *arguments, text=text)
    assert (done.stdout, done.stderr, done.exit_code) == ("Hello\n", "", 0)
    assert [body["messages"] for body in server.bodies] == [[{"role": "user", "content": sent}]]


def test_json_has_the_answer_with_tokens_and_times(server: Server) -> None:
    found = json.loads(run(server, "Hi", "--json", "--max-tokens", "7", "--system", "Be brief.").output)
    assert (found["model"], found["answer"], found["finish_reason"]) == ("bot", "Hello", "stop")
    assert found["tokens"] == {"prompt": 9, "cached": 4, "completion": 2}
    assert 0 <= found["first_token_s"] <= found["total_s"]
    assert server.bodies[0]["max_tokens"] == 7
    assert [message["role"] for message in server.bodies[0]["messages"]] == ["system", "user"]


@pytest.mark.parametrize(("text", "says"), [("", "There is no message."), (" \n", "There is no message."), (b"\xff", "not UTF-8")])
def test_a_pipe_without_a_message_is_wrong_usage(server: Server, text: str | bytes, says: str) -> None:
    done = run(server, text=text)
    assert done.exit_code == 2
    assert says in done.output
    assert server.bodies == []


class Terminal:
    """A command on a terminal of 80 columns."""

    def __init__(self, environment: dict[str, str], *arguments: str) -> None:
        own = {name: value for name, value in os.environ.items() if not name.startswith("LMAAS_")}
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            # The terminal becomes that of a session, so that Ctrl-C is a signal.
            ["setsid", "--ctty", sys.executable, "-m", "lmaas", *arguments],
            env=own | environment | {"COLUMNS": "80", "TERM": "xterm"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        self.output = ""

    def __enter__(self) -> "Terminal":
        return self

    def until(self, text: str) -> None:
        """Read until the output contains this text after the text of the last call."""
        deadline = time.monotonic() + 20
        while text not in self.output:
            assert time.monotonic() < deadline, self.output
            try:
                self.output += os.read(self._ours, 65536).decode(errors="replace")
            except OSError:
                pytest.fail(f"The command ended: {self.output}")
        self.output = self.output.partition(text)[2]

    def type(self, text: str) -> None:
        """Type a text."""
        os.write(self._ours, text.encode())

    def end(self) -> int:
        """Return the exit code of the command, once it has ended."""
        return self.process.wait(20)

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


def test_a_conversation_on_a_terminal(server: Server) -> None:
    """Each completion is kept, Ctrl-C stops one, an error does not end the conversation, /reset forgets it, and Ctrl-D ends the command."""
    with Terminal(server.environment, "chat", "bot") as terminal:
        for typed, shown in (
            ("Hi\n", "9 (4 cached) + 2 tokens, first token"),
            ("hang\n", "Hello"),
            ("\x03", "Stopped. The conversation keeps what was said."),
            ("refuse 400\n", "lmaas: It is refused."),
            ("half a line\x03", "\n"),
            ("More\n", "tokens, first token"),
            ("/wrong\n", "There is no command /wrong."),
            ("/reset\n", "The conversation is forgotten."),
            ("New\n", "tokens, first token"),
        ):
            if typed != "\x03":
                terminal.until("> ")
            terminal.type(typed)
            terminal.until(shown)
        assert server.left.wait(10), "the request is aborted"
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.end() == 0
    user = [[each["content"] for each in body["messages"] if each["role"] == "user"] for body in server.bodies]
    assert user == [["Hi"], ["Hi", "hang"], ["Hi", "hang", "refuse 400"], ["Hi", "hang", "More"], ["New"]]
    assert server.bodies[3]["messages"][3] == {"role": "assistant", "content": "Hello"}


def test_an_error_that_will_not_pass_ends_the_conversation(server: Server) -> None:
    with Terminal(server.environment, "chat", "bot") as terminal:
        terminal.until("> ")
        terminal.type("refuse 404\n")
        terminal.until("lmaas: It is refused.")
        assert terminal.end() == 1
