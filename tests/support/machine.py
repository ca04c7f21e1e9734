"""A machine whose replicas end, or do not, when they are asked to."""


class Machine:
    """A provisioner whose replicas end when they are asked twice whether they still run, unless they are deaf."""

    def __init__(self, *replicas: str, deaf: bool = False) -> None:
        self.replicas, self.deaf = dict.fromkeys(replicas, "mod"), deaf
        self.asked = 0
        self.killed: list[str] = []

    async def list(self) -> dict[str, str]:
        """Those that run."""
        self.asked += 1
        if self.asked > 2 and not self.deaf:
            self.replicas.clear()
        return dict(self.replicas)

    async def kill(self, replica_id: str) -> None:
        """It is gone."""
        self.killed.append(replica_id)
        del self.replicas[replica_id]
