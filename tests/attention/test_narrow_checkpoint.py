"""A bf16 checkpoint is kept in bf16 and answers with the bits of the same numbers in fp32, and the oracle's tokens."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from attention.decoder import Decoder
from experts.client import ExpertClient
from experts.local import LocalTransport
from experts.static import StaticPlacement
from kernels.native import native
from model.checkpoint import Checkpoint
from tests.model.files import edit_tensors
from tests.oracle import greedy_tokens
from tests.serving import greedy, make_engine, make_hosts, run

ATTENTION = ("_q", "_kv_a", "_up_key", "_up_value", "_o")


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


def dense_bytes(path: Path) -> dict[str, int]:
    """Of what the worker multiplies with, by part of the model; the router is not among it."""
    opened = Checkpoint.open(path)
    hosts, placement = make_hosts(opened, 1)
    source = StaticPlacement(placement)
    decoder = Decoder(opened, ExpertClient(LocalTransport(hosts), source), source)
    found = {"head": decoder._head.nbytes, "embedding": decoder._embedding_VD.nbytes}
    for number, layer in enumerate(decoder._layers):
        parts = {"mlp": layer._mlp, **{name: vars(layer._attention)[name] for name in ATTENTION}}
        found |= {f"{name} {number}": part.nbytes for name, part in parts.items() if part is not None}
    return found


@pytest.mark.skipif(native() is None, reason="without native kernels all weights are kept in fp32")
def test_its_weights_take_half_the_memory(pair: tuple[Path, Path]) -> None:
    narrow, wide = (make_hosts(Checkpoint.open(path), 1)[0]["host-0"].stats().nbytes for path in pair)
    assert 2 * narrow == wide
    narrow_parts, wide_parts = (dense_bytes(path) for path in pair)
    assert {name: 2 * nbytes for name, nbytes in narrow_parts.items()} == wide_parts


def test_nothing_is_read_from_the_files_once_it_is_loaded(pair: tuple[Path, Path]) -> None:
    for path in pair:
        prompt = [5, 6, 7, 8]
        engine = make_engine(path, 1)
        (before,) = run(engine, [greedy("a", prompt, 6, logprobs=1)]).values()
        for file in path.glob("*.safetensors"):
            with file.open("r+b") as opened:  # the very file, not another of its name
                opened.write(bytes(file.stat().st_size))
        (after,) = run(engine, [greedy("b", prompt, 6, logprobs=1)]).values()
        assert after.logprobs == before.logprobs
