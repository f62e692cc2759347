"""A private Ray: what it is told before it starts."""

import pytest

from cluster import session


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in session.UNWATCHED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_enable_metrics_collection", "1")
    session.keep_quiet()
    told = {name: session.os.environ.pop(name) for name in session.UNWATCHED}
    assert told == session.UNWATCHED | {"RAY_enable_metrics_collection": "1"}
