"""Commands that run the processes of the service, or prepare what they need."""

import sys

import click

from lmaas.cli.context import Context, pass_context
from lmaas.process import private_files


@click.command()
@pass_context
def up(context: Context) -> None:
    """Run the whole service on this machine."""
    from lmaas.observability import configure_logging
    from lmaas.up.stack import up as run

    configure_logging("WARNING")
    run(context.settings)


@click.command()
@pass_context
def gateway(context: Context) -> None:
    """Run one gateway."""
    import uvloop

    from lmaas import app
    from lmaas.observability import configure_logging
    from lmaas.web.loop import Loop

    private_files()
    configure_logging(context.settings.log_level)
    uvloop.run(app.run_gateway(context.settings), loop_factory=Loop)  # half the cost of asyncio's own


@click.command()
@pass_context
def controller(context: Context) -> None:
    """Run a controller: one is active, others stand by."""
    import asyncio

    from lmaas import app
    from lmaas.observability import configure_logging

    private_files()
    configure_logging(context.settings.log_level)
    asyncio.run(app.run_controller(context.settings))


@click.command()
@pass_context
def jobs(context: Context) -> None:
    """Run a job runner, which does the work of batches and of responses in the background. There may be any number."""
    import uvloop

    from lmaas import app
    from lmaas.observability import configure_logging

    private_files()
    configure_logging(context.settings.log_level)
    uvloop.run(app.run_jobs(context.settings))


@click.command()
@pass_context
def console(context: Context) -> None:
    """Run the web console, to which gateways forward /console."""
    import uvloop

    from lmaas.console.app import run_console
    from lmaas.observability import configure_logging

    private_files()
    configure_logging(context.settings.log_level)
    uvloop.run(run_console(context.settings))


@click.command(hidden=True)
@click.argument("replica_id")
@pass_context
def supervise(context: Context, replica_id: str) -> None:
    """Run the supervisor of a replica. Provisioners call it."""
    import asyncio

    from lmaas import app
    from lmaas.observability import configure_logging

    private_files()
    configure_logging(context.settings.log_level)
    sys.exit(0 if asyncio.run(app.run_replica(context.settings, replica_id)) else 1)


@click.command()
@pass_context
def migrate(context: Context) -> None:
    """Bring the database of LMAAS_DATABASE_URL to the newest schema, with its roles and their rights."""
    if context.settings.database_url is None:
        raise click.UsageError("Set LMAAS_DATABASE_URL to the URL of the Postgres server. `lmaas up` migrates its own by itself.")
    from lmaas.store.migrate import parse_passwords, upgrade

    settings = context.settings
    upgrade(str(settings.database_url), prefix=settings.database_role_prefix, passwords=parse_passwords(settings.database_passwords))
    click.echo("The database has the newest schema.")


@click.command()
@pass_context
def init(context: Context) -> None:
    """Register the base model and the key of LMAAS_OPERATOR_KEY, for services that run without `lmaas up`."""
    import asyncio

    from rich.console import Console

    from lmaas.observability import configure_logging
    from lmaas.up.init import initialise

    configure_logging("WARNING")
    asyncio.run(initialise(context.settings, Console()))


PROCESSES = (up, gateway, controller, jobs, console, supervise, migrate, init)
