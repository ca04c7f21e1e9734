"""Options that every command for the API has: they may stand before the command or after it."""

from collections.abc import Collection, Iterator
from typing import Any

import click

from lmaas.cli.context import Context
from lmaas.cli.names import TENANT, TENANTS


def _keep(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    """Set a field of the shared context. An option that is not given leaves the one before the command as it is."""
    shared = context.find_object(Context)
    if value and shared is not None and parameter.name is not None:
        setattr(shared, parameter.name, value)
    elif value and parameter.name == "tenant":
        context.meta[TENANT] = value  # while a shell completes a command, which then does not run


def output_options() -> list[click.Option]:
    """Return the options for the form of the output."""
    return [
        click.Option(["--json", "as_json"], is_flag=True, expose_value=False, callback=_keep, help="Print JSON instead of tables."),
        click.Option(["--wide"], is_flag=True, expose_value=False, callback=_keep, help="Show all columns, also beyond the terminal."),
    ]


def tenant_option() -> click.Option:
    """Return the option that names a tenant."""
    return click.Option(
        ["--tenant", "-t"],
        metavar="NAME",
        shell_complete=TENANTS,
        expose_value=False,
        callback=_keep,
        help="For operators: the tenant that the command is about.",
    )


def add_shared_options(group: click.Group, *, without: Collection[str], of_operators: Collection[str]) -> None:
    """Give the shared options to every command of a group and of its groups, except to the names `without`.

    The commands `of_operators`, which are about no tenant's resources, get no `--tenant`. An option of the command's own stays.
    """
    for name, command in group.commands.items():
        if name in without:
            continue
        shared = output_options() if name in of_operators else [*output_options(), tenant_option()]
        for leaf in _leaves(command):
            names = {option for parameter in leaf.params for option in parameter.opts}
            leaf.params += [option for option in shared if not names & set(option.opts)]


def _leaves(command: click.Command) -> Iterator[click.Command]:
    if isinstance(command, click.Group):
        for each in command.commands.values():
            yield from _leaves(each)
    else:
        yield command
