"""Progress bars for long work. They are drawn on standard error, and only if that is a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lmaas.cli.context import Context

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, Task

#: The seconds of progress from which the rate is computed.
RATE_WINDOW_S = 60.0


@contextmanager
def byte_bar(context: Context, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show a bar with size, rate and time left during the block, which gets a function that counts bytes."""
    from rich.progress import DownloadColumn, TransferSpeedColumn

    with _progress(context, DownloadColumn(), TransferSpeedColumn()) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.update(task, advance=count)


@contextmanager
def count_bar(context: Context, what: str) -> Iterator[Callable[[str, int, int | None], None]]:
    """Show a bar with counts, rate and time left during the block, which gets a function that sets description, count and total."""
    from rich.progress import MofNCompleteColumn, ProgressColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        """The number of items per second."""

        def render(self, task: "Task") -> Text:
            """Return the rate as text."""
            return Text(rate_text(task.speed), "progress.data.speed")

    with _progress(context, MofNCompleteColumn(), Rate()) as progress:
        task = progress.add_task(what, total=None)
        yield lambda words, count, total: progress.update(task, description=words, completed=count, total=total)


def rate_text(per_s: float | None) -> str:
    """Return a rate in the unit in which it is easy to read."""
    if not per_s:
        return "-/s"
    return f"{per_s:.1f}/s" if per_s >= 1 else f"{per_s * 60:.1f}/min"


def _progress(context: Context, *middle: "ProgressColumn") -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    # The description gives way on a narrow terminal. It is a name that a user chose, so no markup is read in it.
    text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
    console = Console(stderr=True)
    columns = (text, BarColumn(bar_width=20), *middle, TimeRemainingColumn(compact=True))
    disabled = context.as_json or not console.is_terminal
    return Progress(*columns, console=console, transient=True, disable=disabled, expand=True, speed_estimate_period=RATE_WINDOW_S)
