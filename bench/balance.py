"""`python -m bench.balance`: how evenly the balancer spreads routed experts, beside other placements.

Nothing is timed and everything is seeded. `--write` puts the tables into docs/balance.md.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bench.recorded_load import record_loads
from bench.report import markdown_table, replace_between
from bench.table import Table
from router.balance_quality import moves, owners_of, quality
from router.balancer import HostCapacity, balance
from router.holding import Holders, Holding
from router.placement import Owners

Loads = Mapping[int, Sequence[float]]
SEED, HOSTS, LAYERS = 2405_04434, 8, 12
DOCUMENT = Path("docs/balance.md")
BEGIN, END = "<!-- balance:start -->", "<!-- balance:end -->"
COLUMNS = ("", "mean", "worst", "hosts a group", "hosts a token", "copies", "loaded")

# github.com/deepseek-ai/EPLB, README: 12 experts in 4 groups; 16 slots on 2 nodes of 4 GPUs, two slots a GPU
EPLB_LOADS: Loads = {
    0: [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    1: [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
}
EPLB_SLOTS = {
    0: [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    1: [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
}


@dataclass(frozen=True, slots=True)
class Case:
    """Loads, and how their experts are chosen."""

    loads: Loads
    groups: int
    topk_group: int | None  # groups that a token chooses; None: any number
    hosts: tuple[HostCapacity, ...]

    @property
    def experts(self) -> int:
        return len(next(iter(self.loads.values())))

    def contiguous(self) -> dict[int, Owners]:
        """As a service begins: equal runs of experts."""
        runs: Owners = tuple((expert * len(self.hosts) // self.experts,) for expert in range(self.experts))
        return dict.fromkeys(self.loads, runs)

    def balanced(self, extra: int = 0, current: Mapping[int, Holders] | None = None) -> dict[int, Owners]:
        return balance(self.loads, self.hosts, self.groups, extra=extra, current=current)

    def row(self, name: str, owners: Mapping[int, Owners], current: Mapping[int, Holders] | None) -> tuple[str, ...]:
        found = quality(owners, self.loads, self.hosts, self.groups, self.topk_group)
        copies = sum(len(holders) for experts in owners.values() for holders in experts)
        return (
            name,
            f"{found.mean_imbalance:.2f}",
            f"{found.worst_imbalance:.2f}",
            f"{found.hosts_per_group:.2f}",
            f"{found.hosts_per_token:.2f}",
            f"{copies / len(owners):.0f}",
            "" if current is None else f"{moves(current, owners, self.hosts) / len(owners):.1f}",
        )


def hosts(count: int, limit: int | None = None) -> tuple[HostCapacity, ...]:
    return tuple(HostCapacity(f"host-{index}", max_experts=limit) for index in range(count))


def holders(case: Case, owners: Mapping[int, Owners]) -> Mapping[int, Holders]:
    return Holding.from_owners(owners, [host.id for host in case.hosts]).holders


def published() -> Table:
    """DeepSeek's example: their answer and ours, in the same 16 slots."""
    case = Case(EPLB_LOADS, 4, None, hosts(8, limit=4))
    theirs: dict[int, Owners] = {
        layer: tuple(
            tuple(slot // 2 for slot, held in enumerate(slots) if held == expert) for expert in range(case.experts)
        )
        for layer, slots in EPLB_SLOTS.items()
    }
    rows = [case.row("contiguous, no extra copies", case.contiguous(), None), case.row("EPLB", theirs, None)]
    rows.append(case.row("balancer", case.balanced(extra=4), None))
    return Table("DeepSeek's example, 12 experts in 4 groups, 8 hosts with 2 slots a layer", COLUMNS, tuple(rows))


def zipf(experts: int, exponent: float) -> Loads:
    """Loads that fall with the power of a rank; each layer's ranks are drawn anew."""
    generator = np.random.default_rng(SEED)
    falling = 1e5 / np.arange(1, experts + 1) ** exponent
    return {layer: generator.permutation(falling).tolist() for layer in range(LAYERS)}


def skewed() -> Iterator[Table]:
    """Loads as uneven as words are, in the shapes of both models."""
    for name, experts, groups, topk_group in (("V2", 160, 8, 3), ("V2-Lite", 64, 1, None)):
        for exponent in (0.5, 1.0, 1.2):
            case = Case(zipf(experts, exponent), groups, topk_group, hosts(HOSTS))
            yield Table(f"{name}, {HOSTS} hosts, Zipf loads of exponent {exponent}", COLUMNS, tuple(compared(case)))


def compared(case: Case) -> Iterator[tuple[str, ...]]:
    start = case.contiguous()
    current = holders(case, start)
    yield case.row("contiguous", start, None)
    for extra in (0, 8, 16):
        yield case.row(f"balancer, {extra} extra", case.balanced(extra, current), current)
    if case.groups > 1:
        for extra in (0, 16):
            free = balance(case.loads, case.hosts, 1, extra=extra, current=current)
            yield case.row(f"groups ignored, {extra} extra", free, current)


def recorded() -> Table:
    """What the router of a small model really chose."""
    found = record_loads()
    case = Case(found.loads, found.groups, found.topk_group, hosts(4))
    title = f"Recorded: the bundled model, {found.tokens} tokens of prompts, {case.experts} experts, 4 hosts"
    return Table(title, COLUMNS, tuple(compared(case)))


def drift() -> Table:
    """Every load changes by up to a fifth, and a host leaves or joins: what moves."""
    rows: list[tuple[str, ...]] = []
    for name, experts, groups in (("V2", 160, 8), ("V2-Lite", 64, 1)):
        case = Case(zipf(experts, 1.0), groups, None, hosts(HOSTS))
        current = holders(case, case.balanced(16))
        generator = np.random.default_rng(SEED)
        noisy = {
            layer: (np.array(loads) * generator.uniform(0.8, 1.2, experts)).tolist()
            for layer, loads in case.loads.items()
        }
        for change, later in (
            ("loads ± 20 %", replace(case, loads=noisy)),
            ("one host leaves", replace(case, hosts=case.hosts[:-1])),
            ("one host joins", replace(case, hosts=hosts(HOSTS + 1))),
        ):
            told, fresh = later.balanced(16, current), later.balanced(16)
            worst = []
            for owners in (owners_of(current, later.hosts), told, fresh):
                held = all(all(experts) for experts in owners.values())
                found = quality(owners, later.loads, later.hosts, groups) if held else None
                worst.append(f"{found.mean_imbalance:.2f}" if found else "")
            moved = [f"{moves(current, owners, later.hosts) / LAYERS:.1f}" for owners in (told, fresh)]
            rows.append((f"{name}, {change}", *worst, *moved))
    columns = ("", "as it was", "balancer", "from scratch", "loaded", "loaded from scratch")
    return Table("After a change: mean imbalance, and copies loaded a layer", columns, tuple(rows))


def tables() -> Iterator[Table]:
    yield published()
    yield from skewed()
    yield recorded()
    yield drift()


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.balance", description="The balancer beside other placements.")
    parser.add_argument("--write", action="store_true", help=f"write the tables into {DOCUMENT}, too")
    write: bool = parser.parse_args().write
    text = "\n\n".join(markdown_table(table) for table in tables())
    print(text)
    if write:
        DOCUMENT.write_text(replace_between(DOCUMENT, BEGIN, END, text), encoding="utf-8")


if __name__ == "__main__":
    main()
