"""A directory of one run is not taken for another's: finished results, and first weights drawn at random."""

import contextlib
import errno
import io
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from cluster.spec import ServiceSpec
from model.checkpoint import Checkpoint
from model.snapshots.attempt import begin
from services.training import driver
from services.training.directory import alone_in
from services.training.driver import first_weights, preview, train
from services.training.identity import identify
from services.training.initial import initial_checkpoint
from services.training.outcome import STOP, Outcome, read_outcome, tell, told, write_outcome
from services.training.recipe import Recipe, parse_recipe
from services.training.room import NodeRoom, Room
from services.training.session import ServiceUnusable
from services.training.trainer import TrainingFailed
from tests.training.small_run import small_run

Make = Callable[..., Recipe]


@pytest.fixture
def make(checkpoint: Callable[[str], Path], tmp_path: Path) -> Make:
    raw = small_run(checkpoint("mini"), tmp_path)

    def recipe(**given: object) -> Recipe:
        return parse_recipe(raw | given)

    return recipe


@pytest.fixture
def finished(make: Make, tmp_path: Path) -> Path:
    recipe = make()
    _, data, steps = preview(recipe)
    (tmp_path / "out" / "model").mkdir(parents=True)
    identity = asdict(identify(recipe, data, first_weights(recipe)))
    write_outcome(tmp_path / "out", Outcome(steps, str(tmp_path / "out" / "model"), identity=identity))
    return tmp_path / "out"


def said(recipe: Recipe) -> str:
    out = io.StringIO()
    assert train(recipe, Console(file=out, width=300)) == 4
    return out.getvalue()


def test_a_finished_run_is_not_made_again(make: Make, finished: Path) -> None:
    for recipe in (make(), make(steps=3), make(experts={"hosts": 3}, workers={"least": 2}, micro_batch_tokens=128)):
        assert f"all 4 steps were made before; {finished}/model has the result" in said(recipe)


def test_a_directory_in_which_another_run_writes_is_left_alone(make: Make, finished: Path) -> None:
    with (
        alone_in(finished),
        pytest.raises(ValueError, match=f"another run writes to {finished} now: wait until it has ended, or give"),
    ):
        train(make(), Console(file=io.StringIO()))
    assert "all 4 steps were made before" in said(make())


def test_nor_are_its_first_weights_drawn_anew(make: Make, tmp_path: Path) -> None:
    recipe = make(init="random")
    recipe.output_dir.mkdir()
    weights = initial_checkpoint(recipe).directory / "model.safetensors"
    drawn = weights.read_bytes()
    with alone_in(recipe.output_dir), pytest.raises(ValueError, match="another run writes to"):
        train(make(init="random", seed=9), Console(file=io.StringIO()))
    assert weights.read_bytes() == drawn


def test_a_file_system_without_locks_is_no_hindrance(
    make: Make, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("services.training.directory.fcntl.flock", none)
    assert "all 4 steps were made before" in said(make())


@contextlib.contextmanager
def no_ray(*_: object) -> Iterator[None]:
    yield


@pytest.mark.parametrize("moment", ["ray_of_run", "check_service", "look", "room", "stopped"])
def test_a_longer_run_that_is_refused_or_stopped_before_it_begins_forgets_no_result(
    make: Make, finished: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def refuse(*_: object) -> None:
        raise ServiceUnusable("there is no service")

    def look(_: object) -> Room:
        if moment == "stopped":
            os.kill(os.getpid(), signal.SIGINT)
        return Room(() if moment == "room" else (NodeRoom({"CPU": 9}, {"CPU": 9}),))

    for name, stand_in in {"ray_of_run": no_ray, "check_service": lambda *_: None, "look": look}.items():
        monkeypatch.setattr(driver, name, refuse if name == moment else stand_in)
    monkeypatch.setattr(driver, "fit", refuse)
    before = read_outcome(finished)
    with pytest.raises((ServiceUnusable, ValueError, TrainingFailed)) as refused:
        train(make(steps=8, experts={"service": "p8000"}), Console(file=io.StringIO()))
    told = {"room": "1 workers with workers.cpus 1 reserve 1 CPUs", "stopped": "stopped before a step was made"}
    assert told.get(moment, "there is no service") in str(refused.value)
    assert read_outcome(finished) == before
    assert "all 4 steps were made before" in said(make())


def test_one_that_begins_has_another_end(make: Make, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (finished / STOP).touch()  # a command that was killed left it
    begun: list[tuple[int, int]] = []

    def fit(recipe: Recipe, service: ServiceSpec, most: int, steps: int, console: Console) -> int:
        assert (read_outcome(finished), (finished / STOP).exists()) == (None, False)
        begun.append((most, steps))
        return steps

    monkeypatch.setattr(driver, "ray_of_run", no_ray)
    monkeypatch.setattr(driver, "look", lambda _: Room((NodeRoom({"CPU": 9}, {"CPU": 3}),)))
    monkeypatch.setattr(driver, "fit", fit)
    assert train(make(steps=8, workers={"most": 9}), Console(file=io.StringIO())) == 8
    assert begun == [(3, 8)]


def test_a_run_removes_what_killed_ones_left_of_their_results(make: Make, finished: Path) -> None:
    left = finished / ".delta.unfinished.abcd1234" / "delta"
    left.mkdir(parents=True)
    (left / "delta.safetensors").write_bytes(bytes(100))
    others = finished / ".mine.unfinished.abcd1234"
    others.mkdir()
    assert "all 4 steps were made before" in said(make())
    assert [path.name for path in finished.glob(".*.unfinished.*")] == [others.name]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"lr": 1e-3}, "lr was 1e-05 and is 0.001"),
        ({"method": "lora"}, "method was 'full' and is 'lora'"),
        ({"seed": 7}, "seed was 0 and is 7"),
        ({"balance": {"expert": 0.003}}, "balance.expert was 0.0 and is 0.003"),
    ],
    ids=["rate", "method", "seed", "balance"],
)
def test_another_recipe_is_not_told_that_it_is_finished(
    make: Make, finished: Path, given: dict[str, object], why: str
) -> None:
    with pytest.raises(ValueError, match=f"{finished}/model is another run's result: {why}; give another output_dir"):
        train(make(**given), Console(file=io.StringIO()))
    assert read_outcome(finished) is not None


