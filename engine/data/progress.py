"""How far prepare is: bars on a terminal, now and then a line where standard error is a file (a job of a cluster)."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

LINE_EVERY_S = 60.0
Item = TypeVar("Item")


class RateColumn(TextColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.2f}/s" if task.speed else "")


class Progress:
    """Use as a context; `follow` hands on what comes and counts it. Not `shown`, it counts for nobody."""

    def __init__(self, shown: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        console = Console(stderr=True)
        self._lines = shown and not console.is_terminal
        columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), RateColumn(""))
        hidden = not (shown and console.is_terminal)
        self._bars = Bars(*columns, TimeRemainingColumn(), console=console, disable=hidden, transient=True)
        self._stack = ExitStack()

    def __enter__(self) -> "Progress":
        self._stack.enter_context(self._bars)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def follow(self, title: str, total: int, items: Iterator[Item]) -> Iterator[Item]:
        bar = self._bars.add_task(title, total=total, visible=total > 0)
        started = said = self.clock()
        for count, item in enumerate(items, 1):
            self._bars.advance(bar)
            now = self.clock()
            if self._lines and now - said >= LINE_EVERY_S:
                said = now
                print(_line(title, count, total, now - started), file=sys.stderr, flush=True)
            yield item


def _line(title: str, count: int, total: int, seconds: float) -> str:
    rate = count / seconds
    minutes = (total - count) / rate / 60
    return f"{title}: {count} of {total}, {rate:.2f}/s, {minutes:.0f} min left"
