"""The command line, and `shoal bench`, which is the same one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import run
from bench.__main__ import main
from bench.options import CONTENDERS, OUTPUT, QUICK_OUTPUT, parse, service_hosts
from services import cli


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_a_whole_run_by_default() -> None:
    options = parse([])
    assert (options.contenders, options.batches, options.repeats) == (CONTENDERS, (1, 8, 32), 5)
    assert (options.prompt_tokens, options.decode_tokens, options.output) == (128, 32, OUTPUT)
    assert options.service_threads is None


def test_a_quick_run_has_a_file_of_its_own_and_no_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["--quick"]).output == QUICK_OUTPUT
    assert parse(["--quick", "--batch", "4,2,4"]).batches == (2, 4)
    assert "--report is for a whole run" in refused(capsys, "--quick", "--report")


def test_wrong_arguments_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--contenders vllm: use transformers, shoal-local" in refused(capsys, "--contenders", "shoal-2,vllm")
    assert "'0' is not a number of at least 1" in refused(capsys, "--batch", "1,0")
    assert "'x' is not a number" in refused(capsys, "--repeats", "x")
    assert "--contenders: ',' names nobody" in refused(capsys, "--contenders", ",")


def test_options_have_their_whole_names(capsys: pytest.CaptureFixture[str]) -> None:
    """A later option of the same beginning would break a shorter one."""
    assert "unrecognized arguments: --repeat 2" in refused(capsys, "--repeat", "2")


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").write_text("")
    assert parse(["--output", str(tmp_path / "there")]).output == tmp_path / "there"
    assert parse(["--output", str(tmp_path / "new" / "file.json")]).output.name == "file.json"
    assert f"--output {tmp_path}: it is a directory" in refused(capsys, "--output", str(tmp_path))
    beneath = tmp_path / "there" / "file.json"
    assert f"{tmp_path / 'there'} is a file; expected" in refused(capsys, "--output", str(beneath))


def test_any_number_of_hosts_can_take_part() -> None:
    assert parse(["--contenders", "shoal-16"]).contenders == ("shoal-16",)
    assert [service_hosts(name) for name in ("shoal-3", "shoal-0", "shoal-local", "transformers")] == [
        3,
        None,
        None,
        None,
    ]


def test_a_missing_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint", str(tmp_path / "none"), "--contenders", "shoal-local"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("bench: ")
    assert "does not exist" in lines[0]


def test_the_commit_is_read_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run takes half an hour, and the checkout may be another one at its end."""
    done: list[str] = []
    monkeypatch.setattr(run, "read_software", lambda: done.append("software"))
    monkeypatch.setattr(run.Checkpoint, "open", lambda directory: done.append("checkpoint"))
    with pytest.raises(AttributeError):
        run.measure(parse(["--contenders", "shoal-local"]), "", print)
    assert done == ["software", "checkpoint"]


def test_without_its_http_client_it_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['aiohttp'] = None; from bench.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "--contenders", "shoal-2", "--checkpoint", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.splitlines() == [
        "bench: aiohttp, which asks through HTTP, is not installed: pip install aiohttp, or `make env`"
    ]


def test_shoal_bench_hands_its_options_over(monkeypatch: pytest.MonkeyPatch) -> None:
    class Replaced(Exception):
        """What stands for the end of this program."""

    def execute(path: str, arguments: list[str]) -> None:
        raise Replaced(path, arguments)

    monkeypatch.setattr(os, "execv", execute)
    with pytest.raises(Replaced) as taken_over:
        cli.main(["bench", "--quick", "--port", "7", "--help"])
    command = [sys.executable, "-m", "bench", "--quick", "--port", "7", "--help"]
    assert taken_over.value.args == (sys.executable, command)
    assert "bench" in cli.parser().format_help()
