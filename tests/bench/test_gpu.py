"""The benchmark of one GPU, on a CPU with a scaled model: what it writes, prints and refuses."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_run
from bench.errors import BenchError
from bench.gpu_ceilings import measure_ceilings
from bench.gpu_options import parse
from bench.gpu_results import GpuResults, merge, read_results
from bench.gpu_shoal import GpuShoal, engine_limits
from bench.prompts import draw_workload
from bench.random_checkpoint import RandomCheckpoint, scaled_config
from bench.results import write_results

QUICK = (
    *("--device", "cpu", "--size", "scaled", "--batches", "2", "1", "--prompt-tokens", "20", "--long", "40"),
    *("--decode-tokens", "4", "--repeats", "2", "--copy-mib", "1", "--side", "64"),
)
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a README, in which the command runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text(f"# Above\n\n{gpu.BEGIN}\nold figures\n{gpu.END}\n\nbelow\n")
    return tmp_path


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> GpuResults:
    path = tmp_path_factory.mktemp("gpu") / "gpu.json"
    assert gpu.main([*QUICK, "--output", str(path)]) == 0
    return read_results(path)


def renamed(results: GpuResults, contender: str) -> GpuResults:
    run = results.runs[0]
    rows = tuple(row.model_copy(update={"contender": contender}) for row in run.rows)
    return GpuResults(runs=(run.model_copy(update={"rows": rows}),))


def test_ceilings_are_of_the_sizes_that_were_asked_for() -> None:
    ceilings = measure_ceilings("cpu", copy_bytes=1 << 16, side=32, repeats=3)
    assert (ceilings.copy_bytes, ceilings.side) == (1 << 16, 32)
    assert len(ceilings.copy_bytes_per_s.samples) == len(ceilings.product_flops_per_s.samples) == 3
    assert min(*ceilings.copy_bytes_per_s.samples, *ceilings.product_flops_per_s.samples) > 0


def test_every_workload_is_measured_and_its_shares_follow(measured: GpuResults) -> None:
    (run,) = measured.runs
    assert [(row.batch, row.prompt_tokens) for row in run.rows] == [(1, 20), (1, 40), (2, 20), (8, 40)]
    assert not run.failures
    assert run.device.name.endswith("(a CPU)")
    for row in run.rows:
        assert len(row.prefill_tokens_per_s.samples) == len(row.decode_tokens_per_s.samples) == 2
        flops = row.prefill_tokens_per_s.median * row.token_flops
        assert row.prefill_share == pytest.approx(flops / run.ceilings.product_flops_per_s.median)
        moved = row.decode_tokens_per_s.median / row.batch * row.step_bytes
        assert row.decode_share == pytest.approx(moved / run.ceilings.copy_bytes_per_s.median)


def test_the_report_is_a_table_between_the_markers(
    here: Path, measured: GpuResults, capsys: pytest.CaptureFixture[str]
) -> None:
    write_results(measured, here / "one.json")
    assert gpu.main(["--merge", "one.json", "--output", "all.json", "--report"]) == 0
    text = (here / "README.md").read_text()
    assert text.startswith(f"# Above\n\n{gpu.BEGIN}\n**A scaled model, 3 layers")
    assert text.endswith(f"\n{gpu.END}\n\nbelow\n")
    rows = re.findall(r"^\| (shoal, \S+ x \S+) \| .* % \| .* % \|$", text, re.MULTILINE)
    assert rows == ["shoal, 1 x 20", "shoal, 2 x 20", "shoal, 1 x 40", "shoal, 8 x 40"]
    assert "`python -m bench.gpu --device cpu" in text
    assert str(here) not in text
    assert "shoal, 8 x 40" in capsys.readouterr().out
    (here / "README.md").write_text("no markers\n")
    assert gpu.main(["--merge", "one.json", "--output", "all.json", "--report"]) == 1
    assert "has no lines <!-- gpu:start -->" in capsys.readouterr().err


def test_transformers_is_measured_with_the_same_workloads(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([*QUICK, "--long", "0", "--transformers", "--name", "ours", "--output", "gpu.json"]) == 0
    (run,) = read_results(here / "gpu.json").runs
    names = [(row.contender, row.batch) for row in run.rows]
    assert names == [("ours", 1), ("ours", 2), ("transformers", 1), ("transformers", 2)]
    assert all((row.how is None) == (row.contender == "ours") for row in run.rows)
    assert "transformers ran eagerly" in capsys.readouterr().out


def test_a_contender_that_fails_does_not_end_the_run(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing:
        def __init__(self, *_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore of it")

    monkeypatch.setattr(gpu_run, "GpuTransformers", Failing)
    assert gpu.main([*QUICK, "--long", "0", "--transformers", "--output", "gpu.json"]) == 0
    (run,) = read_results(here / "gpu.json").runs
    assert [row.batch for row in run.rows] == [1, 2]
    assert run.failures == ("transformers from its weights on: CUDA out of memory.",)
    assert "Not measured: transformers from its weights" in capsys.readouterr().out


def test_no_workload_begins_after_the_limit(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([*QUICK, "--limit-s", "0", "--output", "gpu.json"]) == 1
    assert read_results(here / "gpu.json").runs[0].failures == ("shoal from 1 x 20 on: 0 s were over before",)
    assert "Not measured: shoal from 1 x 20" in capsys.readouterr().out


def test_a_reused_prefix_is_no_prefill() -> None:
    config = scaled_config()
    shoal = GpuShoal(RandomCheckpoint(config, "cpu", torch.bfloat16, 0), engine_limits([(1, 40)], 2))
    workload = draw_workload("a", 1, 40, config.vocab_size, 2)
    assert shoal.measure(workload).prefill_tokens == 40
    with pytest.raises(BenchError, match="32 tokens of the prompts were not computed"):
        shoal.measure(workload)
    shoal.measure(draw_workload("b", 1, 40, config.vocab_size, 2))


def test_random_weights_give_ordinary_answers() -> None:
    config = scaled_config()
    shoal = GpuShoal(RandomCheckpoint(config, "cpu", torch.bfloat16, 0), engine_limits([(2, 40)], 16))
    answers = shoal.measure(draw_workload("a", 2, 40, config.vocab_size, 16)).answers
    assert answers[0] != answers[1]
    assert len(set(answers[0])) > 4  # one token all along is what NaN gives


def test_the_engine_has_room_for_the_largest_workload() -> None:
    limits = engine_limits([(1, 8192), (128, 1024)], 64)
    longest = 1 + 64 + 128 + 64
    assert limits.cache_blocks == 128 * -(-(1024 + longest) // limits.block_size)
    assert limits.max_length >= 8192 + 1 + 64 + 1 + 64
    assert limits.scheduler.running == 128


def test_several_runs_become_one_table(measured: GpuResults) -> None:
    whole = merge([measured, renamed(measured, "shoal-torch")])
    assert [run.rows[0].contender for run in whole.runs] == ["shoal", "shoal-torch"]
    with pytest.raises(BenchError, match="shoal with 1 prompts of 20 tokens was measured twice"):
        merge([measured, measured])
    run = measured.runs[0]
    other = run.model_copy(update={"rows": (), "device": run.device.model_copy(update={"name": "another"})})
    with pytest.raises(BenchError, match="the runs are of different things"):
        merge([measured, GpuResults(runs=(other,))])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--device", "tpu"), "argument --device: invalid choice: 'tpu'"),
        (("--batches", "1", "0"), "argument --batches: '0' is not a number of at least 1"),
        (("--long", "x"), "argument --long: 'x' is not a number of at least 0"),
        (("--layers", "40"), "--layers: 40 layers given; expected 2 to 27"),
        (("--transformers", "--merge", "a.json"), "--transformers is for a run: leave --merge out"),
        (("--output", "/dev/null/a.json"), "--output /dev/null/a.json: /dev/null is a file; expected a JSON file"),
    ],
)
def test_a_wrong_option_is_one_line(arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m bench.gpu: {said}")


def test_no_gpu_and_no_file_are_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--output", str(here / "gpu.json")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m bench.gpu: torch finds no CUDA device here")
    assert gpu.main(["--merge", "none.json"]) == 1
    assert "`python -m bench.gpu` writes it" in capsys.readouterr().err
    assert list(here.glob("*.json")) == []


def test_it_needs_no_ray_and_no_plots() -> None:
    absent = ("ray", "tensorboardX", "matplotlib", "nixl", "aiohttp", "transformers")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import bench.gpu"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
