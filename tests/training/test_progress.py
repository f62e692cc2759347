"""What is seen of a run while it goes on: the tail of its records, lines and bars made of them."""

import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from services.training.progress import follow
from services.training.records import METRICS, StepRecord
from services.training.report import RunLog
from services.training.run_view import RunView, duration
from services.training.tail import News, Tail
from tests.training.step_records import log_steps, record, rows

Action = Callable[[], object]


class Script(threading.Event):
    """Stands for both the event and the clock: each wait takes a second and does the next thing, and the last stops."""

    def __init__(self, *actions: Action) -> None:
        super().__init__()
        self.now_s = 100.0
        self._actions: Iterator[Action] = iter(actions)

    def wait(self, timeout: float | None = None) -> bool:
        self.now_s += 1.0
        for action in self._actions:
            action()
            return False
        return True


def idle() -> None:
    pass


def put(path: Path, records: list[StepRecord]) -> None:
    path.write_text("".join(one.to_json() + "\n" for one in records))


def followed(directory: Path, total_steps: int, *actions: Action, every_s: float = 10.0) -> list[str]:
    """Lines that are printed where there is no terminal."""
    script, out = Script(*actions), io.StringIO()
    follow(directory, total_steps, script, Console(file=out, width=40), every_s, lambda: script.now_s)
    return out.getvalue().splitlines()


# tail


