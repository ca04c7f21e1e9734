"""The states of a batch as a table."""

from lmaas.states import BATCH_TRANSITIONS, OPEN_BATCHES, BatchStatus, batch_sources


def test_every_state_can_be_reached_and_left() -> None:
    reached = {target for targets in BATCH_TRANSITIONS.values() for target in targets}
    assert reached == set(BatchStatus) - {BatchStatus.VALIDATING}
    assert set(BATCH_TRANSITIONS) == set(BatchStatus)
    ends = set(BatchStatus) - set(OPEN_BATCHES)
    assert ends == {BatchStatus.FAILED, BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLED}


def test_a_batch_ends() -> None:
    """No path through the table comes back to a state."""

    def longest(status: BatchStatus, path: tuple[BatchStatus, ...]) -> None:
        assert status not in path
        for target in BATCH_TRANSITIONS[status]:
            longest(target, (*path, status))

    longest(BatchStatus.VALIDATING, ())


def test_the_sources_of_a_state() -> None:
    assert batch_sources(BatchStatus.CANCELLING) == [BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS]
    assert batch_sources(BatchStatus.CANCELLED) == [BatchStatus.CANCELLING]
    assert batch_sources(BatchStatus.VALIDATING) == []
