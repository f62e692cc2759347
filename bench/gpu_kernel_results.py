"""What `bench.gpu_kernels` found, as it lies in its JSON file, and its tables. Units are in the names."""

from collections.abc import Iterator, Sequence
from typing import Literal

from bench.gpu_results import Ceilings, Device
from bench.machine import Software
from bench.results import Model
from bench.table import Table

FORMAT = 1
USED = "*"
TORCH = "torch"  # its own product, in place of a tile


class KernelBits(Model):
    """Whether a tile's results are, bit by bit, those of the tile that is in use for one row."""

    what: str
    tile: str
    equal: bool
    difference: float  # the norm of it, by that of the results


class KernelTime(Model):
    """One call, the median over replays of a graph of calls."""

    what: str
    tile: str
    used: bool  # by kernels/gpu, when it is left to choose
    rows: int
    microseconds: float
    share: float  # of the ceiling that is nearer, 0 to 1
    ceiling: Literal["copy", "product"]


class KernelResults(Model):
    """One run on one device."""

    format: int = FORMAT
    started: str  # ISO 8601, UTC
    command: str
    software: Software
    device: Device
    ceilings: Ceilings
    bits: tuple[KernelBits, ...] = ()
    times: tuple[KernelTime, ...] = ()
    failures: tuple[str, ...] = ()  # what was not measured, and why


def tables(results: KernelResults) -> Iterator[Table]:
    """The bits of all; the times of each kernel that has several tiles; those of the others."""
    if results.bits:
        yield _of_bits(results.bits)
    by_what: dict[str, list[KernelTime]] = {}
    for each in results.times:
        by_what.setdefault(each.what, []).append(each)
    single = [each for times in by_what.values() if len({each.tile for each in times}) == 1 for each in times]
    for what, times in by_what.items():
        if not set(times) <= set(single):
            yield _of_times(f"{what}: microseconds and share of the ceiling; {USED}: in use", "tile", times)
    if single:
        yield _of_times("Others: microseconds and share of the ceiling", "what", single)


def plain(table: Table) -> str:
    """With its columns aligned."""
    lines = (table.columns, *table.rows)
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.columns))]
    told = [table.title]
    for first, *others in lines:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        told.append("  ".join(cells).rstrip())
    return "\n".join(told)


def _of_bits(bits: Sequence[KernelBits]) -> Table:
    cells = {(each.what, each.tile): _same(each) for each in bits}
    whats, tiles = (tuple(dict.fromkeys(key[part] for key in cells)) for part in (0, 1))
    rows = [(tile, *(cells.get((what, tile), "") for what in whats)) for tile in tiles]
    return Table("Bits, beside those of the first tile of each column", ("tile", *whats), tuple(rows))


def _same(bits: KernelBits) -> str:
    return "equal" if bits.equal else f"not equal, {bits.difference:.0e}"


def _of_times(title: str, first: Literal["tile", "what"], times: Sequence[KernelTime]) -> Table:
    counts = sorted({each.rows for each in times})
    cells = {(each.tile if first == "tile" else each.what, each.rows): _cell(each) for each in times}
    names = sorted(dict.fromkeys(name for name, _ in cells), key=lambda name: name == TORCH)  # last
    rows = [(name, *(cells.get((name, count), "") for count in counts)) for name in names]
    return Table(title, (first, *map(str, counts)), tuple(rows))


def _cell(time: KernelTime) -> str:
    mark = USED if time.used else " "
    return f"{time.microseconds:.{1 if time.microseconds < 1000 else 0}f} {100 * time.share:.0f}%{mark}"
