"""A private Ray: what it is told before it starts, and that its directory goes away, whoever still writes into it."""

from pathlib import Path

import pytest

from cluster import session


def test_what_is_made_anew_meanwhile_goes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "session"
    (directory / "logs").mkdir(parents=True)
    looks: list[float] = []

    def write_late(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) in (1, 3, 4):
            (directory / "runtime_resources").mkdir(parents=True)

    monkeypatch.setattr(session.time, "sleep", write_late)
    session.remove_for_good(directory)
    assert not directory.exists()
    assert len(looks) == 5 + session.QUIET_LOOKS - 1  # gone for the last time at the fifth look, and quiet since


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in session.UNWATCHED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_enable_metrics_collection", "1")
    session.keep_quiet()
    told = {name: session.os.environ.pop(name) for name in session.UNWATCHED}
    assert told == session.UNWATCHED | {"RAY_enable_metrics_collection": "1"}
