"""One run of `bench.gpu_kernels`: bits compared, kernels timed or only compiled, kept as they come."""

import contextlib
import statistics
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, groupby

import torch
from torch import Tensor
from triton import TritonError

from bench.gpu_ceilings import seconds
from bench.gpu_kernel_cases import Call, Case
from bench.gpu_kernel_results import KernelBits, KernelResults, KernelTime
from bench.gpu_results import Ceilings

REPEATS = 5  # of a graph, after some that do not count
SEED = 0
SAID_CHARACTERS = 160  # of what went wrong
Keep = Callable[[KernelResults], None]
Say = Callable[[str], None]


@contextlib.contextmanager
def told(case: Case, tell: Say) -> Iterator[None]:
    """A candidate that the compiler or the device refuses does not end the others; a device that is lost does."""
    try:
        yield
    except torch.AcceleratorError:
        raise
    except (RuntimeError, TritonError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = f"{case.what}, {case.tile or 'its one tile'}, {case.rows} rows"
        tell(f"{where}: {textwrap.shorten(first, SAID_CHARACTERS)}")


class KernelBenchmark:
    """One run: what it found so far is in `results`, and is kept after each kernel."""

    def __init__(self, results: KernelResults, in_time: Callable[[], bool], keep: Keep, say: Say) -> None:
        self.results = results
        self._in_time, self._keep, self._say = in_time, keep, say

    def compare(self, cases: Iterable[Case]) -> None:
        """The bits of the cases of a kernel, beside those of the first of them."""
        for what, same in groupby(cases, lambda case: case.what):
            base: list[Tensor] = []
            for case in self._until_late(what, same):
                with told(case, self._fail):
                    out = result(case)
                    base = base or [out]
                    self._found(bits=(*self.results.bits, compared(case, out, base[0])))
            self._end(f"{what}: bits compared")

    def measure(self, cases: Iterable[Case], timer: Callable[[Sequence[Call]], float]) -> None:
        """The time of each case; `timer` says how long a call takes, in seconds."""
        for what, same in groupby(cases, lambda case: case.what):
            for case in self._until_late(what, same):
                with told(case, self._fail):
                    torch.manual_seed(SEED)
                    taken_s = timer(case.make(case.work.calls))
                    self._found(times=(*self.results.times, time_of(case, taken_s, self.results.ceilings)))
            self._end(f"{what}: measured")

    def _until_late(self, what: str, cases: Iterable[Case]) -> Iterator[Case]:
        late = 0
        for case in cases:
            if self._in_time():
                yield case
            else:
                late += 1
        if late:
            self._fail(f"{what}: no time was left for {late} candidates")

    def _found(self, **found: object) -> None:
        self.results = self.results.model_copy(update=found)

    def _fail(self, text: str) -> None:
        self._say(text)
        self._found(failures=(*self.results.failures, text))

    def _end(self, text: str) -> None:
        self._keep(self.results)
        self._say(text)


def compile_part(cases: Iterable[Case], part: tuple[int, int], in_time: Callable[[], bool], say: Say) -> None:
    """Run every case of a part once. Those of one kernel and tile are in one part: they share what is compiled."""
    place, parts = part
    tiles: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        tiles.setdefault((case.what, case.tile), []).append(case)
    for case in chain.from_iterable(list(tiles.values())[place::parts]):
        if not in_time():
            say("the limit came first")
            break
        with told(case, say):
            case.make(1)[0]()
            torch.cuda.synchronize()


def compared(case: Case, out: Tensor, base: Tensor) -> KernelBits:
    wide, base_wide = out.double(), base.double()
    difference = float((wide - base_wide).norm() / base_wide.norm())
    return KernelBits(what=case.what, tile=case.tile, equal=torch.equal(out, base), difference=difference)


def result(case: Case) -> Tensor:
    """What the first call gives, of the same numbers for each case of a name."""
    torch.manual_seed(SEED)
    out = case.make(1)[0]()
    assert isinstance(out, Tensor)
    return out.clone()


def time_of(case: Case, taken_s: float, ceilings: Ceilings) -> KernelTime:
    """With the share of that ceiling which leaves less."""
    moved = case.work.cold_bytes + case.work.warm_bytes
    copy = moved / taken_s / ceilings.copy_bytes_per_s.median
    product = case.work.flops / taken_s / ceilings.product_flops_per_s.median
    return KernelTime(
        what=case.what,
        tile=case.tile,
        used=case.used,
        rows=case.rows,
        microseconds=1e6 * taken_s,
        share=max(copy, product),
        ceiling="copy" if copy >= product else "product",
    )


def graph_s(calls: Sequence[Call]) -> float:
    """Seconds of a call, when all are replayed as one graph: the median, by the device's own clock."""
    torch.cuda.synchronize()  # what the calls read was made on another stream
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return statistics.median(seconds("cuda", graph.replay, REPEATS)) / len(calls)
