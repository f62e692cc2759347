"""The benchmark of a GPU's kernels, where there is none: what it counts, what it tries, and what it says."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby

import pytest
import torch

pytest.importorskip("triton", reason="it is for Linux")

from triton.runtime.errors import OutOfResources

from bench import gpu_kernel_cases as products
from bench import gpu_kernel_steps as steps
from bench import gpu_kernels
from bench.gpu_kernel_cases import Call, Case, Product, Work, label
from bench.gpu_kernel_results import KernelResults, plain, tables
from bench.gpu_kernel_run import KernelBenchmark, compile_part, time_of
from bench.gpu_kernel_steps import Attention, attention_cases, row_cases
from bench.gpu_results import Ceilings, Device
from bench.machine import Software
from bench.spread import spread
from kernels.gpu import attention, tiles

CEILINGS = Ceilings(
    copy_bytes=1, copy_bytes_per_s=spread([4e12]), side=1, product_flops_per_s=spread([8e14])
)  # of the order of an H200's


@pytest.mark.parametrize(
    ("counted", "expected"),
    [
        (products.QUERY.work(8), (12_582_912, 81_920, 100_663_296)),
        (products.KV_A.work(1), (2_359_296, 5_248, 2_359_296)),
        (products.HEAD.work(1), (419_430_400, 413_696, 419_430_400)),  # its results are in fp32
        (products.GATE.work(1), (524_288, 8_448, 262_144)),
        (products.UP_KEY.work(2), (2_097_152, 40_960, 4_194_304)),
        (products.ROUTED.work(1), (103_809_024, 53_248, 103_809_024)),  # six experts of 17 MB
        (products.SHARED.work(8), (34_603_008, 65_536, 276_824_064)),
        (Attention("", 8, 1023, 1).work(), (9_437_184, 278_528, 285_212_672)),
        (Attention("", 2, 3, 2).work(), (11_520, 139_264, 626_688)),  # 4 + 5 keys, twice
    ],
)
def test_what_a_call_has_to_do_at_least_is_counted(counted: Work, expected: tuple[int, int, int]) -> None:
    """Bytes of weights or latents, bytes of rows, and FLOPs."""
    assert (counted.cold_bytes, counted.warm_bytes, counted.flops) == pytest.approx(expected, rel=1e-12)


def test_row_kernels_read_and_write_every_row_once() -> None:
    counted = {case.what: case.work.cold_bytes for case in row_cases() if case.rows == 8}
    assert counted == {
        "norm": 65_536,
        "rotate": 34_816,
        "write_latents": 20_544,
        "route": 2_624,
        "combine": 491_712,
        "places": 576,
    }


@pytest.mark.parametrize(
    ("asked", "calls"),
    [(Work(1 << 20), 256), (Work(1 << 30), 3), (Work(100), 512), (Work(1 << 20, flops=1e11), 20)],
)
def test_weights_are_so_many_that_no_cache_holds_them(asked: Work, calls: int) -> None:
    assert asked.calls == calls


def test_every_kernel_is_tried_as_it_is_used() -> None:
    chosen = {
        (products.HEAD.name, 8): tiles.tile_for(8, torch.bfloat16),
        (products.GATE.name, 8): tiles.tile_for(8, torch.float32),
        (products.ROUTED.name, 128): tiles.tile_for(12, torch.bfloat16),
        (products.SHARED.name, 128): tiles.tile_for(128, torch.bfloat16),
    }
    cases = [*products.product_cases(), *attention_cases(), *row_cases()]
    for key, same in groupby(cases, lambda case: (case.what, case.rows)):
        used = [case.tile for case in same if case.used]
        assert len(used) == 1, key
        assert key not in chosen or used == [label(chosen[key])]
    tried = {case.tile for case in cases}
    assert {label(tile) for tile in (*tiles.NARROW, tiles.WIDE)} <= tried
    assert any(tile.startswith("16x") for tile in tried)  # of another instruction on Hopper


def test_what_is_used_goes_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "capability", lambda: tiles.CRAMPED_DEVICES[0])
    used = next(case for case in products.HEAD.cases() if case.used)
    assert used.tile == label(tiles.CRAMPED[0]) != label(tiles.NARROW[0])


def test_bits_are_those_of_what_is_used_for_few_rows() -> None:
    for what, same in groupby(products.product_bit_cases(), lambda case: case.what):
        dtype = torch.float32 if what == products.GATE.name else torch.bfloat16
        assert next(same).tile == label(tiles.tile_for(1, dtype))
    assert next(steps.attention_bit_cases()).used


def test_no_case_is_there_twice() -> None:
    for cases in (products.product_cases(), products.product_bit_cases(), attention_cases(), row_cases()):
        names = [(case.what, case.tile, case.rows) for case in cases]
        assert len(names) == len(set(names))


def test_attention_has_its_own_splits_back() -> None:
    before = attention.SPLIT
    with steps.splits_of(32):
        assert attention.SPLIT == 32 != before
    assert before == attention.SPLIT


def test_a_share_is_of_the_nearer_ceiling() -> None:
    one = case("a", "16x16", flops=8e9, cold_bytes=4e6)
    limited = time_of(one, 2e-5, CEILINGS)
    assert (limited.ceiling, limited.share) == ("product", pytest.approx(0.5))
    limited = time_of(replace(one, work=Work(2e7, 2e7, 8e7)), 2e-5, CEILINGS)
    assert (limited.ceiling, limited.share) == ("copy", pytest.approx(0.5))
    assert limited.microseconds == pytest.approx(20)


def test_a_refused_candidate_is_told_and_does_not_end_the_run() -> None:
    said: list[str] = []
    benchmark = fresh(said)

    def timer(calls: Sequence[Call]) -> float:
        for call in calls:
            call()
        return 1e-5

    def too_large() -> None:
        raise OutOfResources(300_000, 232_448, "shared memory")

    cases = [case("a", "16x16"), case("a", "many", call=too_large), case("b", "16x16")]
    benchmark.measure(cases, timer)
    assert [time.what for time in benchmark.results.times] == ["a", "b"]
    (told,) = benchmark.results.failures
    assert told.startswith("a, many, 8 rows: out of resource: shared memory, Required: 300000")
    assert said == [told, "a: measured", "b: measured"]


def test_what_the_limit_leaves_out_is_told() -> None:
    benchmark = fresh([], in_time=lambda: not benchmark.results.times)
    benchmark.measure([case("a", "1"), case("a", "2"), case("b", "1")], lambda calls: 1e-5)
    assert len(benchmark.results.times) == 1
    assert benchmark.results.failures == (
        "a: no time was left for 1 candidates",
        "b: no time was left for 1 candidates",
    )


def test_bits_are_compared_with_the_first_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(products, "DEVICE", device)
    monkeypatch.setattr(products, "BITS_ROWS", 3)
    cases = list(Product("small", 20, 70, None, torch.float32, torch.float32).bit_cases())
    off = replace(cases[0], tile="off", make=lambda calls: [lambda: torch.ones(3, 20, device=device)])
    benchmark = fresh([])
    benchmark.compare([*cases, off])
    first, *others, last = benchmark.results.bits
    assert (first.tile, first.equal, first.difference) == (label(tiles.WIDE), True, 0.0)
    assert len(others) == len(products.WIDE) - 1
    assert all(each.difference < 1e-6 for each in others)
    assert not last.equal
    assert last.difference > 0.1
    (table,) = tables(benchmark.results)
    lines = plain(table).splitlines()
    assert lines[1].split() == ["tile", "small"]
    assert lines[2].endswith(" equal")
    assert "not equal, " in lines[-1]


def test_parts_compile_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    ran: list[list[str]] = []

    def cases(names: Iterable[str]) -> list[Case]:
        return [
            replace(case(name[0], name[1]), make=lambda calls, name=name: [lambda: ran[-1].append(name)])
            for name in names
        ]

    for part in range(2):
        ran.append([])
        compile_part(cases(["a1", "a2", "b1", "a1", "b2"]), (part, 2), lambda: True, print)
    assert ran == [["a1", "a1", "b1"], ["a2", "b2"]]


def test_tables_have_every_tile_and_mark_the_one_in_use() -> None:
    benchmark = fresh([])
    cases = [case("a", "16x16"), replace(case("a", "64x64"), rows=128, used=True), case("norm", "")]
    benchmark.measure(cases, lambda calls: 1e-5)
    of_a, others = map(plain, tables(benchmark.results))
    assert of_a.splitlines()[1:] == ["tile           8        128", "16x16  10.0 10%", "64x64             10.0 10%*"]
    assert others.splitlines()[1:] == ["what          8", "norm  10.0 10%"]


def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_kernels.main([]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == [
        "python -m bench.gpu_kernels: torch finds no CUDA device here, and these kernels are for nothing else"
    ]


@pytest.mark.parametrize("part", ["7", "3/3", "-1/3", "a/b"])
def test_a_part_that_is_none_is_refused(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_kernels.parse([f"--compile={part}"])
    assert "is not PART/PARTS" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_told_before_anything_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_kernels.parse(["--output", "/dev/null/a.json"])
    assert "--output /dev/null/a.json: /dev/null is a file; expected a JSON file" in capsys.readouterr().err


def case(what: str, tile: str, call: Call = lambda: None, flops: float = 8e8, cold_bytes: float = 2e6) -> Case:
    return Case(what, tile, False, 8, Work(cold_bytes, 2e6, flops), lambda calls: [call] * calls)


def fresh(said: list[str], in_time: Call = lambda: True) -> KernelBenchmark:
    results = KernelResults(
        started="",
        command="",
        software=Software(python="", packages={}, commit="", uncommitted_changes=False),
        device=Device(name="", memory_bytes=None, cuda=None, triton=None),
        ceilings=CEILINGS,
    )
    return KernelBenchmark(results, lambda: bool(in_time()), lambda results: None, said.append)
