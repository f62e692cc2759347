"""The outside of a contender's process: started once, paused while another is measured."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import TypeAdapter

from bench.errors import BenchError

T = TypeVar("T")
ANSWER_TIMEOUT_S = 1800.0
END_TIMEOUT_S = 10.0
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # transformers' own, between the lines that say how far the run is


class WorkerProcess:
    """`python -m MODULE ARGUMENTS...` with its own environment; answers through `bench.child`."""

    def __init__(self, module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self._module = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **QUIET, **environment},
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, name: str, payload: object, answer: TypeAdapter[T]) -> T:
        """Send one command and wait for its answer; raises BenchError when the process ended or is stuck."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = name.encode() + b" " + TypeAdapter[Any](type(payload)).dump_json(payload) + b"\n"
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise BenchError(f"{self._module} has ended: its own output says why") from None
        ready, _, _ = select.select([self._process.stdout], [], [], ANSWER_TIMEOUT_S)
        if not ready:
            raise BenchError(f"{self._module} did not answer {name!r} in {ANSWER_TIMEOUT_S:.0f} s")
        reply = self._process.stdout.readline()
        if not reply:
            raise BenchError(f"{self._module} ended while it answered {name!r}: its own output says why")
        return answer.validate_json(reply)

    def pause(self) -> None:
        """Keep it in memory without a thread that runs: a waiting OpenMP team may spin."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def stop(self) -> None:
        """End the process and wait for it."""
        if self._process.poll() is None:
            self.resume()
            self._process.terminate()
            try:
                self._process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
