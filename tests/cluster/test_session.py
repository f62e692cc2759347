"""A private Ray: what it is told before it starts, and who ends with it."""

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from cluster import session


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in session.UNWATCHED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_enable_metrics_collection", "1")
    session.keep_quiet()
    told = {name: session.os.environ.pop(name) for name in session.UNWATCHED}
    assert told == session.UNWATCHED | {"RAY_enable_metrics_collection": "1"}


def test_a_ray_that_lets_everybody_in_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    session.check_authentication()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ValueError, match="RAY_AUTH_MODE is 'disabled'"):
        session.LocalCluster("nobody")


def test_rays_token_is_its_users_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    session.keep_token()
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("secret")
    token.chmod(0o644)
    session.keep_token()
    assert token.stat().st_mode & 0o777 == 0o600


class Parts:
    """A Ray of two processes, one vital, and what watches it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.vital, self.lesser = (subprocess.Popen(["sleep", "60"]) for _ in range(2))
        self.over, self.asked, self.status = threading.Event(), threading.Event(), 0
        monkeypatch.setattr(session, "WATCH_S", 0.02)
        monkeypatch.setattr(session.LocalCluster, "abandon", lambda self: None)
        monkeypatch.setattr(session.os, "_exit", self._end)
        cluster = session.LocalCluster.__new__(session.LocalCluster)
        cluster._vital, cluster._others = ([os.pidfd_open(part.pid)] for part in (self.vital, self.lesser))
        cluster._guard = Mock()
        self.watching = cluster.end_process_with_it(self.over, lambda: 7, self.asked.is_set)

    def _end(self, status: int) -> None:
        self.status = status
        self.over.set()

    def ended(self, seconds: float = 20) -> bool:
        self.watching.join(seconds)
        return self.status == 7


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Parts]:
    made = Parts(monkeypatch)
    yield made
    made.over.set()
    made.watching.join(20)
    for part in (made.vital, made.lesser):
        part.kill()
        part.wait()


def test_a_process_ends_with_a_vital_part_of_its_ray(parts: Parts) -> None:
    assert not parts.ended(0.2)
    parts.vital.kill()
    assert parts.ended()


def test_a_process_that_was_asked_to_end_does_when_any_part_has_just_ended(parts: Parts) -> None:
    parts.asked.set()
    assert not parts.ended(0.2)
    parts.lesser.kill()
    assert parts.ended()


def test_a_lesser_part_that_ended_long_before_makes_no_end_disorderly(parts: Parts) -> None:
    parts.lesser.kill()
    assert not parts.ended(0.5)
    parts.asked.set()
    assert not parts.ended(0.3)
    parts.over.set()
    parts.watching.join(20)
    assert not parts.status
