"""Where replicas run: one small interface, start, kill and list."""

from typing import Protocol


class Provisioner(Protocol):
    """Starts supervisors. A replica that was started outlives the controller that started it."""

    async def start(self, replica_id: str, pool_id: str) -> None:
        """Start the supervisor of a replica. Raises OSError if it cannot be started."""

    async def kill(self, replica_id: str) -> None:
        """End a replica's processes now, without drain. Killing one that is gone is no error."""

    async def list(self) -> dict[str, str]:
        """The replicas whose supervisor runs: replica id → pool id."""
