"""`shoal data check`: what it prints, and how it ends."""

import argparse
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from services import data_command
from services.cli import main
from services.training.data.formats import FORMATS
from services.training.data.problems import KEPT, DataError
from services.training.data.reading import OVERLONG
from services.training.data.training_data import TrainingData
from services.training.data.training_tokenizer import TrainingTokenizer
from tests.conftest import MakeCheckpoint

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello\x1b[2J"}]}
BAD = {"messages": [{"role": "bot", "content": "Hi"}]}

Run = Callable[..., int]


@pytest.fixture
def run(checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> Run:
    model = checkpoint("tiny")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    root = argparse.ArgumentParser("shoal")
    data_command.add_parser(root.add_subparsers(required=True))

    def command(*arguments: str | Path, model: Path = model) -> int:
        options = root.parse_args(["data", "check", "--model", str(model), *map(str, arguments)])
        return int(options.run(options))

    return command


def written(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_sound_data_are_summed_up(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "a.jsonl", GOOD, GOOD)
    assert run(path) == 0
    printed = capsys.readouterr().out
    assert f"{path}  messages  2 records\n2 samples, " in printed
    assert "longer than 1024 tokens: 0\n" in printed
    assert "problem" not in printed


def test_without_a_model_formats_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, text = written(tmp_path / "a.jsonl", GOOD, BAD, {"messages": []}, GOOD), tmp_path / "b.txt"
    text.write_text("words")
    assert main(["data", "check", str(path), str(text)]) == 1
    printed = capsys.readouterr().out
    assert f"{path}  messages  2 records\n{text}  text  1 record\nformats alone were checked" in printed
    assert f"{path}:2: messages[0].role" in printed
    assert f"{path}:3: messages" in printed
    assert main(["data", "check", str(text)]) == 0
    capsys.readouterr()
    assert main(["data", "check", str(path), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [problem["line"] for problem in report["problems"]] == [2, 3]
    assert (report["problem_count"], report["files"][0]["records"]) == (2, 2)


def test_samples_are_not_shown_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(written(tmp_path / "a.jsonl", GOOD)), "--show", "1"]) == 2
    assert "--show given without --model" in capsys.readouterr().err


def test_report_for_scripts_adds_up(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "a.jsonl", GOOD, GOOD, BAD)
    assert run(path, "--json", "--show", 1, "--sequence-length", 64) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["files"][0] | {"path": str(path), "format": "messages", "records": 2} == report["files"][0]
    assert (report["records"], report["samples"], report["problem_count"]) == (2, 2, 1)
    assert report["problems"][0]["line"] == 3
    assert report["problems"][0]["field"] == "messages[0].role"
    length = report["lengths"]["50"]
    assert report["tokens"] == 2 * length
    assert report["targets_share"] == report["targets"] / report["tokens"]
    assert report["packing_efficiency"] == pytest.approx(report["tokens"] / (64 * report["rows"]))
    [shown] = report["shown"]
    assert [piece["text"] for piece in shown["pieces"]] == ["<bos>User: Hi\n\nAssistant:", " Hello\x1b[2J<eos>"]
    assert [piece["learned"] for piece in shown["pieces"]] == [False, True]


def test_what_is_learned_is_marked_and_control_characters_are_written_out(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(written(tmp_path / "a.jsonl", GOOD), "--show", 5) == 0
    printed = capsys.readouterr().out
    assert "<bos>User: Hi\n\nAssistant:{+ Hello\\x1b[2J<eos>+}\n" in printed
    assert "\x1b" not in printed


def test_terminal_shows_what_is_learned_in_colour(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert run(written(tmp_path / "a.jsonl", GOOD), "--show", 1) == 0
    printed = capsys.readouterr().out
    assert "{+" not in printed
    assert "\x1b[1;32m Hello\\x1b[2J<eos>\x1b[0m" in printed


def test_every_problem_is_listed(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training, which names the first, sends people here for the others."""
    path = written(tmp_path / "a.jsonl", *[BAD] * (KEPT + 3))
    assert run(path, "--format", "messages") == 1
    printed = capsys.readouterr().out
    assert f"{KEPT + 3} problems\n{path}:1: messages[0].role: 'bot' given" in printed
    assert f"{path}:{KEPT + 3}: " in printed
    assert run(path, "--format", "messages", "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert [problem["line"] for problem in report["problems"]] == list(range(1, KEPT + 4))


def test_overlong_samples_are_problems_or_dropped(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello " * 40}]}
    path = written(tmp_path / "a.jsonl", GOOD, long)
    assert run(path, "--sequence-length", 40) == 1
    assert "longer than 40 tokens: 1\n" in capsys.readouterr().out
    assert run(path, "--sequence-length", 40, "--overlong", "drop") == 0
    assert "longer than 40 tokens: 1, 1 dropped\n" in capsys.readouterr().out


def test_a_token_that_the_model_lacks_is_named(
    run: Run, checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(checkpoint("tiny"), model, ignore=shutil.ignore_patterns("*.safetensors"))
    [z] = TrainingTokenizer.load(model).encode("z", add_special_tokens=False)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": z}))
    documents = written(tmp_path / "a.jsonl", {"text": "a"}, {"text": "z"})
    assert run(documents, model=model) == 1
    told = f"{documents}:2: text: the token 'z' has id {z}; the model has ids up to {z - 1} (vocab_size in its"
    assert told in capsys.readouterr().out
    (model / "config.json").unlink()  # nobody says what the model has
    assert run(documents, model=model) == 0


def test_keys_are_ignored(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "a.jsonl", {"prompt": "Hi", "source": "somewhere", **GOOD})
    assert run(path, "--ignore", "prompt") == 1
    assert f"{path}:1: source: unknown" in capsys.readouterr().out
    assert run(path, "--ignore", "prompt", "--ignore", "source") == 0


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_nothing_but_dropped_samples_is_a_problem(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], overlong: str
) -> None:
    path = written(tmp_path / "a.jsonl", GOOD)
    assert run(path, "--sequence-length", 2, "--overlong", overlong) == 1
    assert f"1 problem\n{path}:1: all samples are longer than 2 tokens and were dropped: " in capsys.readouterr().out


def test_wrong_use_ends_with_2(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "a.jsonl", GOOD)
    wrong: list[tuple[tuple[str | Path, ...], dict[str, Path], str]] = [
        ((tmp_path / "b.jsonl",), {}, "is not there"),
        ((path, "--sequence-length", "1"), {}, "at least 2"),
        ((path, "--show", "-1"), {}, "--show -1"),
        ((path,), {"model": tmp_path}, "tokenizer.json does not exist"),
    ]
    for arguments, more, words in wrong:
        assert run(*arguments, **more) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith("shoal: ")
        assert words in printed.err
        assert not printed.out
    with pytest.raises(SystemExit) as caught:
        run(path, "--format", "csv")
    assert caught.value.code == 2


def test_choices_are_those_of_the_reader() -> None:
    """They are written out in the command, which must not load the reader to know them."""
    assert set(data_command.FORMATS) == {"auto", *FORMATS}
    assert data_command.OVERLONG == OVERLONG


def test_the_command_that_a_run_names_lists_its_problems(
    checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, model = written(tmp_path / "bad.jsonl", GOOD, BAD, BAD), checkpoint("tiny")
    with pytest.raises(DataError) as refused:
        TrainingData.load(path, TrainingTokenizer.load(model), 300)
    (named,) = re.findall(r"`shoal (.*)` lists them", str(refused.value))
    words = {"FILE": str(path), "DIR": str(model)}
    assert main([words.get(word, word) for word in named.split()]) == 1
    out = capsys.readouterr().out
    assert "2 problems" in out
    assert "longer than 300 tokens: 0" in out
