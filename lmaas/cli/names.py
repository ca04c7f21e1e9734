"""Names from the service, with which shells complete arguments."""

from dataclasses import dataclass

import click

from lmaas.api import table
from lmaas.api.operation import Operation
from lmaas.cli.context import Context
from lmaas.errors import ApiError, LmaasError

#: The time for which a shell waits for the service, and the most names that it gets.
WAIT_S, MOST_NAMES = 1.0, 200
#: The key under which the tenant of an incomplete command is kept.
TENANT = "lmaas.tenant"


@dataclass(frozen=True, slots=True)
class Names:
    """Completes an argument with one field of the rows of some lists. Without a service, or without the right to list, there are none."""

    operations: tuple[Operation, ...]
    field: str = "name"

    def __call__(self, context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
        """Return the names that begin with `incomplete`."""
        del parameter
        found: list[str] = []
        for operation in self.operations:
            try:
                client = Context(tenant=context.meta.get(TENANT) or context.find_root().params.get("tenant")).client()
                client.set_timeout(WAIT_S)
                found += [str(row[self.field]) for row in client.items(operation, most=MOST_NAMES)]
            except (ApiError, LmaasError, click.ClickException):
                continue  # A shell has no place for an error.
        return [name for name in found if name.startswith(incomplete)]


ADAPTERS = Names((table.LIST_ADAPTERS,))
BASE_MODELS = Names((table.LIST_MODELS,))
BATCHES = Names((table.LIST_BATCHES,), "id")
KEYS = Names((table.LIST_KEYS, table.LIST_OPERATOR_KEYS), "id")
MODELS = Names((table.LIST_ADAPTERS, table.LIST_MODELS))
REPLICAS = Names((table.LIST_REPLICAS,), "id")
TENANTS = Names((table.LIST_TENANTS,))
