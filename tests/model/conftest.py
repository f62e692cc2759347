"""Small checkpoints written by transformers, whole and in shards, and copies that a test may damage."""

import shutil
from pathlib import Path

import pytest
from transformers import DeepseekV2ForCausalLM

from tests.checkpoints import write_checkpoint
from tests.model.shapes import SMALL


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model.safetensors of about a third of a megabyte, with tokenizer."""
    return write_checkpoint(SMALL, tmp_path_factory.mktemp("small")).path


@pytest.fixture(scope="session")
def small_sharded(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of `small` as transformers shards them."""
    out = tmp_path_factory.mktemp("small-sharded")
    DeepseekV2ForCausalLM.from_pretrained(small).save_pretrained(out, max_shard_size="40KB")
    return out


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    """`small`, to be damaged."""
    return Path(shutil.copytree(small, tmp_path / "copy"))


@pytest.fixture
def sharded_copy(small_sharded: Path, tmp_path: Path) -> Path:
    """`small_sharded`, to be damaged."""
    return Path(shutil.copytree(small_sharded, tmp_path / "sharded-copy"))


@pytest.fixture(scope="session")
def bundled() -> Path:
    """The model in this repository."""
    return Path(__file__).parents[2] / "models" / "bundled"
