"""The command: help that teaches, and one clear line when something is wrong."""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.spec import ServiceSpec
from kernels.native import native
from model.adapters.spec import LoraSpec
from services.app_args import service_spec
from services.cli import main, parser
from services.detach import again
from services.launch_options import LaunchError, LaunchOptions, application_args, check
from services.state import ServiceRecord, identity, read_record, remove_record, running_services, write_record
from tests.conftest import MakeCheckpoint
from tests.model.adapters import write_random


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a failing command prints."""
    assert main([str(argument) for argument in arguments]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("shoal: ")
    return lines[0]


def test_adapters_are_the_services_and_those_of_another_model_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    bundled: Path,
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
) -> None:
    specs: list[ServiceSpec] = []

    def build(launch: LaunchOptions, _: object) -> int:
        check(launch)
        specs.append(service_spec(application_args(launch, "a" * 24)))
        return 0

    monkeypatch.setattr("services.launch.serve_foreground", build)
    monkeypatch.chdir(tmp_path)
    spec = LoraSpec(2, 2.0, ("o_proj",), routed_experts=True)
    for name, base in (("ours", bundled), ("theirs", checkpoint("mini"))):
        write_random(tmp_path / name, base, spec)
    assert main(["serve", str(bundled), "--adapter", "ours", "--port", str(_free())]) == 0
    assert [spec.adapters for spec in specs] == [(str(tmp_path / "ours"),)]
    capsys.readouterr()  # of transformers, which wrote a checkpoint
    said = fails(capsys, "serve", bundled, "--adapter", "ours", "--adapter", "theirs", "--port", _free())
    assert f"{tmp_path / 'theirs'} does not fit the model" in said
    assert "o_proj.lora_A is [2, 32], expected [2, 512]" in said


@pytest.mark.parametrize("command", [[], ["serve"], ["chat"], ["status"], ["stop"], ["doctor"]])
def test_help_is_there_for_every_command(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "usage: shoal" in text
    assert "--port" in text or not command


@pytest.mark.parametrize(
    "command",
    [
        ["serve"],
        ["fly"],
        ["status", "--port", "x"],
        ["serve", "a", "--threads", "two"],
        ["serve", "a", "--gpus", "inf"],
        ["serve", "a", "--gpus", "nan"],
        ["stop", "--timeout", "nan"],
        ["plan", "a", "--host-memory", "9" * 400],
    ],
)
def test_a_wrong_command_line_exits_2(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2
    assert "usage: shoal" in capsys.readouterr().err


def test_serve_refuses_before_it_starts_anything(
    capsys: pytest.CaptureFixture[str], bundled: Path, tmp_path: Path, taken: int
) -> None:
    empty, wrong = tmp_path / "empty", tmp_path / "wrong"
    empty.mkdir()
    wrong.mkdir()
    (wrong / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    file = tmp_path / "file"
    file.write_text("x")
    assert "does not exist" in fails(capsys, "serve", tmp_path / "nowhere")
    assert "is a file; expected the directory" in fails(capsys, "serve", file)
    assert "config.json does not exist" in fails(capsys, "serve", empty)
    assert "expected ['DeepseekV2ForCausalLM']" in fails(capsys, "serve", wrong)
    assert "give --port" in fails(capsys, "serve", bundled, "--port", taken)
    assert "use 1 to 65535" in fails(capsys, "serve", bundled, "--port", 70000)
    assert "use 1 to 16" in fails(capsys, "serve", bundled, "--expert-hosts", 17)
    assert "use 1 to 16" in fails(capsys, "serve", bundled, "--expert-hosts", 0)
    assert "use 1 to 2" in fails(capsys, "serve", bundled, "--expert-replicas", 3)
    assert "at least 1" in fails(capsys, "serve", bundled, "--attention-replicas", 0)
    assert "set --api-key" in fails(capsys, "serve", bundled, "--host", "0.0.0.0")
    elsewhere = ("--host", "192.0.2.1", "--api-key", "a-secret-key")
    assert "--host 192.0.2.1 is no address of this machine" in fails(capsys, "serve", bundled, *elsewhere)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max-length", "0"],
        ["--max-length", "40000"],
        ["--cache-tokens", "-5"],
        ["--threads", "0"],
        ["--api-key", "short"],
        ["--gpus", "1.5"],
        ["--gpus", "-1"],
    ],
)
@pytest.mark.parametrize("detach", [[], ["--detach"]])
def test_values_out_of_range_are_refused_before_ray_starts(
    capsys: pytest.CaptureFixture[str], bundled: Path, arguments: list[str], detach: list[str]
) -> None:
    message = fails(capsys, "serve", bundled, "--port", _free(), *arguments, *detach)
    assert arguments[0].removeprefix("--").replace("-", "_") in message.replace("-", "_")


@pytest.mark.parametrize("given", [["--api-key", "a-secret-key"], ["--api-key=a-secret-key"]])
def test_a_key_is_not_shown_to_others_who_list_processes(given: list[str]) -> None:
    line = ["serve", "MODEL", *given, "--detach", "--port", "8100"]
    assert again(line) == ["serve", "MODEL", "--port", "8100"]


def test_a_secret_that_is_too_short_is_not_printed(
    capsys: pytest.CaptureFixture[str], bundled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = fails(capsys, "serve", bundled, "--port", _free(), "--api-key", "short")
    assert "--api-key or $SHOAL_API_KEY" in message
    monkeypatch.setenv("SHOAL_ADMIN_TOKEN", "brief")
    other = fails(capsys, "serve", bundled, "--port", _free())
    assert "$SHOAL_ADMIN_TOKEN" in other
    assert "at least 8 characters" in message
    assert "short" not in message
    assert "brief" not in other


@pytest.mark.parametrize("key", ["schlüssel", "from-a-file\n"])
@pytest.mark.parametrize("variable", ["SHOAL_API_KEY", "SHOAL_ADMIN_TOKEN"])
def test_a_key_that_cannot_be_sent_is_refused_by_whoever_would_take_or_send_it(
    capsys: pytest.CaptureFixture[str], bundled: Path, monkeypatch: pytest.MonkeyPatch, variable: str, key: str
) -> None:
    monkeypatch.setattr("services.launch.LocalCluster", None)
    monkeypatch.setenv(variable, key)
    command = ["chat", "hi"] if variable == "SHOAL_API_KEY" else ["status"]
    for line in (
        fails(capsys, "serve", bundled, "--port", _free()),
        fails(capsys, *command, "--address", "http://127.0.0.1:9"),
    ):
        assert "has characters that HTTP does not carry: use ASCII letters" in line
        assert key.strip() not in line


@pytest.mark.parametrize("detach", [[], ["--detach"]])
def test_a_state_directory_that_cannot_be_written_to_is_named(
    capsys: pytest.CaptureFixture[str],
    bundled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    detach: list[str],
) -> None:
    monkeypatch.setattr("services.launch.LocalCluster", None)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    said = fails(capsys, "serve", bundled, "--port", _free(), *detach)
    assert f"{tmp_path}/file/shoal cannot be written to (Not a directory): set XDG_STATE_HOME" in said
    (tmp_path / "state" / "shoal").mkdir(parents=True)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere that is not mounted read-only
    assert "(it is read-only)" in fails(capsys, "serve", bundled, "--port", _free(), *detach)


def test_a_missing_shard_is_named(capsys: pytest.CaptureFixture[str], bundled: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (broken / name).write_bytes((bundled / name).read_bytes())
    index = {"weight_map": {"model.embed_tokens.weight": "model-00001-of-00001.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "fetch that shard" in fails(capsys, "serve", broken)


@pytest.mark.parametrize(
    ("gpus", "hosts", "here", "needed"),
    [
        ("1", 3, 3, 4),
        ("2", 2, 5, 6),
        ("0.5", 2, 1, 2),
        ("0.3", 4, 1, 2),
        ("0.3", 2, 0, 1),
        ("1", 2, 3, 0),
        ("0.3", 2, 1, 0),
    ],
)
def test_gpus_that_are_not_here_are_refused(
    monkeypatch: pytest.MonkeyPatch, bundled: Path, gpus: str, hosts: int, here: int, needed: int
) -> None:
    """One worker beside the hosts; `needed` is 0 where they are enough."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: here)
    options = LaunchOptions(str(bundled), expert_hosts=hosts, gpus=float(gpus), port=_free())
    if not needed:
        check(options)
        told = application_args(options, "a" * 24)
        assert (told.experts.gpus, told.attention.gpus) == (float(gpus), float(gpus))
        return
    with pytest.raises(
        LaunchError, match=f"--gpus {gpus} for {hosts + 1} actors takes {needed} GPUs, and {here} are here"
    ):
        check(options)


