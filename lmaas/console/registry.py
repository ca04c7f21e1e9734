"""The pages of the console, in the order of the navigation. A new page is a module in `lmaas/console/pages` and an entry here."""

from lmaas.console.page import Page
from lmaas.console.pages import adapters, batches, files, fleet, keys, money, overview, playground, tenants, usage

PAGES: tuple[Page, ...] = (
    overview.PAGE,
    playground.PAGE,
    adapters.PAGE,
    batches.PAGE,
    files.PAGE,
    keys.PAGE,
    usage.PAGE,
    fleet.PAGE,
    tenants.PAGE,
    money.PAGE,
)
