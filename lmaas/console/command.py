"""The commands that do the same as the pages."""

import shlex

from lmaas.console.page import Visit


def command(visit: Visit, *words: str) -> str:
    """Return a command line of `lmaas`; for an operator with the tenant that the page is about."""
    tenant = ["--tenant", visit.tenant] if visit.person.is_operator and visit.page.of_tenant and visit.tenant else []
    return shlex.join(["lmaas", *tenant, *words])
