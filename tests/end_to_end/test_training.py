"""`python -m services.train` on a Ray of its own: killed, frozen, told to stop and resumed, it has the same curve."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
import yaml

from model.checkpoint import Checkpoint
from tests.certificates import make_certificate
from tests.oracle import logits
from tests.serving import greedy, make_engine, run

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
STEPS = 40
WAIT_S = 400.0


def write_recipe(directory: Path, model: Path, **given: object) -> Path:
    data = directory / "data.jsonl"
    if not data.exists():
        turns = [("user", "say {n}"), ("assistant", "{n} and {m}")]
        records = [
            {"messages": [{"role": role, "content": text.format(n=n, m=n * 7 % 10)} for role, text in turns]}
            for n in range(40)
        ]
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
    recipe = {
        "model": str(model),
        "data": {"files": [str(data)], "sequence_length": 64},
        "steps": STEPS,
        "batch_tokens": 128,
        "micro_batch_tokens": 64,
        "lr": 1e-3,
        "snapshots": {"every_steps": 4},
        "workers": {"least": 2, "threads": 1},
        "experts": {"hosts": 2, "threads": 1},
        **given,
    }
    path = directory / f"{len(list(directory.glob('*.yaml')))}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@contextmanager
def training(
    recipe: Path, out: Path, *overrides: str, variables: Mapping[str, str] = MappingProxyType({})
) -> Iterator["subprocess.Popen[str]"]:
    """The command, under way, with no other variables of Ray's than these; what it started is ended with it."""
    command = [sys.executable, "-m", "services.train", str(recipe), f"output_dir={out}", *overrides]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment | dict(variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            for pid in [*(pid for pid, _ in descendants(process.pid)), process.pid]:
                os.kill(pid, signal.SIGKILL)
            process.wait(30)


def finish(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, output
    return output


def stop(process: "subprocess.Popen[str]", number: signal.Signals, out: Path) -> int:
    """A signal ends the run with a snapshot of the last step that it made; which that is."""
    process.send_signal(number)
    output, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 128 + number, output
    made = len(records(out))
    assert f"{made} of {STEPS} steps made; the same command goes on from there" in output
    assert (out / "snapshots" / f"step-{made:08}").is_dir()
    assert not [*out.glob("samples*")]  # nobody needs them any more
    return made


def end_all(process: "subprocess.Popen[str]", out: Path) -> None:
    """All processes at once, as systemd ends a service: Ray cannot be asked any more, nor any worker for a snapshot."""
    for pid in [*(pid for pid, _ in descendants(process.pid)), process.pid]:
        os.kill(pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 1, output
    assert "Ray has ended" in output
    assert not [*out.glob("samples*"), *out.glob("stop")]


def records(out: Path) -> list[dict[str, float]]:
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def curve(out: Path) -> list[tuple[float, float, float]]:
    found = records(out)
    assert [record["step"] for record in found] == list(range(1, len(found) + 1))
    return [(record["loss"], record["grad_norm"], record["epoch"]) for record in found]


def wait_for_step(out: Path, step: int, process: "subprocess.Popen[str]") -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not any(record["step"] >= step for record in records(out)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline_s, f"step {step} was not made in {WAIT_S:.0f} s"
        time.sleep(0.05)


def descendants(pid: int) -> list[tuple[int, str]]:
    """Process ids and command lines of everything below a process, the deepest first."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found: list[tuple[int, str]] = []
    waiting = [pid]
    while waiting:
        for child in children.get(waiting.pop(), []):
            waiting.append(child)
            try:
                line = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            found.append((child, line))
    return found[::-1]


def actors(process: "subprocess.Popen[str]", name: str) -> list[int]:
    return [pid for pid, line in descendants(process.pid) if line.startswith(f"ray::{name}")]


def hosts(process: "subprocess.Popen[str]") -> list[int]:
    """Expert actors that are hosts; the others stand by."""
    return [pid for pid in actors(process, "ExpertActor") if any(name.startswith("expert-") for name in threads(pid))]


def threads(pid: int) -> list[str]:
    """Names of a process's threads."""
    names: list[str] = []
    for task in Path(f"/proc/{pid}/task").glob("*/comm"):
        with suppress(OSError):  # it has ended
            names.append(task.read_text())
    return names


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def undisturbed(place: Path, checkpoint: Callable[[str], Path]) -> Path:
    out = place / "undisturbed"
    with training(write_recipe(place, checkpoint("mini")), out) as process:
        output = finish(process)
    assert f"wrote {out}/model" in output
    return out


def test_the_result_is_transformers_and_is_served(undisturbed: Path, checkpoint: Callable[[str], Path]) -> None:
    found = curve(undisturbed)
    assert len(found) == STEPS
    assert {record["workers"] for record in records(undisturbed)} == {2}
    assert found[-1][0] < 0.8 * found[0][0]
    model = undisturbed / "model"
    prompt = [5, 6, 7, 8, 9, 10]
    theirs = torch.log_softmax(logits(model, prompt)[-1], dim=-1)
    (answer,) = run(make_engine(model, 2), [greedy("a", prompt, 1, logprobs=20)]).values()
    assert answer.tokens == [int(theirs.argmax())]
    assert dict(answer.logprobs[0].top) == pytest.approx(
        {token: float(theirs[token]) for token in theirs.topk(20).indices.tolist()}, abs=1e-4
    )
    first = Checkpoint.open(checkpoint("mini")).tensor("model.norm.weight")
    assert not torch.equal(first, Checkpoint.open(model).tensor("model.norm.weight"))
    for name in ("loss.svg", "experts.svg", "tensorboard"):
        assert (undisturbed / name).exists()


def test_whatever_dies_and_however_it_is_stopped_the_curve_is_the_same(
    place: Path, undisturbed: Path, checkpoint: Callable[[str], Path]
) -> None:
    out, sessions = place / "disturbed", set(Path("/tmp").glob("shoal-ray-*"))
    tls = {name: str(value) for name, value in asdict(make_certificate(place)).items()}
    recipe = write_recipe(place, checkpoint("mini"), experts={"hosts": 2, "replicas": 2, "threads": 1, "tls": tls})
    with training(recipe, out) as process:
        wait_for_step(out, 3, process)
        os.kill(hosts(process)[0], signal.SIGKILL)
        wait_for_step(out, 5, process)
        os.kill(actors(process, "Controller")[0], signal.SIGKILL)
        wait_for_step(out, 7, process)
        os.kill(hosts(process)[0], signal.SIGSTOP)
        wait_for_step(out, 9, process)
        os.kill(actors(process, "RayTrainWorker")[0], signal.SIGKILL)
        wait_for_step(out, 12, process)
        made = stop(process, signal.SIGTERM, out)
    with training(recipe, out, "experts.replicas=1", "experts.hosts=1") as process:
        wait_for_step(out, made + 6, process)  # a snapshot lies between
        end_all(process, out)
    assert set(Path("/tmp").glob("shoal-ray-*")) == sessions
    with training(recipe, out, "experts.replicas=1", "experts.hosts=3") as process:
        output = finish(process)
    assert f"wrote {out}/model" in output
    assert curve(out) == curve(undisturbed)
    assert (out / "model" / "model.safetensors").read_bytes() == (
        undisturbed / "model" / "model.safetensors"
    ).read_bytes()
    assert any("host-" in str(record["hosts_lost"]) for record in records(out)[:7])
