"""Hours of faults under load: `python -m tests.end_to_end.soak --minutes 60`, or `--faults 200` one after another.

Waves of streams run without a pause. In one of them something is done to the service, at random but by a seed, and
every token and log-probability of every wave is compared with those of an undisturbed one. The report says how long
streams stood still, by kind of fault, and whether anything leaked. The exit status is 1 when a stream failed or
differed.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.checkpoints import SHAPES, write_checkpoint
from tests.end_to_end.clients import wait_until
from tests.end_to_end.deployment import Deployment
from tests.end_to_end.prompts import mixed_bodies
from tests.end_to_end.streams import run_streams

TOKENS = 64
Harm = Callable[[], object]


@dataclass(slots=True)
class Tally:
    """All waves with one kind of fault."""

    waves: int = 0
    failed: int = 0  # streams that ended with an error
    different: int = 0  # streams with another token or log-probability
    stalls_s: list[float] = field(default_factory=list)  # the longest of each stream after the fault

    def line(self, kind: str) -> str:
        stalls = sorted(self.stalls_s) or [0.0]

        def at(share: float) -> float:
            return stalls[min(len(stalls) - 1, int(share * len(stalls)))]

        return (
            f"{kind:34} {self.waves:5} {len(self.stalls_s):7} {self.failed:6} {self.different:9} "
            f"{at(0.5):8.2f} {at(0.99):8.2f} {stalls[-1]:8.2f}"
        )


class Soak:
    """One deployment, its expected answers, and what can be done to it."""

    def __init__(self, service: Deployment, model: str, streams: int, seed: int, only: str | None = None) -> None:
        """`only` names the one fault that is wanted."""
        self._service = service
        self._only = only
        self._bodies = mixed_bodies(model, streams, TOKENS)
        self._random = random.Random(seed)
        self._expected = [stream.answer for stream in run_streams(service.url, self._bodies)[0]]
        if any(answer[-1] for answer in self._expected):
            raise SystemExit(f"the undisturbed run failed: {self._expected}")
        self.tallies: dict[str, Tally] = {}
        self._faults()  # an unknown one is refused now, and not after the cycles

    def wave(self, kind: str, harm: Harm | None = None) -> float:
        """All streams once, with or without a fault midway; the longest that one stood still, seconds."""
        streams, began_s = run_streams(self._service.url, self._bodies, harm, after=0.2)
        tally = self.tallies.setdefault(kind, Tally())
        tally.waves += 1
        for stream, expected in zip(streams, self._expected, strict=True):
            tally.failed += stream.error is not None
            tally.different += stream.error is None and stream.answer != expected
        stalls_s = [stream.stall_s(began_s if harm is not None else 0.0) for stream in streams]
        tally.stalls_s += stalls_s
        return max(stalls_s)

    def fault(self) -> str:
        """A random fault, and the time until all is well again; a line about it."""
        replicas = self._service.status()["replicas"]
        name, harm = self._random.choice(self._faults())
        kind = f"{name}, {'replicas' if replicas > 1 else 'no replica'}"
        longest_s = self.wave(kind, harm)
        self.settle()
        return f"{kind}: {longest_s:.2f} s"

    def settle(self) -> None:
        """Until hosts, workers and a stand-by are there again, and no block is owned."""
        self._service.wait_ready(standby=True)
        wait_until(lambda: len(self._service.status()["attention_workers"]) == 2, 120)
        wait_until(lambda: not any(w["blocks_owned"] for w in self._service.status()["attention_workers"]), 30)

    def _faults(self) -> list[tuple[str, Harm]]:
        service, choice = self._service, self._random
        hosts = service.hosts()
        host = choice.choice(hosts)
        worker = choice.choice(service.status()["attention_workers"])
        replicas = 2 if service.status()["replicas"] == 1 else 1  # so that faults meet both
        faults: list[tuple[str, Harm]] = [
            ("host killed", lambda: os.kill(host["pid"], signal.SIGKILL)),
            ("host frozen for good", lambda: service.freeze(host["pid"], 60)),
            ("host frozen for 0.6 s", lambda: service.freeze(host["pid"], 0.6)),
            ("all hosts killed", lambda: [os.kill(each["pid"], signal.SIGKILL) for each in hosts]),
            ("attention worker killed", lambda: os.kill(worker["pid"], signal.SIGKILL)),
            ("controller killed", service.kill_controller),
            ("Serve's controller killed", lambda: os.kill(service.ray_process("ServeController"), signal.SIGKILL)),
            ("scaled", lambda: service.change("scale", hosts=choice.choice([2, 3, 4]))),
            ("replicas changed", lambda: service.change("replicas", replicas=replicas)),
            ("rebalanced", lambda: service.change("rebalance")),
        ]
        wanted = [fault for fault in faults if self._only in (None, fault[0])]
        if not wanted:
            raise SystemExit(
                f"--only {self._only!r} is no fault; expected one of {', '.join(name for name, _ in faults)}"
            )
        return wanted


def memory_mib(service: Deployment) -> dict[str, float]:
    """Resident memory by role, MiB."""
    report = service.status()
    roles = {
        "controller": [report["controller"]],
        "workers": report["attention_workers"],
        "hosts": report["expert_hosts"],
    }
    return {role: sum(_resident_mib(member["pid"]) for member in members) for role, members in roles.items()}


def _resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def cycles(soak: Soak, service: Deployment, count: int) -> None:
    """2 -> 4 -> 1 -> 3 -> 2, again and again, under load."""
    for _ in range(count):
        for hosts in (4, 1, 3, 2):
            soak.wave(f"scaled to {hosts}", lambda hosts=hosts: service.change("scale", hosts=hosts))  # type: ignore[misc]
    soak.settle()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="how long (default 60)")
    parser.add_argument("--every", type=float, default=60.0, metavar="S", help="seconds between faults (default 60)")
    parser.add_argument("--faults", type=int, metavar="N", help="so many faults one after another, whatever it takes")
    parser.add_argument("--cycles", type=int, default=20, metavar="N", help="of 2, 4, 1, 3, 2 hosts (default 20)")
    parser.add_argument("--streams", type=int, default=32, metavar="N", help="at once (default 32)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="FAULT", help="this one alone, such as 'host killed'")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = write_checkpoint(SHAPES["tiny"], Path(directory) / "tiny").path
        arguments = {"experts": {"hosts": 2, "threads": 1}, "attention": {"replicas": 2, "threads": 1}}
        with Deployment(path, **arguments) as service:
            soak = Soak(service, path.name, options.streams, options.seed, options.only)
            soak.settle()
            print(f"at the start: {members(service)}", flush=True)
            cycles(soak, service, options.cycles)
            print(f"after {options.cycles} cycles: {members(service)}", flush=True)
            run(soak, options)
            soak.settle()
            print(f"at the end: {members(service)}")
    print(f"\n{'fault':34} waves streams failed different   p50 s    p99 s    max s")
    for kind in sorted(soak.tallies):
        print(soak.tallies[kind].line(kind))
    bad = sum(tally.failed + tally.different for tally in soak.tallies.values())
    print(f"\n{'FAILED' if bad else 'all streams were exact'}: {bad} of all streams failed or differed")
    return 1 if bad else 0


def run(soak: Soak, options: argparse.Namespace) -> None:
    """Faults until the time, or their number, is up; calm waves between them."""
    ends_s, next_s, done = time.monotonic() + 60 * options.minutes, time.monotonic(), 0
    while done < options.faults if options.faults is not None else time.monotonic() < ends_s:
        if options.faults is not None or time.monotonic() >= next_s:
            next_s += options.every
            print(f"{time.strftime('%H:%M:%S')} {soak.fault()}", flush=True)
            done += 1
        else:
            soak.wave("nothing")


def members(service: Deployment) -> str:
    """What must not grow: actors, open files, memory, blocks."""
    report = service.status()
    actors = {role: len(report[role]) for role in ("expert_hosts", "attention_workers", "standby")}
    pids = [report["controller"]["pid"], *(worker["pid"] for worker in report["attention_workers"])]
    files = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)
    blocks = sum(worker["blocks_owned"] for worker in report["attention_workers"])
    mib = {role: round(value) for role, value in memory_mib(service).items()}
    return f"{actors}, {files} files, {blocks} blocks, MiB {mib}"


if __name__ == "__main__":
    sys.exit(main())