@pytest.mark.parametrize("command", ["status", "stop", "chat"])
def test_commands_say_when_nothing_runs(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert "no service runs on port 8000; start one with `shoal serve MODEL`" in fails(capsys, command)


def test_a_record_of_a_dead_process_is_no_service(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    state = tmp_path / "state" / "shoal"
    state.mkdir(parents=True)
    record = {"port": 8000, "url": "http://127.0.0.1:8000", "pid": 2**22 + 1, "model": "m", "admin_token": "t"}
    (state / "8000.json").write_text(json.dumps(record))
    (state / "9000.json").write_text("{not json")
    assert "no service runs on port 8000" in fails(capsys, "status")
    assert not (state / "8000.json").exists()


def test_doctor_explains(capsys: pytest.CaptureFixture[str], bundled: Path, tmp_path: Path, taken: int) -> None:
    assert main(["doctor", str(bundled), "--json", "--port", str(_free())]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert {"python", "ray", "torch", "gpus", "port", "checkpoint", "memory"} <= {each["what"] for each in findings}
    assert all(finding["ok"] for finding in findings)
    assert main(["doctor", str(tmp_path), "--json", "--port", str(taken)]) == 1
    wrong = {finding["what"]: finding["detail"] for finding in json.loads(capsys.readouterr().out) if not finding["ok"]}
    assert set(wrong) == {"port", "checkpoint"}
    assert "config.json" in wrong["checkpoint"]


def test_kernels_that_cannot_serve_are_told_before_anything_starts(
    capsys: pytest.CaptureFixture[str], bundled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_KERNELS", "sse9")
    native.cache_clear()
    assert "SHOAL_KERNELS is 'sse9'; expected one of" in fails(capsys, "serve", bundled, "--port", _free())
    assert main(["doctor", str(bundled), "--json", "--port", str(_free())]) == 1
    wrong = {finding["what"]: finding["detail"] for finding in json.loads(capsys.readouterr().out) if not finding["ok"]}
    assert set(wrong) == {"kernels", "transport"}
    assert all("sse9" in detail for detail in wrong.values())
    native.cache_clear()


def _free() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_records_are_private(tmp_path: Path) -> None:
    record = ServiceRecord(8123, "http://127.0.0.1:8123", os.getpid(), "m", "secret", process=identity(os.getpid()))
    write_record(record)
    path = tmp_path / "state" / "shoal" / "8123.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert (read_record(8123), running_services()) == (record, [record])
    remove_record(8123)
    assert read_record(8123) is None


def test_a_process_that_has_only_the_number_of_a_service_is_none(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """As after a crash, when the number is another's; in a container, that of its only service is always 1."""
    write_record(ServiceRecord(8000, "http://127.0.0.1:8000", os.getpid(), "m", "secret"))
    assert read_record(8000) is not None
    path = tmp_path / "state" / "shoal" / "8000.json"
    boot, started = str(identity(os.getpid())).split()
    for other in (f"{boot} {int(started) - 1}", f"another {started}"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"process": other}))
        assert "no service runs on port 8000" in fails(capsys, "stop")
        assert not path.exists()
        write_record(ServiceRecord(8000, "http://127.0.0.1:8000", os.getpid(), "m", "secret"))
    assert identity(2**22 + 1) is None


@pytest.mark.parametrize("option", ["--det", "--expert-host=2"])
def test_abbreviations_are_refused(capsys: pytest.CaptureFixture[str], bundled: Path, option: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", str(bundled), option])
    assert ended.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train R.yaml --dry-run lr=1e-5 steps=3", ["lr=1e-5", "steps=3"]),
        ("train --dry-run R.yaml lr=1e-5", ["lr=1e-5"]),
        ("train R.yaml lr=1e-5 --dry-run steps=3", ["lr=1e-5", "steps=3"]),
        ("train R.yaml --dry-run", []),
        ("data check a.jsonl --model DIR b.jsonl", ["a.jsonl", "b.jsonl"]),
    ],
)
def test_words_and_options_may_be_mixed(line: str, words: list[str]) -> None:
    given = parser().parse_args(line.split())
    assert (given.overrides if "train" in line else given.file) == words


def test_a_missing_recipe_is_named_and_what_may_be_left_out_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train"])
    assert capsys.readouterr().err.endswith("the following arguments are required: RECIPE\n")


def test_an_option_that_is_none_is_refused_among_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "R.yaml", "--dryrun", "lr=1"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --dryrun" in capsys.readouterr().err
