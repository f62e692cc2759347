"""`shoal plan`: counts as the papers give them, sizes as the parts take them, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from attention.cache import LatentCache
from model.config import parse_config, read_config
from router.balancer import HostCapacity, balance
from router.placement import Host, initial_placement
from services.cli import main
from services.footprint import Layout, by_kind, fewest_hosts, footprint

V2: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "vocab_size": 102400,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 60,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "n_group": 8,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 16.0,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
}
LITE = V2 | {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "n_routed_experts": 64,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
}


@pytest.mark.parametrize(("raw", "total", "active"), [(V2, 236e9, 21e9), (LITE, 15.7e9, 2.4e9)])
def test_parameters_are_the_papers(raw: dict[str, Any], total: float, active: float) -> None:
    """DeepSeek-V2 paper, abstract and appendix B."""
    config = parse_config(raw)
    needs = footprint(config, Layout())
    assert needs.parameters == pytest.approx(total, rel=0.005)
    assert needs.active == pytest.approx(active, rel=0.03)
    assert sum(by_kind(config).values()) == needs.parameters == needs.dense + needs.experts


@pytest.mark.parametrize("shape", ["tiny", "tiny-lite"])
def test_sizes_are_those_of_the_parts(checkpoint: Callable[[str], Path], shape: str) -> None:
    config = read_config(checkpoint(shape))
    needs = footprint(config, Layout(hosts=2, cache_tokens=64))
    assert needs.parameters == sum(t.numel() for t in load_file(checkpoint(shape) / "model.safetensors").values())
    cache = LatentCache(config, 4, 16, torch.float32, "cpu")
    assert needs.cache_bytes == cache.data_LBSW.numel() * 4


def test_memory_is_divided_among_hosts_and_multiplied_by_replicas() -> None:
    config = parse_config(V2)
    narrow = {"weight_bytes": 2, "cached_bytes": 2}
    one, half, twice = (footprint(config, Layout(*each, **narrow)) for each in ((1, 1), (2, 1), (2, 2)))
    assert one.host_bytes == one.experts * 2 == 2 * half.host_bytes == twice.host_bytes
    assert (
        footprint(config, Layout(7, weight_bytes=4)).host_bytes
        == 2 * footprint(config, Layout(7, weight_bytes=2)).host_bytes
    )
    assert one.cached_token_bytes == 60 * 576 * 2


@pytest.mark.parametrize("hosts", [1, 2, 3, 4, 5, 7, 8, 12, 16, 20])
def test_a_token_asks_no_more_hosts_than_is_said(hosts: int) -> None:
    """Over every choice of groups that routing can make, on hosts as a service begins and as it is rebalanced."""
    config = parse_config(V2)
    begun = initial_placement(config, [Host(f"host-{number}", 1, "") for number in range(hosts)]).owners[1]
    capacities = [HostCapacity(f"host-{number}") for number in range(hosts)]
    for owners in (begun, balance({1: [1.0] * 160}, capacities, groups=8)[1]):
        spread = sorted((len({owners[20 * group + each][0] for each in range(20)}) for group in range(8)), reverse=True)
        assert min(hosts, 6, sum(spread[:3])) <= footprint(config, Layout(hosts)).asked_hosts


@pytest.mark.parametrize("raw", [V2, LITE])
@pytest.mark.parametrize("hosts", [1, 3, 6, 7, 14, 15])
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_no_host_begins_with_more_than_is_said(raw: dict[str, Any], hosts: int, replicas: int) -> None:
    config = parse_config(raw)
    replicas = min(replicas, hosts)
    begun = initial_placement(config, [Host(f"host-{number}", 1, "") for number in range(hosts)], replicas)
    held = max(len(begun.held_by(host.id)) for host in begun.hosts)
    assert footprint(config, Layout(hosts, replicas)).host_pairs == held
    room = 2 * 3 * config.hidden_size * config.moe_intermediate_size * held
    assert fewest_hosts(config, Layout(replicas, replicas, weight_bytes=2), room) <= hosts


def test_the_fewest_hosts_that_hold_the_experts() -> None:
    config = parse_config(V2)
    room = int(0.9 * 79 * 2**30)
    hosts = fewest_hosts(config, Layout(weight_bytes=2), room)
    assert footprint(config, Layout(hosts, weight_bytes=2)).host_bytes <= room
    assert footprint(config, Layout(hosts - 1, weight_bytes=2)).host_bytes > room
    assert fewest_hosts(config, Layout(3, 3, weight_bytes=2), 2**50) == 3
    with pytest.raises(ValueError, match="do not fit"):
        fewest_hosts(config, Layout(), 1)
    for share in range(1, 24):  # of the experts, in each host
        room = footprint(config, Layout()).experts * 2 // share
        hosts = fewest_hosts(config, Layout(1, weight_bytes=2), room)
        assert footprint(config, Layout(hosts, weight_bytes=2)).host_bytes <= room


def test_the_command_shows_it_and_scripts_can_read_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(V2))
    assert main(["plan", str(path), "--expert-hosts", "8", "--gpu"]) == 0
    shown = capsys.readouterr().out
    assert "235,741,434,880" in shown
    assert "model.shape.hiddenSize=5120,model.shape.moeIntermediateSize=1536" in shown
    assert main(["plan", str(tmp_path), "--host-memory", "71Gi", "--gpu", "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert (read["hosts"], read["asked_hosts"]) == (6, 6)


@pytest.mark.parametrize(
    ("dtype", "cpu", "gpu"), [("bfloat16", (2, 4), (2, 2)), ("float16", (4, 4), (2, 2)), ("float32", (4, 4), (4, 4))]
)
def test_the_checkpoints_dtype_says_what_numbers_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str, cpu: tuple[int, int], gpu: tuple[int, int]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(V2 | {"torch_dtype": dtype}))
    for options, expected in (([], cpu), (["--gpu"], gpu)):
        assert main(["plan", str(tmp_path), "--json", *options]) == 0
        read = json.loads(capsys.readouterr().out)
        assert (read["host_bytes"] / read["host_pairs"] / read["expert"], read["weight_bytes"]) == (expected[0],) * 2
        assert read["cache_bytes"] == read["cache_tokens"] * 60 * 576 * expected[1]
        assert main(["plan", str(tmp_path), *options]) == 0
        assert f"model.shape.dtype={dtype}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--expert-hosts", "0"], "0 hosts given"),
        (["--expert-hosts", "161"], "the model has 160 experts a layer"),
        (["--expert-replicas", "3"], "3 replicas on 2 hosts"),
        (["--cache-tokens", "0"], "0 cache tokens given"),
        (["--attention-replicas", "0"], "0 attention workers given"),
        (["--expert-hosts", "2", "--host-memory", "1Gi"], "give one of"),
        (["--host-memory", "1Mi"], "do not fit"),
        (["--host-memory", "4Gi", "--expert-replicas", "2"], "4294967296 bytes a host given"),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(V2))
    assert main(["plan", str(path), *arguments]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"), [("[]", "holds a JSON list"), ("{", "cannot be read as JSON"), ("{}", "architectures")]
)
def test_a_file_that_is_no_config_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    assert main(["plan", str(path)]) == 1
    assert said in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "missing")]) == 1
