"""The common parts of the commands: the client of the service, output, and confirmation."""

import json
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import click

from lmaas import config
from lmaas.api import table
from lmaas.cli.streams import is_terminal
from lmaas.config import Settings
from lmaas.errors import ApiError, SettingsError

if TYPE_CHECKING:
    from lmaas.manifests.client import ApiClient

#: The number of names that a message lists at most.
MOST_NAMES = 10


@dataclass(slots=True)
class Context:
    """The options that all commands share, and the settings."""

    as_json: bool = False
    wide: bool = False
    tenant: str | None = None
    _settings: Settings | None = None

    @property
    def settings(self) -> Settings:
        """The settings, read from the environment when a command first needs them. Raises SettingsError."""
        if self._settings is None:
            self._settings = config.load()
        return self._settings

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
            raise click.UsageError("Name the tenant: --tenant NAME.")
        return self.client()

    def own_client(self) -> "ApiClient":
        """Return a client for what a tenant alone may do, such as calling models, with a key of the tenant's: that of the settings, or the
        one that `lmaas up` keeps for a tenant of this stack. Without a name, it is the tenant of a stack that has only one."""
        from lmaas.manifests.client import ApiClient

        if self.settings.api_key:
            if self.tenant is not None or self.is_operator():
                raise click.UsageError(
                    "Only a tenant's own key may do this, not an operator's. Set LMAAS_URL and LMAAS_API_KEY to a key of the tenant."
                )
            return self.client()
        credentials = self._credentials()
        known = credentials.get("tenants")
        keys = {name: key["api_key"] for name, key in known.items() if "api_key" in key} if isinstance(known, dict) else {}
        tenant = next(iter(keys)) if self.tenant is None and len(keys) == 1 else self.tenant
        if tenant is None:
            names = f" It is one of {', '.join(sorted(keys)[:MOST_NAMES])}." if keys else ""
            raise click.UsageError(f"Name the tenant: --tenant NAME.{names}")
        if tenant not in keys:
            raise SettingsError(
                f"{self.settings.credentials_path} has no key of the tenant '{tenant}'. Set LMAAS_URL and LMAAS_API_KEY to one."
            )
        return ApiClient(str(credentials["base_url"]), str(keys[tenant]))

    def is_operator(self) -> bool:
        """Return whether the key is an operator's: this stack's own is; for another key, the service decides."""
        if not self.settings.api_key:
            return True
        try:
            self.client().send(table.LIST_OPERATOR_KEYS, query={"limit": 1})
        except ApiError as error:
            if error.status != HTTPStatus.FORBIDDEN:
                raise
            return False
        return True

    def show(self, rows: Sequence[dict[str, Any]], columns: Sequence[str], empty: str = "There is nothing to show.") -> None:
        """Print a table for people, JSON for programs. On a terminal without room for all columns, the last ones are left out and named,
        unless the output is wide. `empty` is the sentence for no rows: that there are none, and how the first one comes."""
        if self.as_json:
            click.echo(json.dumps(list(rows), indent=2))
            return
        if not rows:
            self.say(empty)
            return
        from rich.console import Console

        from lmaas.cli.tables import fitting

        console = Console()
        width = console.width if console.is_terminal and not self.wide else None
        table, hidden = fitting(rows, columns, width)
        if width is None:
            # A line of the table is one line of the output, however long.
            console.width = max(console.width, console.measure(table, options=console.options.update(width=100_000)).maximum)
        console.print(table, soft_wrap=width is None, crop=False)
        if hidden and width is not None:
            self.say(f"Not shown, because the terminal has {width} columns: {', '.join(hidden)}. Add --wide to see them.")

    def show_one(self, row: dict[str, Any], columns: Sequence[str], remark: str | None = None) -> None:
        """Print one thing: for people a line for each of `columns`, in JSON all of it."""
        if self.as_json:
            click.echo(json.dumps(row, indent=2))
            return
        from lmaas.cli.tables import lines

        click.echo("\n".join(lines(row, columns, self._width())))
        if remark:
            click.echo(remark)

    def show_texts(self, texts: Mapping[str, str]) -> None:
        """Print sentences under their headings. On a terminal, lines break between words."""
        from lmaas.cli.tables import labelled

        click.echo("\n".join(labelled(texts, self._width())))

    def say(self, sentence: str) -> None:
        """Print a sentence for people. On a terminal, it breaks between words."""
        width = self._width()
        click.echo(sentence if width is None else textwrap.fill(sentence, width, break_long_words=False, break_on_hyphens=False))

    def _width(self) -> int | None:
        """Return the width in which lines should fit, None if nothing limits it."""
        if self.wide or not is_terminal(sys.stdout):
            return None
        return shutil.get_terminal_size().columns

    def show_done(self, answer: dict[str, Any], sentence: str) -> None:
        """Print that something was done: a sentence for people, the API's answer in JSON."""
        click.echo(json.dumps(answer, indent=2) if self.as_json else sentence)


pass_context = click.make_pass_decorator(Context)
yes_option = click.option("--yes", is_flag=True, help="Do not ask for confirmation.")


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something is deleted, unless `yes`. Ends the command if the answer is no, and if there is no terminal to ask."""
    if yes:
        return
    if not is_terminal(sys.stdin):
        raise click.UsageError("This command asks for confirmation, and there is no terminal. Add --yes to confirm.")
    click.confirm(question, abort=True, err=True)
