"""A private Ray: what it is told before it starts."""

from pathlib import Path

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
