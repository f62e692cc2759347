"""Whose turn it is: nobody is always first, and neither is what is asked through HTTP."""

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from bench import run
from bench.contenders import Lineup, Turn
from bench.options import parse
from bench.results import LOCAL, PARALLEL
from bench.service import Door, Service
from bench.streams import Latencies, Streamed
from bench.summary import Collected
from bench.timing import Sample, Workload

SAMPLE = Sample(8, 1.0, 8, 1.0, ())


@dataclass
class Contender:
    name: str
    log: list[str]
    service: Service | None = None
    prompts: list[tuple[tuple[int, ...], ...]] = field(default_factory=list)

    @contextlib.contextmanager
    def turn(self) -> Iterator[Turn]:
        self.log.append(self.name)
        yield Turn(self._measure, list, self.service)

    def _measure(self, workload: Workload) -> Sample:
        if workload.decode_tokens != run.WARM_UP_TOKENS:
            self.log.append("tokens")
            self.prompts.append(workload.prompts)
        return SAMPLE


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[Contender]]:
    log: list[str] = []

    def measure_http(runner: asyncio.Runner, url: str, model: str, workload: Workload) -> Streamed:
        if workload.decode_tokens != run.WARM_UP_TOKENS:
            log.append("http")
        return Streamed(SAMPLE, Latencies((), ()))

    monkeypatch.setattr(run, "measure_http", measure_http)
    monkeypatch.setattr(run, "LATENCY_STREAMS", 1)
    monkeypatch.setattr(run._Repeats, "_idle", lambda self, service: log.append("idle"))
    contenders = [
        Contender("transformers", log),
        Contender(LOCAL, log),
        Contender(PARALLEL, log, Service("http://here", "m", 1, Door("here", ""), 1.0)),
    ]
    options = parse(["--batch", "2", "--repeats", "3"])
    with asyncio.Runner() as runner:
        repeats = run._Repeats(options, 100, Collected(), runner, lambda said: None)
        for repeat in range(options.repeats):
            repeats.repeat(Lineup(cast(Any, tuple(contenders)), None), repeat)
    return log, contenders


def test_each_repeat_begins_with_another(measured: tuple[list[str], list[Contender]]) -> None:
    names = [entry for entry in measured[0] if entry in ("transformers", LOCAL, PARALLEL)]
    assert names == ["transformers", LOCAL, PARALLEL, LOCAL, PARALLEL, "transformers", PARALLEL, "transformers", LOCAL]


def test_http_is_asked_second_and_first_in_turn(measured: tuple[list[str], list[Contender]]) -> None:
    log = measured[0]
    starts = [place for place, entry in enumerate(log) if entry == PARALLEL]
    turns = [log[start + 1 : start + 4] for start in starts]
    assert turns == [["tokens", "http", "idle"], ["http", "tokens", "idle"], ["tokens", "http", "idle"]]


def test_all_compute_the_same_prompts_and_each_repeat_others(measured: tuple[list[str], list[Contender]]) -> None:
    first, *others = [contender.prompts for contender in measured[1]]
    assert all(prompts == first for prompts in others)
    assert len(set(first)) == 3
