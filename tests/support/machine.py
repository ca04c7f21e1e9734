"""A provisioner for tests, whose replicas end or ignore the request to end."""


class Machine:
    """A provisioner. Its replicas end at the third call of `list`, unless they are `deaf`."""

    def __init__(self, *replicas: str, deaf: bool = False) -> None:
        self.replicas, self.deaf = dict.fromkeys(replicas, "mod"), deaf
        self.asked = 0
        self.killed: list[str] = []

    async def list(self) -> dict[str, str]:
        """Return the replicas that run."""
        self.asked += 1
        if self.asked > 2 and not self.deaf:
            self.replicas.clear()
        return dict(self.replicas)

    async def kill(self, replica_id: str) -> None:
        """Record that the replica was killed."""
        self.killed.append(replica_id)
        del self.replicas[replica_id]
