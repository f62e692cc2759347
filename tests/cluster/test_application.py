"""A controller ends itself once its application is gone, or nobody trains any more."""

import asyncio
import itertools
import time
from collections.abc import Iterator

import pytest
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

from cluster import application
from cluster.application import wait_until_gone, wait_until_idle


class Serve:
    """Says at each question whether the application runs, or raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *says: bool | Exception) -> None:
        self.asked = 0
        self._says: Iterator[bool | Exception] = itertools.chain(says, itertools.repeat(False))
        monkeypatch.setattr(application, "applications", self)
        monkeypatch.setattr(application, "CHECK_S", 0.001)

    def __call__(self) -> list[str]:
        self.asked += 1
        said = next(self._says)
        if isinstance(said, Exception):
            raise said
        return ["shoal"] if said else ["another"]


def wait(busy: Iterator[bool], came: bool = True) -> None:
    asyncio.run(asyncio.wait_for(wait_until_gone("shoal", lambda: came, lambda: next(busy)), 20))


def test_serve_is_not_asked_while_a_worker_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    serve = Serve(monkeypatch)
    wait(itertools.chain([True] * 50, itertools.repeat(False)))
    assert serve.asked == application.MISSES


def test_it_is_gone_when_serve_has_said_so_some_times_without_a_break(monkeypatch: pytest.MonkeyPatch) -> None:
    serve = Serve(monkeypatch, False, False, True, False, RuntimeError("restarting"), False)
    wait(itertools.repeat(False))
    assert serve.asked == 7  # an answer that did not come changes nothing


def test_a_worker_that_comes_back_begins_the_count_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    serve = Serve(monkeypatch)
    wait(itertools.chain([False, False, True], itertools.repeat(False)))
    assert serve.asked == 2 + application.MISSES


def test_an_application_that_never_comes_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    serve = Serve(monkeypatch)
    monkeypatch.setattr(application, "COMES_S", 0.2)
    started_s = time.monotonic()
    wait(itertools.repeat(False), came=False)
    assert time.monotonic() - started_s > 0.2
    assert serve.asked == application.MISSES


def test_it_waits_as_long_as_somebody_is_there_and_a_while_longer() -> None:
    looks = itertools.chain([False, True, True], itertools.repeat(False))
    started_s = time.monotonic()
    asyncio.run(wait_until_idle(lambda: next(looks), 0.2))
    assert time.monotonic() - started_s >= 0.05 * 3 + 0.15


def test_nothing_runs_on_a_serve_that_was_shut_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve's own client would raise for ever, as it goes on asking the controller that it knew."""

    def nobody(name: str, namespace: str) -> None:
        assert (name, namespace) == (SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
        raise ValueError(f"Failed to look up actor with name '{name}'")

    monkeypatch.setattr(application.ray, "get_actor", nobody)
    assert application.applications() == set()
