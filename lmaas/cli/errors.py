"""The group of all commands: their help, and how one that fails ends, with one line on standard error and never with a secret."""

import errno
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import click

from lmaas.errors import ApiError, LmaasError, SettingsError

#: Commands that run until they are stopped. An unexpected error cannot be repeated at will, so its traceback goes to their log.
SERVERS = frozenset({"up", "gateway", "controller", "jobs", "console", "supervise"})
_EXPECTED = (click.ClickException, click.Abort, click.exceptions.Exit, LmaasError, ApiError)


class UnexpectedError(LmaasError):
    """A fault of lmaas itself. The message has no text of the error, in which there may be a secret."""

    kind, code = "unexpected", "unexpected"


class Commands(click.Group):
    """The group of all commands. An unexpected error becomes one line, unless the option `--traceback` is given.

    `sections` are the headings of the help with the commands below them. A noun may be given in the singular or the plural.
    """

    sections: Mapping[str, Sequence[str]] = {}

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command with this name, or whose name is its singular or plural."""
        for name in (cmd_name, f"{cmd_name}s", cmd_name.removesuffix("s"), f"{cmd_name}es"):
            if (found := super().get_command(ctx, name)) is not None:
                return found
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands in their sections, with the first sentence about each."""
        for heading, names in self.sections.items():
            with formatter.section(heading):
                formatter.write_dl([(name, _first_sentence(self.commands[name])) for name in names])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except _EXPECTED:
            raise
        except Exception as error:
            if ctx.params["traceback"] or ctx.invoked_subcommand in SERVERS:
                raise
            if not isinstance(error, OSError):
                raise UnexpectedError(
                    f"An unexpected error ({type(error).__name__}). Run `lmaas --traceback …` to see where it comes from, and report it."
                ) from error
            if error.errno == errno.EPIPE or is_of_output(error):
                raise
            where = f"{error.filename}: " if error.filename else ""
            raise SettingsError(f"{where}{error.strerror or type(error).__name__}.") from error


def _first_sentence(command: click.Command) -> str:
    text = " ".join((command.help or "").split("\n\n", maxsplit=1)[0].split())
    return text.partition(". ")[0].rstrip(".") + "."


def is_of_output(error: OSError) -> bool:
    """Return whether an error is one of writing to standard output, such as to a file on a full disk. An error of a file has its name."""
    return error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def end(message: str) -> None:
    """Print the line of an error on standard error, and end with exit code 1."""
    with suppress(OSError):
        click.echo(f"lmaas: {message}", err=True)
    # Python writes the rest of the buffer at its end. Unless the stream is closed, it reports a failure to do so in lines of its own.
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            with suppress(OSError):
                stream.close()
    sys.exit(1)
