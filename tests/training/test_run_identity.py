"""A directory of one run is not taken for another's: finished results, and first weights drawn at random."""

import errno
import io
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from rich.console import Console

from model.checkpoint import Checkpoint
from model.snapshots.attempt import begin
from services.training.directory import alone_in
from services.training.driver import first_weights, preview, train
from services.training.identity import identify
from services.training.initial import initial_checkpoint
from services.training.outcome import Outcome, read_outcome, tell, told, write_outcome
from services.training.recipe import Recipe, parse_recipe
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
