"""Where replicas run: one small interface, start, kill, list and capacity."""

from typing import Protocol

from lmaas.types import Resources


class Provisioner(Protocol):
    """Starts supervisors. A replica that was started outlives the controller that started it."""

    async def start(self, replica_id: str, pool_id: str, needs: Resources) -> None:
        """Start the supervisor of a replica that takes `needs` from its machine. Raises OSError if it cannot be started."""

    async def kill(self, replica_id: str) -> None:
        """End a replica's processes now, without drain. Killing one that is gone is no error."""

    async def list(self) -> dict[str, str]:
        """The replicas whose supervisor runs: replica id → pool id."""

    async def last_words(self, replica_id: str) -> str:
        """Why a replica is not listed any more that did not say so itself, if that is known; else empty."""

    async def capacity(self) -> Resources | None:
        """What all machines together hold, used or not; None where no bound is known, since they can grow."""
