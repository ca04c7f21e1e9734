"""The metrics of a job runner for Prometheus. None of them names a tenant."""

from collections import Counter
from collections.abc import Iterable, Mapping

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lmaas.jobs.commits import Commits
from lmaas.jobs.held import HeldLines
from lmaas.jobs.window import Window


class JobMetrics(Collector):
    """The metrics of one runner. Only the thread of the event loop counts."""

    def __init__(self) -> None:
        self._lines: Counter[str] = Counter()
        self._steps: Counter[tuple[str, str]] = Counter()
        self._responses: Counter[str] = Counter()
        self._webhooks: Counter[str] = Counter()
        self._lost = 0
        self._held: HeldLines | None = None
        self._windows: Mapping[str, Window] = {}
        #: The transactions of earlier leases, and what counts those of this one.
        self._commits: Commits | None = None
        self._commits_before = 0

    def line(self, event: str) -> None:
        """Count a line that was `attempted`, `put_back` by the scheduler, `retried` after an error that passes, `done` or `failed`."""
        self._lines[event] += 1

    def step(self, step: str, outcome: str) -> None:
        """Count a step of a batch."""
        self._steps[step, outcome] += 1

    def response(self, outcome: str) -> None:
        """Count the end of a run of a response in the background: the status with which the response ended, `retried` or `aborted`."""
        self._responses[outcome] += 1

    def webhook(self, event: str) -> None:
        """Count an attempt to send an event to a webhook: `delivered`, `retried` later, or `failed` for good. Or count a webhook that was
        `switched_off` because it keeps failing."""
        self._webhooks[event] += 1

    def lost(self) -> None:
        """Count a loss of all leases."""
        self._lost += 1

    def holds(self, held: HeldLines, commits: Commits, windows: Mapping[str, Window]) -> None:
        """Report what a runner holds from now on."""
        if self._commits is not None:
            self._commits_before += self._commits.count
        self._held, self._commits, self._windows = held, commits, windows

    def collect(self) -> Iterable[Metric]:
        """Return the metrics for Prometheus."""
        lines = CounterMetricFamily("lmaas_batch_lines", "Lines of batches by what happened to them.", labels=["event"])
        for event, count in self._lines.items():
            lines.add_metric([event], count)
        steps = CounterMetricFamily("lmaas_batch_steps", "Validations and finalizations of batches by outcome.", labels=["step", "outcome"])
        for labels, count in self._steps.items():
            steps.add_metric(labels, count)
        responses = CounterMetricFamily(
            "lmaas_background_runs", "Runs of responses in the background by how they ended.", labels=["outcome"]
        )
        for outcome, count in self._responses.items():
            responses.add_metric([outcome], count)
        webhooks = CounterMetricFamily(
            "lmaas_webhook_attempts", "Attempts to send events to webhooks by what came of them.", labels=["outcome"]
        )
        switched_off = CounterMetricFamily("lmaas_webhooks_switched_off", "Webhooks that were switched off because they kept failing.")
        switched_off.add_metric([], self._webhooks["switched_off"])
        for event in ("delivered", "retried", "failed"):
            webhooks.add_metric([event], self._webhooks[event])
        lost = CounterMetricFamily("lmaas_job_leases_lost", "How often this runner was declared lost and began anew.", value=self._lost)
        groups = self._commits_before + (self._commits.count if self._commits is not None else 0)
        commits = CounterMetricFamily("lmaas_batch_commits", "Transactions that stored ends of lines.", value=groups)
        held = GaugeMetricFamily(
            "lmaas_batch_lines_held", "Leased lines by pool, and whether an engine works on them.", labels=["pool", "state"]
        )
        for (pool, state), count in Counter(
            (line.pool_id, "ended" if line.ended else "running" if line.runs else "waiting") for line in self._held or ()
        ).items():
            held.add_metric([pool, state], count)
        window = GaugeMetricFamily("lmaas_batch_lines_ahead", "Lines that should wait ahead of a pool's engines.", labels=["pool"])
        for pool, each in list(self._windows.items()):
            window.add_metric([pool], each.ahead)
        return [lines, steps, responses, webhooks, switched_off, lost, commits, held, window]
