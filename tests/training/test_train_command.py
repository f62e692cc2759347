"""`shoal train --dry-run`: what it shows, and that it refuses what the run refuses; `--submit`: what it sends."""

import argparse
import json
import math
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.checkpoint import Checkpoint
from model.config import read_config
from services import train_command
from services.commands import CommandError
from services.training.forecast import forecast
from services.training.recipe_file import load_recipe
from tests.conftest import MakeCheckpoint

Train = Callable[..., int]


@pytest.fixture
def train(checkpoint: MakeCheckpoint, tmp_path: Path) -> Train:
    """On ten lines of text, with `key=value` and options added."""
    lines = "".join(f'{{"text": "line {number} of some text"}}\n' for number in range(10))
    (tmp_path / "text.jsonl").write_text(lines)
    recipe = {
        "model": str(checkpoint("tiny")),
        "output_dir": str(tmp_path / "out"),
        "data": {"files": [str(tmp_path / "text.jsonl")], "sequence_length": 64},
        "batch_tokens": 64,
        "micro_batch_tokens": 64,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    root = argparse.ArgumentParser("shoal")
    train_command.add_parser(root.add_subparsers(required=True))

    def command(*arguments: str) -> int:
        options = root.parse_args(["train", str(tmp_path / "recipe.yaml"), *arguments])
        return int(options.run(options))

    return command


@pytest.fixture
def dry_run(train: Train) -> Train:
    return lambda *overrides: train(*overrides, "--dry-run")


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """Commands that were run, and their environments."""
    run: list[tuple[list[str], dict[str, str]]] = []

    def note(command: list[str], check: bool, env: dict[str, str]) -> SimpleNamespace:
        run.append((command, env))
        return SimpleNamespace(returncode=7)

    monkeypatch.setattr(train_command.subprocess, "run", note)
    return run


@pytest.fixture
def submit(train: Train) -> Callable[[], int]:
    return lambda: train("steps=7", "--submit")


def test_an_address_that_is_no_url_is_named(train: Train, submitted: list[object]) -> None:
    with pytest.raises(CommandError, match="--address head: expected a URL, such as http://"):
        train("steps=1", "--submit", "--address", "head")
    assert not submitted


def test_a_directory_that_cannot_be_made_is_named(train: Train, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CommandError, match=r"output_dir .*file/out cannot be made \(Not a directory\): give another"):
        train("steps=1", f"output_dir={tmp_path / 'file' / 'out'}")


def test_the_steps_and_the_data_are_counted(dry_run: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run("steps=7") == 0
    printed = capsys.readouterr().out
    assert "# steps             7\n# a step            64 tokens, 1 micro-batches a worker\n" in printed
    assert "# data              10 samples, " in printed
    assert dry_run("epochs=2", "batch_tokens=4096") == 0
    assert "# steps             2\n" in capsys.readouterr().out


def test_parameters_and_the_memory_of_each_actor_are_shown(
    dry_run: Train, checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry_run("steps=7") == 0
    printed = capsys.readouterr().out
    sizes = [math.prod(entry.shape) for entry in Checkpoint.open(checkpoint("tiny")).entries.values()]
    assert f"# parameters        {sum(sizes):,}: " in printed
    assert f"# trained           {sum(sizes):,}: " in printed
    (host,) = re.findall(r"# each expert host  (\S+ \S+) for weights, gradients and optimizer, of 2, and some", printed)
    needs = forecast(load_recipe(tmp_path / "recipe.yaml", ["steps=7"]), read_config(checkpoint("tiny")))
    assert host == f"{needs.host_bytes / 2**20:.1f} MiB"
    assert "0.0 MiB" not in printed


@pytest.mark.parametrize(("nbytes", "said"), [(3 << 30, "3.00 GiB"), (1 << 30, "1.00 GiB"), (9 << 20, "9.0 MiB")])
def test_sizes_are_in_the_unit_that_says_something(nbytes: int, said: str) -> None:
    assert train_command._size(nbytes) == said


def test_every_stage_is_shown(dry_run: Train, capsys: pytest.CaptureFixture[str]) -> None:
    stages = "batch_stages=[{from_step: 0, tokens: 64}, {from_step: 5, tokens: 2048}]"
    assert dry_run("steps=7", "batch_tokens=4096", stages) == 0
    assert capsys.readouterr().out.endswith(
        "# steps             7\n"
        "# from step 0       64 tokens, 1 micro-batches a worker\n"
        "# from step 5       2,048 tokens, 32 micro-batches a worker\n"
    )


def test_what_is_printed_is_the_recipe(dry_run: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run("epochs=2", "lr=1e-4", "method=esft", "esft.share=0.3") == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    again = load_recipe(tmp_path / "printed.yaml", [])
    assert again == load_recipe(tmp_path / "recipe.yaml", ["epochs=2", "lr=1e-4", "method=esft", "esft.share=0.3"])


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("data.files=[none.jsonl]", "none.jsonl is not there"),
        ("data.sequence_length=8", "tokens; the context is 8"),
        ("experts.hosts=17", "experts.hosts is 17"),
        ("experts.tls={certificate: /none/a, key: /none/b, root: /none/c}", "TLS file /none/b: No such file"),
        ("model=/none", "/none does not exist"),
        ("warmup_steps=50", "warmup_steps is 50 and the run has"),
    ],
)
def test_what_the_run_refuses_is_refused(
    dry_run: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, told: str
) -> None:
    with pytest.raises(CommandError, match=told):
        dry_run("epochs=2", override)
    assert not capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_keys_are_ignored(dry_run: Train, tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text('{"text": "some text", "source": "somewhere"}\n')
    more = f"data.files=[{tmp_path}/more.jsonl]"
    with pytest.raises(CommandError, match=r"more\.jsonl:1: source: unknown"):
        dry_run("steps=7", more)
    assert dry_run("steps=7", more, "data.ignore=[source]") == 0


@pytest.fixture
def bare(checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A model without weights."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in checkpoint("tiny").glob("*.json"):
        if "index" not in file.name:
            (bare / file.name).write_bytes(file.read_bytes())
    return bare


def test_a_token_that_the_model_lacks_is_refused(dry_run: Train, bare: Path) -> None:
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(config | {"vocab_size": 80}))  # single letters up to n
    with pytest.raises(
        CommandError, match=r"text\.jsonl:1: text: the token .* has id \d+; the model has ids up to 79 "
    ):
        dry_run("steps=7", f"model={bare}", "init=random")


def test_weights_that_are_missing_are_missed_unless_they_are_drawn(dry_run: Train, bare: Path) -> None:
    assert dry_run("steps=7", f"model={bare}", "init=random") == 0
    with pytest.raises(CommandError, match="safetensors"):
        dry_run("steps=7", f"model={bare}")


@pytest.mark.parametrize("mode", [None, "disabled"])
def test_what_is_submitted_is_what_is_printed(
    submit: Callable[[], int],
    submitted: list[tuple[list[str], dict[str, str]]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    mode: str | None,
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if mode is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    assert submit() == 7
    [(command, environment)] = submitted
    printed = shlex.split(capsys.readouterr().out)
    if mode is None:
        assert printed.pop(0) == "RAY_AUTH_MODE=token"
    assert environment["RAY_AUTH_MODE"] == (mode or "token")
    assert (printed[0], printed[1:]) == (Path(command[0]).name, command[1:])
    assert printed[printed.index("--") + 1 :][:3] == ["python", "-m", "services.train"]


ODD = [
    "data.files=[it's.jsonl]",
    "a=$HOME/x",
    "a=`x`",
    "a={b: 1, c: '$d'}",
    'a="b c"',
    "a=b;c&d|(e)<f>",
    "a=*?[b]",
    "~/x",
]


@settings(max_examples=30)
@example(words=ODD)
@given(words=st.lists(st.text(st.sampled_from("ab= \t\"'\\$`;*~#!&[]{}"), min_size=1), min_size=1))
def test_a_job_has_the_words_that_were_given(words: list[str]) -> None:
    """Through what Ray makes one line of them with, and the shell that reads it."""
    options = argparse.Namespace(recipe=Path("recipe.yaml"), overrides=words, address="http://h:1")
    command = train_command.job_command(options)
    _, _, _, *entry = command[command.index("--") + 1 :]
    line = subprocess.list2cmdline(["printf", r"%s\\0", *entry])
    read = subprocess.run(line, shell=True, check=True, capture_output=True, text=True).stdout
    assert read.split("\0") == ["recipe.yaml", *words, ""]


def test_a_job_that_is_stopped_has_time_for_a_snapshot(
    submit: Callable[[], int], submitted: list[tuple[list[str], dict[str, str]]]
) -> None:
    submit()
    [(command, _)] = submitted
    environment = json.loads(command[command.index("--runtime-env-json") + 1])["env_vars"]
    assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60  # a step and a snapshot take some
