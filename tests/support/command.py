"""The `lmaas` command inside the test's process, and a trace for `lmaas simulate`."""

from click.testing import CliRunner, Result

from lmaas.cli.commands import cli

#: Three requests of two tenants, of which the last one comes after a long pause.
SMALL_TRACE = "time,tenant,adapter,prompt_tokens,completion_tokens\n0,acme,bot,100,20\n1,globex,,50,10\n900,acme,bot,100,20\n"


def run(*arguments: object) -> Result:
    """Run the command with these arguments."""
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])
