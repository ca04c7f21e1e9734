"""What the commands share: the client of the service, output, and confirmation."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import click

from lmaas.api import table
from lmaas.config import Settings
from lmaas.errors import ApiError, SettingsError

if TYPE_CHECKING:
    from lmaas.manifests.client import ApiClient


@dataclass(slots=True)
class Context:
    """The settings and the options that stand before a command."""

    settings: Settings
    as_json: bool
    tenant: str | None

    def client(self) -> "ApiClient":
        """Return a client for the service and key of the settings; by default this stack's operator."""
        from lmaas.manifests.client import ApiClient

        if self.settings.url and self.settings.api_key:
            return ApiClient(self.settings.url, self.settings.api_key, self.tenant)
        if self.settings.url or self.settings.api_key:
            raise SettingsError("Set both LMAAS_URL and LMAAS_API_KEY, or neither.")
        credentials = self._credentials()
        return ApiClient(str(credentials["base_url"]), str(credentials["operator_key"]), self.tenant)

    def _credentials(self) -> dict[str, Any]:
        """Return the contents of this stack's credentials file, with an address and an operator's key."""
        try:
            credentials: dict[str, Any] = json.loads(self.settings.credentials_path.read_text())
            _ = credentials["base_url"], credentials["operator_key"]
        except (OSError, ValueError, LookupError, TypeError):
            raise SettingsError(
                f"There are no credentials in {self.settings.credentials_path}. Run `lmaas up`, or set LMAAS_URL and LMAAS_API_KEY."
            ) from None
        return credentials

    def tenant_client(self) -> "ApiClient":
        """Return a client for a tenant's resources. An operator must name the tenant."""
        if self.tenant is None and self.is_operator():
            raise click.UsageError("Name the tenant before the command: lmaas --tenant NAME …")
        return self.client()

    def own_client(self) -> "ApiClient":
        """Return a client for what a tenant alone sees, with a key of the tenant's: that of the settings, or the one that `lmaas up` keeps
        for a tenant of this stack."""
        from lmaas.manifests.client import ApiClient

        if self.settings.api_key:
            if self.tenant is not None or self.is_operator():
                raise click.UsageError("Operators do not see a tenant's files. Set LMAAS_URL and LMAAS_API_KEY to a key of the tenant.")
            return self.client()
        if self.tenant is None:
            raise click.UsageError("Name the tenant before the command: lmaas --tenant NAME …")
        credentials = self._credentials()
        try:
            return ApiClient(str(credentials["base_url"]), str(credentials["tenants"][self.tenant]["api_key"]))
        except (LookupError, TypeError):
            raise SettingsError(
                f"{self.settings.credentials_path} has no key of the tenant '{self.tenant}'. Set LMAAS_URL and LMAAS_API_KEY to one."
            ) from None

    def is_operator(self) -> bool:
        """Return whether the key is an operator's: this stack's own is; of another, the service is asked."""
        if not self.settings.api_key:
            return True
        try:
            self.client().send(table.LIST_OPERATOR_KEYS, query={"limit": 1})
        except ApiError as error:
            if error.status != HTTPStatus.FORBIDDEN:
                raise
            return False
        return True

    def show(self, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
        """Print a table for people, JSON for programs. On a terminal without room for all columns, the last ones are left out and named."""
        if self.as_json:
            click.echo(json.dumps(list(rows), indent=2))
            return
        if not rows:
            click.echo("Nothing to show.")
            return
        from rich.console import Console

        from lmaas.cli.tables import fitting

        console = Console()
        table, hidden = fitting(rows, columns, console.width if console.is_terminal else None)
        # Where nothing limits the width, a line of the table is one line of the output.
        unlimited = console.measure(table, options=console.options.update(width=10_000)).maximum
        Console(width=console.width if console.is_terminal else max(console.width, unlimited)).print(table)
        if hidden:
            click.echo(f"Not shown, because the terminal has {console.width} columns: {', '.join(hidden)}. See them with a pipe or --json.")

    def show_one(self, row: dict[str, Any], columns: Sequence[str], remark: str | None = None) -> None:
        """Print one thing: for people a line for each of `columns`, in JSON all of it."""
        if self.as_json:
            click.echo(json.dumps(row, indent=2))
            return
        from lmaas.cli.tables import lines

        click.echo("\n".join(lines(row, columns)))
        if remark:
            click.echo(remark)

    def show_done(self, answer: dict[str, Any], sentence: str) -> None:
        """Print that something was done: a sentence for people, the API's answer in JSON."""
        click.echo(json.dumps(answer, indent=2) if self.as_json else sentence)


pass_context = click.make_pass_decorator(Context)
yes_option = click.option("--yes", is_flag=True, help="Do not ask for confirmation.")


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something is deleted, unless `yes`. Ends the command if the answer is no, and if there is no terminal to ask."""
    if yes:
        return
    if sys.stdin is None or not sys.stdin.isatty():  # None if it was closed
        raise click.UsageError("This command asks for confirmation, and there is no terminal. Add --yes to confirm.")
    click.confirm(question, abort=True, err=True)
