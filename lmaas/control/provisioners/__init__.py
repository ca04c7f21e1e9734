"""Provisioners start and stop replicas: one small interface with an implementation for each kind of machine."""

from typing import Protocol

from lmaas.types import Resources


class Provisioner(Protocol):
    """Starts supervisors. A replica that was started outlives the controller that started it."""

    async def start(self, replica_id: str, pool_id: str, needs: Resources) -> None:
        """Start the supervisor of a replica that takes `needs` from its machine. Raises OSError if that is not possible."""

    async def kill(self, replica_id: str) -> None:
        """End a replica's processes now, without a drain. Killing a replica that is gone is no error."""

    async def list(self) -> dict[str, str]:
        """Return the replicas whose supervisor runs: replica id → pool id."""

    async def last_words(self, replica_id: str) -> str:
        """Return why a replica has disappeared from the list without reporting an end itself; empty if that is not known."""

    def start_delay_s(self) -> float:
        """Return by how many seconds a start takes longer at present than starts usually do."""

    def first_start_s(self) -> float:
        """Return how many seconds a start takes, without that delay, if none of its base model is known."""

    async def capacity(self) -> Resources | None:
        """Return what all machines hold together, used or not. None if there is no known bound because machines can be added."""
