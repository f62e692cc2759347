"""What a run's command has read and encoded reaches its workers as it is."""

from pathlib import Path

import numpy as np
import pytest

from services.training.inputs import SHARED, load_data, share_data, shared_data
from services.training.recipe import Recipe, parse_recipe
from tests.conftest import MakeCheckpoint


@pytest.fixture
def recipe(checkpoint: MakeCheckpoint, tmp_path: Path) -> Recipe:
    (tmp_path / "first.txt").write_text("Hello there. " * 40)
    (tmp_path / "second.txt").write_text("Good evening to you all.")
    return parse_recipe(
        {
            "model": str(checkpoint("tiny")),
            "output_dir": str(tmp_path / "run"),
            "data": {
                "files": [str(tmp_path / "first.txt"), str(tmp_path / "second.txt")],
                "sequence_length": 32,
                "overlong": "split",
            },
            "epochs": 2,
            "batch_tokens": 64,
            "lr": 1e-3,
            "seed": 7,
        }
    )


def test_workers_see_what_the_command_read(recipe: Recipe) -> None:
    recipe.output_dir.mkdir()
    read = load_data(recipe)
    share_data(recipe.output_dir, read)
    for file in recipe.data.files:
        file.unlink()  # no worker needs them
    shared = shared_data(recipe)
    assert (shared.fingerprint(), shared.end, len(shared)) == (read.fingerprint(), read.end, len(read))
    assert len({sample.source for sample in shared.samples}) == 2
    for one, other in zip(shared.samples, read.samples, strict=True):
        assert np.array_equal(one.ids, other.ids)
        assert np.array_equal(one.mask, other.mask)
        assert (one.line, one.source) == (other.line, other.source)
    for cursor in range(2 * len(read)):
        one, other = (data.batch(cursor, batch_tokens=64) for data in (shared, read))
        assert (one.samples, one.targets, one.cursor_after) == (other.samples, other.targets, other.cursor_after)


def test_a_file_that_is_gone_or_damaged_is_an_error(recipe: Recipe) -> None:
    with pytest.raises(OSError, match=SHARED):
        shared_data(recipe)
    recipe.output_dir.mkdir()
    path = share_data(recipe.output_dir, load_data(recipe))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OSError, match=f"{SHARED} cannot be read"):
        shared_data(recipe)


def test_what_cannot_be_written_leaves_nothing(recipe: Recipe) -> None:
    data = load_data(recipe)
    with pytest.raises(OSError, match=f"{SHARED} cannot be written"):
        share_data(recipe.output_dir, data)  # no such directory
    recipe.output_dir.mkdir()
    share_data(recipe.output_dir, data)
    assert [path.name for path in recipe.output_dir.iterdir()] == [SHARED]
