"""The status that a training command ends with: one that a signal ended is told from one that failed."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from services import cli, train
from services.training import driver
from services.training.outcome import SNAPSHOTS, STOP, Outcome, write_outcome
from services.training.room import NodeRoom, Room
from services.training.trainer import TrainingFailed, TrainingUnfinished, last_word
from tests.training.small_run import small_run

MADE = "2 of 4 steps made; the same command goes on from there"
BEFORE = "stopped before a step was made; the same command goes on"
AT_ONCE = "ended at once; the same command goes on from the newest snapshot"

Run = Callable[..., tuple[int, str]]


@contextlib.contextmanager
def no_ray(*_: object) -> Iterator[None]:
    yield


@pytest.fixture
def run(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """A run whose training is another's to make: its command's status and what that says of it."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_run(checkpoint("mini"), tmp_path)))
    monkeypatch.setattr(driver, "ray_of_run", no_ray)
    monkeypatch.setattr(driver, "look", lambda _: Room((NodeRoom({"CPU": 9}, {"CPU": 9}),)))

    def begin(fit: Callable[[], object], name: str = "fit") -> tuple[int, str]:
        monkeypatch.setattr(driver, name, lambda *_: fit())
        capsys.readouterr()
        as_job, text = train.main([str(path)]), capsys.readouterr().err.strip()
        here, same = cli.main(["train", str(path)]), capsys.readouterr().err.strip()
        assert (here, same) == (as_job, text.replace("services.train:", "shoal:"))
        return as_job, text.removeprefix("services.train: ")

    return begin


def signals(*numbers: int, end: Exception | None = None) -> Callable[[], int]:
    """These come one after another; then it ends, by itself where `end` is None."""

    def fit() -> int:
        for number in numbers:
            os.kill(os.getpid(), number)
        if end is not None:
            raise end
        return 4

    return fit


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_a_signal_ended_has_the_signals_status(run: Run, number: int, status: int) -> None:
    assert run(signals(number, end=TrainingUnfinished(MADE))) == (status, MADE)
    assert run(signals(number, number)) == (status, AT_ONCE)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_so_has_one_that_it_ended_before_a_step(run: Run, tmp_path: Path, number: int, status: int) -> None:
    def look() -> Room:
        signals(number)()
        return Room((NodeRoom({"CPU": 9}, {"CPU": 9}),))

    assert run(look, "look") == (status, BEFORE)
    assert not (tmp_path / "out" / STOP).exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_signal_that_insists_is_the_one_that_counts(run: Run, number: int, status: int) -> None:
    first = {signal.SIGINT: signal.SIGTERM, signal.SIGTERM: signal.SIGINT}[signal.Signals(number)]
    assert run(signals(first, number)) == (status, AT_ONCE)


def test_a_signal_that_comes_while_ray_starts_counts_too(run: Run) -> None:
    def interrupted() -> contextlib.AbstractContextManager[None]:
        raise KeyboardInterrupt

    def exits() -> contextlib.AbstractContextManager[None]:
        raise SystemExit(signal.SIGTERM)  # Ray's own answer

    assert run(interrupted, "ray_of_run") == (130, AT_ONCE)
    assert run(exits, "ray_of_run") == (143, AT_ONCE)


def test_ctrl_c_while_the_data_are_read_ends_without_a_word(run: Run) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert run(interrupted, "preview") == (130, "")


def test_a_run_that_failed_has_status_1_whatever_it_was_asked(run: Run) -> None:
    for numbers in ((), (signal.SIGTERM,)):
        assert run(signals(*numbers, end=TrainingFailed("the loss is not finite"))) == (1, "the loss is not finite")


def test_a_run_whose_service_ends_has_status_1(run: Run) -> None:
    assert run(signals(end=TrainingUnfinished(MADE))) == (1, MADE)


def test_a_run_that_made_all_steps_has_status_0(run: Run) -> None:
    assert run(signals()) == (0, "")
    assert run(signals(signal.SIGTERM)) == (0, "")  # it came during the last step


def test_help_says_what_the_statuses_mean(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert train.main(["--help"]) == 2
    said = capsys.readouterr()
    for text in (said.out, said.err):
        for status in (0, 1, 2, 130, 143):
            assert f"\n  {status}  " in text


def test_a_run_that_was_asked_to_end_did_not_fail(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match="without a word") as failed:
        last_word(tmp_path, 4)
    assert not isinstance(failed.value, TrainingUnfinished)
    write_outcome(tmp_path, Outcome(failed="no room"))
    with pytest.raises(TrainingFailed, match=r"no room; the snapshots in .* are kept") as failed:
        last_word(tmp_path, 4)
    assert not isinstance(failed.value, TrainingUnfinished)
    write_outcome(tmp_path, Outcome(2))
    with pytest.raises(TrainingUnfinished, match=r"2 of 4 steps made; .* goes on from the beginning"):
        last_word(tmp_path, 4)
    (tmp_path / SNAPSHOTS / "step-00000001").mkdir(parents=True)
    with pytest.raises(TrainingUnfinished, match=r"2 of 4 steps made; .* goes on from step 1"):
        last_word(tmp_path, 4)
    write_outcome(tmp_path, Outcome(4))
    assert last_word(tmp_path, 4).steps == 4
