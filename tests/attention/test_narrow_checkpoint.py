"""A bf16 checkpoint is kept in bf16 and answers with the bits of the same numbers in fp32, and the oracle's tokens."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.checkpoint import Checkpoint
from tests.model.files import edit_tensors
from tests.oracle import greedy_tokens
from tests.serving import greedy, make_engine, make_hosts, run


def rounded(source: Path, target: Path, dtype: torch.dtype) -> Path:
    """A copy whose numbers are those of bf16, stored as `dtype`."""
    shutil.copytree(source, target)
    edit_tensors(target, lambda tensors: tensors.update({name: t.bfloat16().to(dtype) for name, t in tensors.items()}))
    return target


@pytest.fixture(params=["tiny", "tiny-lite"])
def pair(request: pytest.FixtureRequest, checkpoint: Callable[[str], Path], tmp_path: Path) -> tuple[Path, Path]:
    source = checkpoint(request.param)
    return rounded(source, tmp_path / "narrow", torch.bfloat16), rounded(source, tmp_path / "wide", torch.float32)


def test_answers_are_those_of_the_wide_checkpoint(pair: tuple[Path, Path]) -> None:
    rng = random.Random(7)
    prompts = [[rng.randrange(2, 512) for _ in range(length)] for length in (1, 33, 60, 9)]
    asked = [greedy(str(i), prompt, 8, logprobs=2, prompt_logprobs=1) for i, prompt in enumerate(prompts)]
    narrow, wide = (run(make_engine(path, hosts), asked) for path, hosts in zip(pair, (2, 1), strict=True))
    for name, answer in wide.items():
        assert vars(narrow[name]) == vars(answer)
    assert narrow["1"].tokens == greedy_tokens(pair[0], prompts[1], 8)


def test_its_experts_take_half_the_memory(pair: tuple[Path, Path]) -> None:
    narrow, wide = (make_hosts(Checkpoint.open(path), 1)[0]["host-0"].stats().nbytes for path in pair)
    assert 2 * narrow == wide
