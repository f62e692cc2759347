"""`python -m bench.apart`: prefill where the expert host has cores of its own, as on another machine.

The attention side keeps to one half of the cores, a host with all experts to the other. Steps are computed whole, when
one side waits while the other computes, and as two halves in turn. `--report` writes the table into
docs/performance.md.
"""

import argparse
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from attention.decoder import Decoder, halving_rows
from attention.engine import Engine, EngineLimits
from bench.engine_run import measure_engine
from bench.errors import BenchError
from bench.host_process import host_process
from bench.options import CHECKPOINT
from bench.prompts import draw_workload
from bench.report import markdown_table, replace_between
from bench.spread import spread
from bench.table import Table
from cluster.threads import Share, keep_to, node_threads
from experts.client import ExpertClient
from experts.lease_transport import LeaseTransport
from experts.nixl import find_nixl, prepare_environment
from experts.static import StaticPlacement
from experts.transport_kinds import TransportKind
from experts.transports import open_transport
from kernels.threads import set_threads
from model.checkpoint import Checkpoint
from router.placement import initial_placement

BATCHES, PROMPT_TOKENS, REPEATS = (8, 32), 128, 5
PAIRING_S = 60.0
DOCUMENT = Path("docs/performance.md")
BEGIN, END = "<!-- apart:start -->", "<!-- apart:end -->"


def measure(path: Path, batches: Sequence[int], repeats: int) -> Table:
    """Prefill tokens/s of both ways, which take turns; raises BenchError on one core."""
    cores = os.sched_getaffinity(0)
    threads = node_threads() // 2
    if threads < 1:
        raise BenchError("this process has one core; each side needs one at least")
    here, there = (Share(threads, place, 2).cores(cores) for place in range(2))
    checkpoint = Checkpoint.open(path)
    config = checkpoint.config
    transport: TransportKind = "nixl" if find_nixl() is not None else "grpc"
    token = secrets.token_hex(16)
    prepare_environment()
    set_threads(threads)
    keep_to(there)  # which the host's process inherits
    with host_process("computing", path, transport, token, threads) as started:
        host = started.host
        keep_to(here)
        source = StaticPlacement(initial_placement(config, [host]))
        limits = EngineLimits()
        step, per_token, hidden = limits.scheduler.step_tokens, config.num_experts_per_tok, config.hidden_size
        way = open_transport(transport, token, None, step, per_token, hidden)
        try:
            if isinstance(way, LeaseTransport) and not way.wait_ready(host, PAIRING_S):
                raise BenchError("the host's process did not answer by NIXL")
            client = ExpertClient(way, source)
            engines = [
                Engine(Decoder(checkpoint, client, source, halve_from=rows), limits)
                for rows in (None, halving_rows(config))
            ]
            return _compare(engines, config.vocab_size, batches, repeats, threads)
        finally:
            way.close()


def _compare(engines: Sequence[Engine], vocabulary: int, batches: Sequence[int], repeats: int, threads: int) -> Table:
    rows: list[tuple[str, ...]] = []
    for batch in batches:
        rates: list[list[float]] = []
        for repeat in range(repeats + 1):
            workload = draw_workload(f"apart {batch} {repeat}", batch, PROMPT_TOKENS, vocabulary, 1)
            name = f"{batch}-{repeat}"
            rates.append([measure_engine(engine, workload, name).prefill_tokens_per_s for engine in engines])
        measured = rates[1:]  # the first warmed up
        whole, halved = (spread(each) for each in zip(*measured, strict=True))
        ratio = spread([after / before for before, after in measured])
        rows.append((str(batch), whole.text(0), halved.text(0), ratio.text(2)))
    title = f"Prefill tokens a second, attention and one expert host with {threads} core(s) each"
    return Table(title, ("prompts at once", "whole", "halves in turn", "ratio"), tuple(rows))


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser("python -m bench.apart", description="Prefill with a host on cores of its own.")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, metavar="DIR", help=str(CHECKPOINT))
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES, metavar="N", help="prompts at once (8 32)")
    parser.add_argument("--repeats", type=int, default=REPEATS, metavar="N", help=str(REPEATS))
    parser.add_argument("--report", action="store_true", help=f"write the table into {DOCUMENT}, too")
    options = parser.parse_args()
    if min(options.repeats, *options.batch) < 1:
        parser.error(f"--repeats {options.repeats} --batch {options.batch}: expected at least 1 each")
    try:
        if options.report:
            replace_between(DOCUMENT, BEGIN, END, "")  # which is found out before anything is measured
        text = markdown_table(measure(options.checkpoint, options.batch, options.repeats))
    except (BenchError, OSError, ValueError) as error:
        print(f"python -m bench.apart: {error}", file=sys.stderr)
        return 1
    print(text)
    if options.report:
        DOCUMENT.write_text(replace_between(DOCUMENT, BEGIN, END, text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
