"""The one thread of an expert host that computes: takes what all its clients sent, and answers it in one batch."""

import collections
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from experts.errors import HostRefused
from experts.host import ExpertHost
from experts.messages import ForwardReply, ForwardRequest
from experts.patience import Patience

MAX_SLEEP_S = 1.0
LONGEST_NAME = 15  # of a thread, in Linux
Answer = ForwardReply | HostRefused
log = logging.getLogger("shoal.experts")


class Job(Protocol):
    """A request to answer, from wherever it came."""

    @property
    def request(self) -> ForwardRequest: ...

    @property
    def out(self) -> Tensor | None:
        """Where y [P, D] is wanted, if that matters."""

    def settle(self, answer: Answer) -> None:
        """Send the answer; whoever asked may be gone, which is no error."""


class Source(Protocol):
    """Where jobs arrive that nobody puts in by hand. All but `ring` are called by the loop's thread."""

    def answer_alone(self, host: ExpertHost) -> bool:
        """Answer one request where it arrived, if that is all there is; False: see what `poll` has."""

    def poll(self) -> Sequence[Job]:
        """What has arrived, without waiting."""

    @property
    def rings(self) -> int:
        """How often somebody rang."""

    def wait(self, rings: int, idle_s: float, look_s: float, look: Callable[[], bool]) -> bool:
        """Until something may have arrived, or somebody rang since there were so many `rings`: whether it slept.

        When nothing has come for `idle_s` seconds it may sleep after `look_s` of these. Not at all when `look` finds
        something.
        """

    def ring(self) -> None:
        """End `wait` early."""


class NoSource:
    """For a host that is only asked by `HostLoop.submit`."""

    def __init__(self) -> None:
        self._rung = threading.Event()

    def answer_alone(self, host: ExpertHost) -> bool:
        return False

    def poll(self) -> Sequence[Job]:
        return ()

    @property
    def rings(self) -> int:
        return 0

    def wait(self, rings: int, idle_s: float, look_s: float, look: Callable[[], bool]) -> bool:
        if idle_s <= look_s:
            return False
        self._rung.wait(MAX_SLEEP_S)
        self._rung.clear()
        return True

    def ring(self) -> None:
        self._rung.set()


@dataclass(frozen=True, slots=True)
class _Submitted:
    request: ForwardRequest
    out: Tensor | None = None
    future: "Future[Answer]" = field(default_factory=Future)

    def settle(self, answer: Answer) -> None:
        self.future.set_result(answer)


class HostLoop:
    """Computes for one host. Requests that wait together are answered together, whoever sent them."""

    def __init__(self, host: ExpertHost, source: Source | None = None) -> None:
        self._host = host
        self._source: Source = source or NoSource()
        self._submitted: collections.deque[_Submitted] = collections.deque()
        self._closing = threading.Event()
        self._over = False  # who sees this refuses what it has submitted; who does not is seen by the loop at its end
        self._thread = threading.Thread(target=self._run, name=f"expert-{host.host_id}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: ForwardRequest) -> "Future[Answer]":
        """The answer to come; refused as `failed` when the loop ends before it."""
        job = _Submitted(request)
        self._submitted.append(job)
        self._source.ring()
        if self._over or not self._thread.is_alive():
            self._refuse_all("the host is closed")
        return job.future

    def close(self, timeout_s: float) -> bool:
        """Finish what is being computed and end; False when that takes longer than `timeout_s`."""
        self._closing.set()
        self._source.ring()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        _tell_name(self._thread.name)
        last_s = time.monotonic()
        slept = False
        patience = Patience()
        try:
            while True:
                rings = self._source.rings
                if self._closing.is_set():
                    break
                if self._answer_some():
                    patience.waited(slept)
                    slept = False
                    last_s = time.monotonic()
                    continue
                idle_s = time.monotonic() - last_s
                slept = self._source.wait(rings, idle_s, patience.look_s, self._look) or slept
        finally:
            self._over = True
            self._refuse_all("the host is closed")

    def _answer_some(self) -> bool:
        """Answer what there is; False when that is nothing."""
        if not self._submitted and self._source.answer_alone(self._host):
            return True
        jobs = self._source.poll()
        if self._submitted:
            jobs = [*jobs, *self._take_submitted()]
        if jobs:
            self._answer(jobs)
        return bool(jobs)

    def _take_submitted(self) -> Iterator[_Submitted]:
        while self._submitted:
            yield self._submitted.popleft()

    def _look(self) -> bool:
        return bool(self._submitted) or self._closing.is_set()

    def _answer(self, jobs: Sequence[Job]) -> None:
        try:
            answers: Sequence[Answer] = self._host.forward_batch(
                [job.request for job in jobs], [job.out for job in jobs]
            )
        except Exception as error:  # no memory, a device or a compiler that failed: the next may succeed
            log.exception("%s could not compute %d requests", self._host.host_id, len(jobs))
            answers = [HostRefused("failed", f"{self._host.host_id}: {error}")] * len(jobs)
        for job, answer in zip(jobs, answers, strict=True):
            job.settle(answer)

    def _refuse_all(self, reason: str) -> None:
        while self._submitted:
            try:
                job = self._submitted.popleft()
            except IndexError:  # another thread took the last
                return
            job.settle(HostRefused("failed", reason))


def _tell_name(name: str) -> None:
    """Name this thread to the system, too, whose tools then say which host a process is."""
    with contextlib.suppress(OSError):
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name[:LONGEST_NAME])
