"""A provisioner for tests that start no replica."""


class Nowhere:
    """A provisioner without a machine."""

    async def list(self) -> dict[str, str]:
        """Return no replica."""
        return {}

    def start_delay_s(self) -> float:
        """Return 0, because starts are not delayed."""
        return 0.0

    def first_start_s(self) -> float:
        """Return the time of a plain start."""
        return 20.0

    async def capacity(self) -> None:
        """Return None, because there is no bound."""
