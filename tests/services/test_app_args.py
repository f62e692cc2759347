"""Arguments of the Serve application: nested or dotted, and nothing unknown."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from services.app import build
from services.app_args import AppArgs
from services.replicas import secret


def test_dotted_and_nested_keys_mean_the_same() -> None:
    dotted = AppArgs.model_validate({"model": "m", "experts.hosts": "4", "attention.max_length": 99})
    nested = AppArgs.model_validate({"model": "m", "experts": {"hosts": 4}, "attention": {"max_length": 99}})
    assert dotted == nested
    assert dotted.experts.hosts == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"expert.hosts": 4}, "expert"),
        ({"experts.host": 4}, "host"),
        ({"experts.hosts": 0}, "greater than or equal to 1"),
        ({"experts": 3, "experts.hosts": 3}, "both as a whole"),
        ({"name": "shoal"}, "Extra inputs are not permitted"),  # it is the Serve application's
        ({"api_key": "short"}, "8 characters"),
        ({"api_key": "schlüssel"}, "use ASCII letters, digits and signs"),
        ({"admin_token": "from-a-file\n"}, "no space or line end"),
        ({"tls": {"certificate": "a"}}, "key"),
        ({"attention": {"max_length": 33, "cache_tokens": 32}}, "max_length is 33, and a worker's cache holds 32"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        AppArgs.model_validate({"model": "m"} | change)


def test_a_length_that_nobody_asked_for_ends_with_the_cache() -> None:
    assert AppArgs.model_validate({"model": "m", "attention": {"cache_tokens": 32}}).attention.cache_tokens == 32


def test_a_checkpoint_that_cannot_be_served_is_refused_when_built(bundled: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        build(AppArgs(model=str(tmp_path / "nowhere")))  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="the model has 16 experts"):
        build(AppArgs.model_validate({"model": str(bundled), "experts.hosts": 17}))
    files = {"certificate": tmp_path / "a", "key": tmp_path / "b", "root": tmp_path / "c"}
    with pytest.raises(ValueError, match="TLS file"):
        build(AppArgs.model_validate({"model": str(bundled), "tls": files}))


def test_a_key_of_the_environment_is_one_that_clients_can_send(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_API_KEY", "a key of letters, digits & signs: 1")
    assert secret("SHOAL_API_KEY") == "a key of letters, digits & signs: 1"
    for wrong in ("from-a-file\n", " a-key-with-a-space", "schlüssel"):
        monkeypatch.setenv("SHOAL_API_KEY", wrong)
        with pytest.raises(ValueError, match=r"^SHOAL_API_KEY has characters that HTTP does not carry") as refused:
            secret("SHOAL_API_KEY")
        assert wrong.strip() not in str(refused.value)
