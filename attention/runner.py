"""An engine in a thread of its own: requests come from any thread, updates go to callbacks."""

import threading
import time
from collections import deque
from collections.abc import Callable

from attention.engine import Engine, EngineStats
from attention.requests import GenerateRequest, Update

OnUpdate = Callable[[Update], None]
OnStepEnd = Callable[[], None]


class EngineThread:
    """Steps the engine while it has work, and sleeps when it has none.

    A request the engine refuses ends with one update whose finish_reason is "error"; nobody else notices.
    An exception out of a step is a defect, of this code or of its device: it is kept in `failure`, every request ends
    as "lost", so that it can be replayed elsewhere, and `alive` turns false so that a supervisor replaces the worker.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._wake = threading.Condition()
        self._submitted: deque[tuple[GenerateRequest, OnUpdate]] = deque()
        self._cancelled: deque[str] = deque()
        self._listeners: dict[str, OnUpdate] = {}
        self._flush: set[OnStepEnd] = set()
        self._closing = False
        self._busy_since: float | None = None
        self.failure: BaseException | None = None
        self.last_step_s: float | None = None  # monotonic clock
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self.failure is None

    @property
    def busy(self) -> bool:
        """Whether a request is there that has not ended."""
        return bool(self._submitted or self._listeners)

    @property
    def max_length(self) -> int:
        return self._engine.max_length

    def step_age_s(self) -> float | None:
        """Seconds that the running step has taken so far; None between steps."""
        since = self._busy_since
        return None if since is None else time.monotonic() - since

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def submit(self, request: GenerateRequest, on_update: OnUpdate) -> None:
        """Queue a request; `on_update` is called in the engine's thread, or here once that ends. It must not block."""
        self._engine.prepare(request)
        with self._wake:
            if not self._closing and self.failure is None:
                self._submitted.append((request, on_update))
                self._wake.notify()
                return
        on_update(Update(id=request.id, finish_reason="lost", error="this worker is shutting down"))
        self._end_step()

    def cancel(self, request_id: str) -> None:
        """Stop a request and free its blocks; it gets no further update."""
        with self._wake:
            self._cancelled.append(request_id)
            self._wake.notify()

    def add_step_listener(self, on_step_end: OnStepEnd) -> None:
        """Call `on_step_end` after each step's updates, so that they can be sent together."""
        with self._wake:
            self._flush = {*self._flush, on_step_end}

    def remove_step_listener(self, on_step_end: OnStepEnd) -> None:
        with self._wake:
            self._flush = self._flush - {on_step_end}

    def close(self, timeout_s: float = 10.0) -> None:
        """End every request as "lost" and stop the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while self._take_commands():
                self._busy_since = time.monotonic()
                self._deliver(self._engine.step())
                self.last_step_s = time.monotonic()
                self._busy_since = None
        except BaseException as error:
            self.failure = error
            raise
        finally:
            self._end_everything()

    def _take_commands(self) -> bool:
        """Apply what was asked, waiting while there is nothing to do; False when closing."""
        refused: list[Update] = []
        with self._wake:
            while not (self._closing or self._submitted or self._cancelled or self._engine.has_work):
                self._wake.wait()
            if self._closing:
                return False
            while self._submitted:
                request, on_update = self._submitted.popleft()
                try:
                    self._engine.submit(request)
                except ValueError as error:
                    on_update(Update(id=request.id, finish_reason="error", error=str(error)))
                    refused.append(Update(id=request.id))
                else:
                    self._listeners[request.id] = on_update
            while self._cancelled:
                request_id = self._cancelled.popleft()
                self._engine.cancel(request_id)
                self._listeners.pop(request_id, None)
        if refused:
            self._end_step()
        return True

    def _deliver(self, updates: list[Update]) -> None:
        for update in updates:
            listener = self._listeners.get(update.id)
            if update.finish_reason is not None:
                self._listeners.pop(update.id, None)
            if listener is not None:
                listener(update)
        if updates:
            self._end_step()

    def _end_step(self) -> None:
        for on_step_end in self._flush:
            on_step_end()

    def _end_everything(self) -> None:
        reason = "this worker is shutting down" if self.failure is None else f"engine failed: {self.failure!r}"
        with self._wake:
            self._closing = True
            pending = {request.id: on_update for request, on_update in self._submitted} | self._listeners
            self._submitted.clear()
            self._listeners.clear()
        for request_id, on_update in pending.items():
            on_update(Update(id=request_id, finish_reason="lost", error=reason))
        self._end_step()
