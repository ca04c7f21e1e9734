"""docs/reference/metrics.md lists every metric of a controller."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lmaas.control.background import BackgroundFigures
from lmaas.control.status import Disk, Ledger, metrics
from lmaas.store.replicas import PoolFailures
from lmaas.store.usage import PoolWaste

PAGE = next(parent for parent in Path(__file__).parents if (parent / "docs").is_dir()) / "docs" / "reference" / "metrics.md"


def test_each_metric_of_a_controller_is_documented() -> None:
    pool = SimpleNamespace(model="base", queued=1, load=2, desired=1, observed=("ready",), start={"by": "plain", "total_ms": 1000})
    pool.background = BackgroundFigures(due_s=5, tokens_per_s=10.0)
    sweeper = SimpleNamespace(stored_bytes=5)
    file_sweeper = SimpleNamespace(stored=(3, 5))
    controller: Any = SimpleNamespace(active=True, moved=1, statuses={"mod_1": pool}, sweeper=sweeper, file_sweeper=file_sweeper)
    time: Any = SimpleNamespace(base_model="base", phase="busy", ms=1000, cost_microusd=1)
    ledger = Ledger([time], [PoolWaste("base", "put_back", 5)], {"validating": 1}, [PoolFailures("base", 1, 2)])
    found = {
        sample.name: set(sample.labels) for metric in metrics(controller, Disk(2, 1), ledger, {"base": 3}) for sample in metric.samples
    }
    section = PAGE.read_text().split("## Controllers\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| `(lmaas_\w+)` \|([^|]*)\|", section, re.MULTILINE)
    assert {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in rows} == found
