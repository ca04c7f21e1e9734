"""`lmaas chat`: a conversation with a model in the terminal."""

import json
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import click

from lmaas.cli.context import Context, pass_context
from lmaas.cli.conversation import PATH, Conversation, Ended, Text, Timing, Tokens, Waiting, events, summary
from lmaas.cli.names import MODELS
from lmaas.cli.streams import is_terminal
from lmaas.errors import ApiError, LmaasError

if TYPE_CHECKING:
    from lmaas.manifests.client import ApiClient

#: The longest message from a pipe, in characters. The service has limits of its own.
MAX_INPUT = 4 * 1024 * 1024
#: Statuses after which no further message of this conversation can succeed.
HOPELESS = (401, 403, 404)
HELP = "/reset forgets the conversation. Ctrl-C stops an answer. Ctrl-D ends."
PROMPT = "> "


@click.command()
@click.argument("model", shell_complete=MODELS)
@click.argument("message", required=False)
@click.option("--system", help="Instructions for the model, before the conversation.")
@click.option("--max-tokens", type=click.IntRange(1), help="The most tokens of an answer.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="0 chooses the most probable token each time.")
@pass_context
def chat(context: Context, model: str, message: str | None, system: str | None, max_tokens: int | None, temperature: float | None) -> None:
    """Talk to MODEL, a base model or an adapter.

    With MESSAGE, or with text from a pipe, the answer is printed and the command ends. Otherwise each line that you type is a message, and
    the conversation is kept. While a request waits, its place in the queue and the expected time are shown.
    """
    parameters = {"max_tokens": max_tokens, "temperature": temperature}
    talk = _Talk(context, context.own_client(), Conversation(model, system, parameters))
    if message is None and is_terminal(sys.stdin):
        talk.converse()
        return
    talk.answer(message if message is not None else _piped())


def _piped() -> str:
    """Return the text on standard input. Raises UsageError if there is none, or too much."""
    try:
        text = "" if sys.stdin is None else sys.stdin.read(MAX_INPUT + 1)
    except UnicodeDecodeError:
        raise click.UsageError("The text on standard input is not UTF-8.") from None
    if not text.strip():
        raise click.UsageError("There is no message. Give one after the model, or on standard input.")
    if len(text) > MAX_INPUT:
        raise click.UsageError(f"The message on standard input has more than {MAX_INPUT:,} characters. Send a shorter one.")
    return text


def _typed() -> str:
    """Return the next line from the terminal. Raises EOFError at its end. The prompt is no part of an output that goes elsewhere."""
    if is_terminal(sys.stdout):
        return input(PROMPT)
    click.echo(PROMPT, nl=False, err=True)
    return input()


@dataclass(slots=True)
class _Talk:
    context: Context
    client: "ApiClient"
    conversation: Conversation

    def converse(self) -> None:
        """Read messages from the terminal until its end, and answer each. Ctrl-C discards what was typed."""
        with suppress(ImportError):
            import readline  # noqa: F401 (gives `input` editing and a history)
        click.echo(f"{self.conversation.model}: {HELP}", err=True)
        while True:
            try:
                self._take(_typed().strip())
            except EOFError:
                click.echo(err=True)
                return
            except KeyboardInterrupt:
                click.echo(err=True)

    def _take(self, line: str) -> None:
        """Send a line as a message, or carry it out if it is a command."""
        match line:
            case "":
                pass
            case "/reset":
                self.conversation.reset()
                click.echo("The conversation is forgotten.", err=True)
            case "/help":
                click.echo(HELP, err=True)
            case command if command.startswith("/") and command[1:].isalpha():
                click.echo(f"There is no command {command}. {HELP}", err=True)
            case message:
                self._try(message)

    def _try(self, message: str) -> None:
        """Answer a message, and report an error after which the conversation can go on. Ctrl-C stops the answer."""
        try:
            self.answer(message)
        except KeyboardInterrupt:
            click.echo("\nStopped. The conversation keeps what was said.", err=True)
        except (ApiError, LmaasError) as error:
            if isinstance(error, ApiError) and error.status in HOPELESS:
                raise
            click.echo(f"lmaas: {error.message}", err=True)

    def answer(self, message: str) -> None:
        """Send a message and print the answer as it arrives; in JSON, all of it at its end. Raises ApiError and SettingsError."""
        timing, tokens, ended = Timing(time.monotonic()), None, None
        pieces: list[str] = []
        try:
            with _spinner(self.context) as show, self.client.streamed(PATH, self.conversation.request(message)) as lines:
                for event in events(lines):
                    match event:
                        case Waiting(words):
                            show(words)
                        case Text(text):
                            show(None)
                            timing.token(time.monotonic())
                            pieces.append(text)
                            self._print(text)
                        case Ended(reason):
                            ended = reason
                        case Tokens():
                            tokens = event
        finally:
            answer = "".join(pieces)
            self.conversation.keep(message, answer)
            if answer and not answer.endswith("\n") and not self.context.as_json:
                click.echo()
        if self.context.as_json:
            usage = None if tokens is None else asdict(tokens)
            first_s = None if timing.first is None else round(timing.first - timing.sent, 3)
            found = {"model": self.conversation.model, "answer": answer, "finish_reason": ended, "tokens": usage, "first_token_s": first_s}
            click.echo(json.dumps(found | {"total_s": round(time.monotonic() - timing.sent, 3)}))
        elif is_terminal(sys.stderr):
            from rich.console import Console

            Console(stderr=True).print(summary(timing, tokens, ended), style="dim", highlight=False, markup=False)

    def _print(self, text: str) -> None:
        if not self.context.as_json:
            click.echo(harmless(text) if is_terminal(sys.stdout) else text, nl=False)


def harmless(text: str) -> str:
    """Return the text without control characters other than line ends and tabs, which could change the terminal."""
    return "".join(each for each in text if each in "\n\t" or unicodedata.category(each) != "Cc")


@contextmanager
def _spinner(context: Context) -> Iterator[Callable[[str | None], None]]:
    """Show on the terminal that a request waits, and for how long. The block gets a function that sets the words; None ends the display."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=True, disable=context.as_json or not console.is_terminal)
    task = progress.add_task("Waiting for the first token")
    progress.start()

    def show(words: str | None) -> None:
        if words is None:
            progress.stop()
        else:
            progress.update(task, description=words)

    try:
        yield show
    finally:
        progress.stop()
