"""What a host says that its memory holds, and that no change gives it more."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cluster import expert_memory
from cluster.expert_memory import GPU_PART, LEFT_BYTES, most_pairs
from cluster.plan import ModelShape, target
from cluster.roster import HostView
from model.config import ModelConfig, parse_config
from router.holding import Holding
from router.placement import Host, initial_placement
from tests.model.shapes import V2

GIB = 2**30


@pytest.fixture
def config() -> ModelConfig:
    return parse_config(V2)


def pair_bytes(config: ModelConfig, width: int = 2) -> int:
    return 3 * config.hidden_size * config.moe_intermediate_size * width


def limited(monkeypatch: pytest.MonkeyPatch, place: Path, *texts: str | None) -> None:
    files = tuple(place / str(number) for number in range(len(texts)))
    for file, text in zip(files, texts, strict=True):
        if text is not None:
            file.write_text(text)
    monkeypatch.setattr(expert_memory, "LIMITS", files)


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_has_room_for_what_it_may_use_less_two_gibibytes(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: int
) -> None:
    limit = f"{LEFT_BYTES + 100 * pair_bytes(config) - 1}\n"
    limited(monkeypatch, tmp_path, *((limit, None) if version == 2 else (None, limit)))
    assert most_pairs(config, gpus=0) == 99
    assert most_pairs(replace(config, dtype="float16"), gpus=0) == 49  # computed, and kept, in fp32
    assert most_pairs(replace(config, first_k_dense_replace=config.num_hidden_layers), gpus=0) is None


@pytest.mark.parametrize("texts", [(None, None), ("max\n", None), (None, "9223372036854771712\n")])
def test_a_machine_has_no_limit(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, texts: tuple[str | None, ...]
) -> None:
    limited(monkeypatch, tmp_path, *texts)
    assert most_pairs(config, gpus=0) is None


def test_a_container_with_too_little_has_room_for_one(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limited(monkeypatch, tmp_path, "1000", None)
    assert most_pairs(config, gpus=0) == 1


def test_a_host_has_its_part_of_a_gpu(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    device = SimpleNamespace(total_memory=80 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    whole = int(GPU_PART * 80 * GIB) // pair_bytes(config)
    assert (most_pairs(config, gpus=1), most_pairs(config, gpus=4)) == (whole, whole)
    assert most_pairs(config, gpus=0.5) == whole // 2


def test_no_change_gives_a_host_more_than_it_has_room_for(config: ModelConfig) -> None:
    """V2 on seven GPUs of 80 GB, where two of the eight groups at one host would take 104 GiB."""
    room = int(GPU_PART * 79 * GIB) // pair_bytes(config)
    hosts = [HostView(f"host-{number}", 1, "ready", max_pairs=room) for number in range(7)]
    begun = initial_placement(config, [Host(view.id, 1, "") for view in hosts], 1).owners
    shape = ModelShape(config.moe_layers, config.n_routed_experts, config.n_group)
    current = Holding.from_owners(begun, [view.id for view in hosts])
    even = {layer: [1.0] * config.n_routed_experts for layer in config.moe_layers}
    after = target(shape, hosts, current, even, replicas=1, extra=0)
    assert max(len(after.held_by(view.id)) for view in hosts) <= room
    unlimited = target(shape, [replace(view, max_pairs=None) for view in hosts], current, even, replicas=1, extra=0)
    assert max(len(unlimited.held_by(view.id)) for view in hosts) > room
