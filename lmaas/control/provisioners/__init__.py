"""Provisioners start and stop replicas. They share a small interface, which has an implementation for each kind of machine."""

from typing import Protocol

from lmaas.types import Resources


class Provisioner(Protocol):
    """Starts supervisors. A replica outlives the controller that started it."""

    async def start(self, replica_id: str, pool_id: str, needs: Resources) -> None:
        """Start the supervisor of a replica that takes `needs` from its machine. Raises OSError if that is not possible."""

    async def kill(self, replica_id: str) -> None:
        """End a replica's processes now, without a drain. Killing a replica that has ended is no error."""

    async def list(self) -> dict[str, str]:
        """Return the replicas whose supervisor runs: replica id → pool id."""

    async def last_words(self, replica_id: str) -> str:
        """Return the reason why a replica has disappeared from the list without reporting an end, or an empty string if it is not known."""

    def start_delay_s(self) -> float:
        """Return the seconds that a start takes longer at present than usual."""

    def first_start_s(self) -> float:
        """Return the duration of a start in seconds, without that delay, for a base model without earlier starts."""

    async def capacity(self) -> Resources | None:
        """Return the total capacity of all machines, used or not. None if there is no known bound because machines can be added."""
