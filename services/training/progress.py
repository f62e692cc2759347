"""What a person sees while a training run goes on, from the records that it writes."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from services.training.records import METRICS
from services.training.run_view import RunView, duration
from services.training.tail import Tail

POLL_S = 0.5
EVERY_S = 30.0

Clock = Callable[[], float]
Show = Callable[[list[str]], None]
"""Draws the view as it is, after some lines on what changed."""


def follow(
    output_dir: Path,
    total_steps: int,
    stop: threading.Event,
    console: Console,
    every_s: float = EVERY_S,
    clock: Clock = time.monotonic,
) -> None:
    """Show a run until `stop` is set, and sum it up: with a bar on a terminal, else by a line every so many seconds.

    A run that resumes may cut its records back, whether before or while they are followed; it is said where it went
    back to.
    """
    started_s = clock()
    tail, view = Tail(output_dir / METRICS), RunView(total_steps)
    view.take(tail.read())  # of an earlier life: what changed then is no news
    live = console.is_terminal and not console.is_dumb_terminal
    with _bar(view, console) if live else _lines(view, console, every_s, clock) as show:
        while not stop.wait(POLL_S):
            show(view.take(tail.read()))
        show(view.take(tail.read()))
    _print(console, view.summary(clock() - started_s))


@contextmanager
def _bar(view: RunView, console: Console) -> Iterator[Show]:
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TaskProgressColumn())
    bar = Progress(*columns, console=console, auto_refresh=False, expand=True)
    task = bar.add_task(view.place(), total=view.total_steps)
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def show(said: list[str]) -> None:
            for line in said:
                _print(console, line)
            bar.update(task, description=view.place(), completed=view.step)
            live.update(Group(bar, Text(view.figures())), refresh=True)

        show([])
        yield show


@contextmanager
def _lines(view: RunView, console: Console, every_s: float, clock: Clock) -> Iterator[Show]:
    """The first step is told at once."""
    last_step, told_step = view.step, view.step
    stepped_s = told_s = clock()
    silent = True

    def show(said: list[str]) -> None:
        nonlocal last_step, told_step, stepped_s, told_s, silent
        for line in said:
            _print(console, line)
        now_s = clock()
        if view.step != last_step:
            last_step, stepped_s = view.step, now_s
        first = silent and view.step != told_step
        if now_s - told_s < every_s and not first:
            return
        what = view.figures() if view.step != told_step else f"no step for {duration(now_s - stepped_s)}"
        _print(console, f"{view.place()}  {what}")
        told_step, told_s, silent = view.step, now_s, silent and not first

    yield show


def _print(console: Console, line: str) -> None:
    console.print(Text(line), soft_wrap=True)
