"""The scheduling, limits and charges of an inference, apart from its request to the model."""

from dataclasses import dataclass

from lmaas.states import WorkClass


class PutBack(Exception):
    """The scheduler has taken back the slot of background work. The engine has ended the attempt, whose tokens are counted as wasted. The
    caller runs the work again later, as a new attempt."""


@dataclass(frozen=True, slots=True)
class Work:
    """A kind of work.

    The result of `durable` work and its usage event are stored by the caller of `Inferences.serve`, in one transaction. Until then, the
    ledger counts the attempt as wasted. `price_percent` is the part of the usual price that its tokens cost; None leaves that to the
    request's service tier, which also decides its turn. The limits per minute and of concurrent requests hold for `rate_limited` work;
    budgets and tokens per month hold for all. `deadline_s` is the time for which it may wait for a slot, None for that of the settings.
    """

    work_class: WorkClass
    durable: bool
    price_percent: int | None = None
    rate_limited: bool = True
    deadline_s: float | None = None

    @property
    def engine_priority(self) -> int:
        """The priority of its requests inside an engine, where those with a higher number give way."""
        return 1 if self.work_class is WorkClass.BACKGROUND else 0


#: A request whose client waits.
INTERACTIVE = Work(WorkClass.INTERACTIVE, durable=False)
#: A response in the background: it does not need its client, and is served like an interactive request.
DETACHED = Work(WorkClass.INTERACTIVE, durable=True)
#: A line of a batch.
BATCH = Work(WorkClass.BACKGROUND, durable=True, price_percent=50, rate_limited=False)
