"""Every command of `lmaas`."""

import io
import sys

import click

from lmaas.cli.adapters import adapter
from lmaas.cli.apply import apply
from lmaas.cli.batches import batches
from lmaas.cli.chat import chat
from lmaas.cli.completion import completion
from lmaas.cli.context import Context
from lmaas.cli.doctor.command import doctor
from lmaas.cli.errors import Commands, end, is_of_output
from lmaas.cli.files import files
from lmaas.cli.keys import key
from lmaas.cli.logs import logs
from lmaas.cli.models import model
from lmaas.cli.names import TENANTS
from lmaas.cli.processes import PROCESSES
from lmaas.cli.replicas import replica
from lmaas.cli.reports import cogs, usage
from lmaas.cli.shared_options import add_shared_options
from lmaas.cli.simulate import simulate
from lmaas.cli.tenants import tenant
from lmaas.cli.top import top
from lmaas.cli.webhooks import webhooks
from lmaas.errors import ApiError, LmaasError, Unauthenticated

WRONG_KEY = (
    "The service does not accept the API key. Set LMAAS_API_KEY to a valid one. Without it, commands use the key in "
    "LMAAS_HOME/credentials.json."
)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--wide", is_flag=True, help="Show all columns, also beyond the terminal.")
@click.option(
    "--tenant", "-t", metavar="NAME", shell_complete=TENANTS, help="For operators: the tenant whose resources the command is about."
)
@click.option("--traceback", is_flag=True, help="Of an unexpected error, show where it comes from. This may show secrets.")
@click.version_option(package_name="lmaas", prog_name="lmaas", message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context, as_json: bool, wide: bool, tenant: str | None, traceback: bool) -> None:
    """Serverless LLM endpoints for many tenants.

    `--json`, `--wide` and `--tenant` may stand before a command or after it.
    """
    del traceback  # The group reads it.
    context.obj = Context(as_json=as_json, wide=wide, tenant=tenant)


def main() -> None:
    """Run a command. An error is printed on standard error, with exit code 1; wrong usage has 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Also in a locale without these characters, what was done is said.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        cli(prog_name="lmaas")
    except ApiError as error:
        message = WRONG_KEY if error.code == Unauthenticated.code else error.message
        end(f"{message}{f' ({error.code}, {error.request_id})' if error.request_id else ''}")
    except LmaasError as error:
        end(error.message)
    except OSError as error:
        if not is_of_output(error):
            raise
        end(f"The output cannot be written: {error.strerror}.")


SECTIONS: dict[str, tuple[click.Command, ...]] = {
    "Using a model": (chat,),
    "A tenant's resources": (adapter, files, batches, key, usage, webhooks),
    "For operators": (apply, tenant, model, replica, cogs, simulate),
    "Running a service": PROCESSES,
    "Looking after a service": (doctor, top, logs),
    "This command": (completion,),
}
for commands in SECTIONS.values():
    for command in commands:
        cli.add_command(command)
cli.sections = {heading: [str(each.name) for each in commands if not each.hidden] for heading, commands in SECTIONS.items()}
add_shared_options(
    cli,
    without={*(str(process.name) for process in PROCESSES), "completion"},
    of_operators={"apply", "cogs", "doctor", "logs", "model", "replica", "simulate", "tenant", "top"},
)
