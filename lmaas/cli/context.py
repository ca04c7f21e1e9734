"""What the commands share: which service, with which key, and how answers are shown."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from lmaas.config import Settings
from lmaas.errors import SettingsError

if TYPE_CHECKING:
    from lmaas.manifests.client import ApiClient

#: Headings for narrow columns of numbers.
SHORT = {
    "failed_requests": "failed",
    "prompt_tokens": "prompt",
    "cached_tokens": "cached",
    "completion_tokens": "completion",
    "content_hash": "content",
    # Money is shown in dollars.
    "cost_microusd": "cost $",
    "charge_microusd": "charge $",
    "margin_microusd": "margin $",
}


@dataclass(slots=True)
class Context:
    """The settings and the options that stand before a command."""

    settings: Settings
    as_json: bool
    tenant: str | None

    def client(self) -> "ApiClient":
        """A client for the service and key of the settings; by default this stack's operator."""
        from lmaas.manifests.client import ApiClient

        if self.settings.url and self.settings.api_key:
            return ApiClient(self.settings.url, self.settings.api_key, self.tenant)
        if self.settings.url or self.settings.api_key:
            raise SettingsError("Set both LMAAS_URL and LMAAS_API_KEY, or neither.")
        try:
            credentials = json.loads(self.settings.credentials_path.read_text())
            return ApiClient(credentials["base_url"], credentials["operator_key"], self.tenant)
        except (OSError, ValueError, KeyError):
            raise SettingsError(
                f"There are no credentials in {self.settings.credentials_path}. Run `lmaas up`, or set LMAAS_URL and LMAAS_API_KEY."
            ) from None

    def tenant_client(self) -> "ApiClient":
        """The same, for a tenant's things: an operator must name the tenant."""
        if self.tenant is None and not self.settings.api_key:
            raise click.UsageError("Say whose: --tenant NAME.")
        return self.client()

    def show(self, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
        """A table for people, JSON for programs."""
        if self.as_json:
            click.echo(json.dumps(list(rows), indent=2))
            return
        if not rows:
            click.echo("Nothing to show.")
            return
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in columns:
            number = all(isinstance(row.get(column), int | float) for row in rows)
            # What people copy stays in one piece, on a narrow screen too; prose may be folded.
            table.add_column(
                SHORT.get(column, column).replace("_", " "),
                justify="right" if number else "left",
                overflow="fold",
                no_wrap=column not in ("reason", "target_modules", "source"),
            )
        for row in rows:
            table.add_row(*(_cell(row.get(column), money=column.endswith("_microusd")) for column in columns))
        console = Console()
        # A terminal folds long lines by itself; cutting them would lose what they say.
        width = max(console.width, console.measure(table, options=console.options.update(width=1000)).maximum)
        Console(width=width).print(table)

    def show_one(self, row: dict[str, Any], columns: Sequence[str], remark: str | None = None) -> None:
        """One thing; in a table its columns, in JSON all of it."""
        if self.as_json:
            click.echo(json.dumps(row, indent=2))
            return
        self.show([row], columns)
        if remark:
            click.echo(remark)


pass_context = click.make_pass_decorator(Context)

HASH_LENGTH = 64


def _cell(value: Any, *, money: bool) -> str:
    if value is None:
        return "-"
    if money:
        dollars, micro = divmod(abs(value), 1_000_000)
        return f"{'-' if value < 0 else ''}{dollars}.{micro:06d}"
    if isinstance(value, list):
        return ",".join(str(item) for item in value)
    text = str(value)
    if len(text) == HASH_LENGTH and text.isalnum():
        return text[:12]
    # Moments to the second are enough for people.
    return text[:19].replace("T", " ") if len(text) > 19 and text[4:5] == "-" and text[10:11] == "T" else text