def test_each_record_is_told_once_however_it_arrives(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    records = [record(step) for step in range(1, 4)]
    raw = "".join(one.to_json() + "\n" for one in records).encode()
    tail, told = Tail(path), []
    assert tail.read() == News(())
    for end in range(len(raw) + 1):
        path.write_bytes(raw[:end])
        news = tail.read()
        assert news.back_to is None
        assert len(told) + len(news.new) == raw[:end].count(b"\n")
        told += news.new
    assert told == records
    assert tail.read() == News(())


@pytest.mark.parametrize("back_to", range(5))
@pytest.mark.parametrize("again", [0, 1, 9])
def test_tail_says_which_step_the_run_went_back_to(tmp_path: Path, back_to: int, again: int) -> None:
    """Even where as many steps as before, or more, were made again before it looked."""
    log_steps(RunLog(tmp_path, 0), 1, 5)
    tail = Tail(tmp_path / METRICS)
    tail.read()
    log = RunLog(tmp_path, back_to)
    anew = [record(step, seconds=5.0) for step in range(back_to + 1, back_to + 1 + again)]
    for one in anew:
        log.append(one, rows(1))
    kept = tuple(record(step) for step in range(1, back_to + 1))
    assert tail.read() == News(tuple(anew), back_to, kept)
    log.append(last := record(back_to + again + 1), rows(1))
    assert tail.read() == News((last,))


def test_resumption_where_nothing_is_removed_is_no_news(tmp_path: Path) -> None:
    log_steps(RunLog(tmp_path, 0), 1, 5)
    with (tmp_path / METRICS).open("a") as file:
        file.write(record(6).to_json()[:40])
    tail = Tail(tmp_path / METRICS)
    assert len(tail.read().new) == 5
    log = RunLog(tmp_path, 5)
    assert tail.read() == News(())
    log_steps(log, 6, 6)
    assert tail.read() == News((record(6),))


def test_file_that_is_cut_in_place_or_gone_for_a_while_is_followed(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    records = [record(step) for step in range(1, 5)]
    put(path, records)
    tail = Tail(path)
    tail.read()
    put(path, records[:2])
    assert tail.read() == News((), 2, tuple(records[:2]))
    path.unlink()
    assert tail.read() == News(())
    put(path, records)
    assert tail.read() == News(tuple(records[2:]))


def test_line_that_is_no_record_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    path.write_text(f"{record(1).to_json()}\n\nnonsense\n{record(2).to_json()}\n")
    assert Tail(path).read() == News((record(1), record(2)))


# without a terminal


def test_run_is_told_by_a_line_now_and_then_and_one_at_the_end(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    made = iter(range(1, 25))

    def step() -> None:
        number = next(made)
        log.append(record(number, loss=2.0), rows(number))

    assert followed(tmp_path, 24, idle, *[step] * 24) == [
        "step 1/24  loss 2.0000  1,000 tokens/s  gradient norm 1.25  imbalance 1.50  dropped 1.5%  94 s left",
        "step 11/24  loss 2.0000  1,000 tokens/s  gradient norm 1.25  imbalance 1.50  dropped 1.5%  53 s left",
        "step 21/24  loss 2.0000  1,000 tokens/s  gradient norm 1.25  imbalance 1.50  dropped 1.5%  12 s left",
        "step 24/24 after 26 s: loss 2.0000, 2.0000 at step 1, 98,304 tokens",
    ]


def test_going_back_is_said_and_told_in_the_end(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    lines = followed(
        tmp_path,
        6,
        lambda: log_steps(log, 1, 5),
        lambda: RunLog(tmp_path, 3),
        lambda: log_steps(RunLog(tmp_path, 3), 4, 6),
        lambda: RunLog(tmp_path, 5),
    )
    assert lines[1:-1] == ["went back to step 3", "went back to step 5"]
    assert lines[-1].startswith("step 5/6 after 5 s: loss ")
    assert lines[-1].endswith(", 4.0000 at step 1, 20,480 tokens, went back 2 times")


def test_steps_made_again_otherwise_are_said(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)

    def again() -> None:
        resumed = RunLog(tmp_path, 3)
        for step in (4, 5, 6):
            resumed.append(record(step, seconds=5.0), rows(step))

    lines = followed(tmp_path, 6, lambda: log_steps(log, 1, 5), again)
    assert lines[1:-1] == ["went back to step 3"]
    assert "24,576 tokens, went back 1 time" in lines[-1]


def test_changes_of_the_cluster_are_said_at_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)

    def step(number: int, hosts: int, workers: int = 1, lost: tuple[str, ...] = ()) -> Action:
        return lambda: log.append(record(number, hosts=hosts, workers=workers, hosts_lost=lost), rows(1))

    lines = followed(
        tmp_path,
        5,
        step(1, 3),
        step(2, 1, lost=("expert-0", "expert-2")),
        step(3, 1),
        step(4, 2, workers=2),
        step(5, 1, lost=("[red]",), workers=2),
    )
    assert lines[1:-1] == [
        "step 2: lost expert-0, expert-2, 1 expert host left",
        "step 4: 2 expert hosts, before 1",
        "step 4: 2 workers, before 1",
        "step 5: lost [red], 1 expert host left",
    ]
    assert lines[-1].endswith("3 expert hosts lost")


def test_earlier_life_of_a_run_is_no_news(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log.append(record(1, hosts=4), rows(1))
    log.append(record(2, hosts=2, hosts_lost=("a", "b")), rows(1))
    log = RunLog(tmp_path, 2)
    lines = followed(tmp_path, 3, idle, lambda: log.append(record(3, hosts=2), rows(1)))
    assert [line[:8] for line in lines] == ["step 3/3"] * 2


def test_run_that_stands_still_says_so(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    lines = followed(tmp_path, 9, *[idle] * 12, lambda: log_steps(log, 1, 1), *[idle] * 21)
    assert [line.partition("  ")[::2] for line in lines[:-1] if "no step" in line] == [
        ("step 0/9", "no step for 10 s"),
        ("step 1/9", "no step for 10 s"),
        ("step 1/9", "no step for 20 s"),
    ]
    assert lines[1].startswith("step 1/9  loss 4.0000")


def test_run_without_a_step_is_summed_up(tmp_path: Path) -> None:
    assert followed(tmp_path / "missing", 9, idle) == ["no step made yet, after 2 s"]


def test_last_steps_are_seen_though_the_run_ends_at_once(tmp_path: Path) -> None:
    log_steps(RunLog(tmp_path, 0), 1, 2)
    log = RunLog(tmp_path, 2)

    class Ended(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            log_steps(log, 3, 4)
            return True

    out = io.StringIO()
    follow(tmp_path, 4, Ended(), Console(file=out))
    assert out.getvalue().splitlines()[-1].startswith("step 4/4 after 0 s")


# on a terminal


def test_bar_shows_place_and_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    log, out = RunLog(tmp_path, 0), io.StringIO()
    console = Console(file=out, force_terminal=True, color_system=None, width=100)
    script = Script(
        lambda: log_steps(log, 1, 2),
        lambda: log.append(record(3, hosts=2, hosts_lost=("expert-1",)), rows(3)),
        lambda: RunLog(tmp_path, 1),
    )
    follow(tmp_path, 4, script, console, clock=lambda: script.now_s)
    drawn = out.getvalue()
    for shown in ("step 0/4 ", "no step made yet", "step 2/4 ", "━", " 50%", "step 3/4 ", " 75%", "1,000 tokens/s"):
        assert shown in drawn
    assert "step 3: lost expert-1, 2 expert hosts left" in drawn
    assert drawn.index(" 75%") < drawn.index("went back to step 1") < drawn.rindex("step 1/4 ") < len(drawn)
    assert drawn.rstrip().endswith(", 4,096 tokens, 1 expert host lost, went back 1 time")


def test_terminal_that_cannot_move_its_cursor_gets_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    log, out = RunLog(tmp_path, 0), io.StringIO()
    script = Script(lambda: log_steps(log, 1, 2))
    follow(tmp_path, 2, script, Console(file=out, force_terminal=True, color_system=None), clock=lambda: script.now_s)
    assert [line[:8] for line in out.getvalue().splitlines()] == ["step 2/2"] * 2


# words


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.6, "60 s"),
        (119, "119 s"),
        (120, "2 min"),
        (149, "2 min"),
        (3569, "59 min"),
        (3599, "1 h 0 min"),
        (9000, "2 h 30 min"),
        (86340, "23 h 59 min"),
        (86399, "1 d 0 h"),
        (277200, "3 d 5 h"),
    ],
)
def test_durations_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_loss_and_time_left_are_means_over_the_last_steps() -> None:
    view = RunView(1000)
    view.take(News(tuple(record(step, loss=9.0, seconds=100.0) for step in range(1, 101))))
    view.take(News(tuple(record(step, loss=1.0 + step % 2, seconds=1.0) for step in range(101, 301))))
    loss = float(view.figures().split()[1])
    assert loss == pytest.approx(1.5, abs=0.05)
    assert view.figures().endswith("12 min left")