def test_nor_are_other_data_or_another_model(make: Make, finished: Path, checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="it began with another model"):
        train(make(model=str(checkpoint("tiny"))), Console(file=io.StringIO()))
    (finished.parent / "data.jsonl").write_text(json.dumps({"text": "something else"}) + "\n")
    with pytest.raises(ValueError, match="its data were others"):
        train(make(), Console(file=io.StringIO()))


def edited(model: Path, out: Path, name: str) -> Path:
    """The model with one tensor that is another."""
    shutil.copytree(model, out)
    tensors = load_file(out / "model.safetensors")
    save_file({**tensors, name: tensors[name] * 1.01}, out / "model.safetensors")
    return out


def test_nor_is_a_model_that_differs_in_one_expert(make: Make, finished: Path, tmp_path: Path) -> None:
    other = edited(make().model, tmp_path / "other", "model.layers.2.mlp.experts.5.down_proj.weight")
    with pytest.raises(ValueError, match="it began with another model"):
        train(make(model=str(other)), Console(file=io.StringIO()))


def test_a_run_finished_under_an_earlier_version_is_known_as_it_was_then(
    make: Make, finished: Path, tmp_path: Path
) -> None:
    recipe = make()
    known = identify(recipe, preview(recipe)[1], first_weights(recipe))
    assert re.fullmatch(r"[0-9a-f]{16}-2-[0-9a-f]{16} [0-9a-f]{16}-[0-9a-f]{16}", f"{known.model} {known.first_model}")
    before = {"recipe": known.recipe, "data": known.data, "model": known.first_model}
    write_outcome(finished, Outcome(4, str(finished / "model"), identity=before))
    assert "all 4 steps were made before" in said(recipe)
    other = edited(recipe.model, tmp_path / "other", "model.norm.weight")
    with pytest.raises(ValueError, match="it began with another model"):
        train(make(model=str(other)), Console(file=io.StringIO()))


def test_weights_drawn_for_another_recipe_are_drawn_anew_unless_they_were_trained(make: Make, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"

    def draw(**given: object) -> torch.Tensor:
        recipe = make(init="random", **given)
        recipe.output_dir.mkdir(exist_ok=True)
        return initial_checkpoint(recipe).tensor(name)

    first = draw()
    assert torch.equal(draw(), first)
    begin(tmp_path / "out" / "snapshots", 1)  # an attempt that was not finished has trained nothing
    other = draw(seed=9, init_std=0.1)
    assert not torch.equal(other, first)
    assert abs(float(other.std()) - 0.1) < 0.01
    (tmp_path / "out" / "snapshots" / "step-00000001").mkdir(parents=True)
    assert torch.equal(draw(seed=9, init_std=0.1), other)
    with pytest.raises(ValueError, match=r"was drawn for another config\.json, seed or init_std"):
        draw()
    assert torch.equal(Checkpoint.open(tmp_path / "out" / "initial").tensor(name), other)


def test_what_cannot_be_told_for_want_of_room_harms_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.txt").mkdir()  # as good as a full disk: nothing can be written there
    tell(tmp_path, "no snapshot of step 4")
    assert capsys.readouterr().err == "no snapshot of step 4\n"
    (tmp_path / "log.txt").rmdir()
    tell(tmp_path, "heard")
    assert told(tmp_path)[0] == ["heard"]
