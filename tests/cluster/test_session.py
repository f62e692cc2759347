"""The directory of a private Ray goes away, whoever still writes into it as it ends."""

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
