"""What serving a model takes: parameters, memory of each actor, bytes between them. From its shape alone."""

import math
from collections import Counter
from dataclasses import dataclass

from model.config import ModelConfig
from model.tensors import expected_tensors

ROW_BYTES = 4  # of a number in a row on its way to a host and back: fp32
ROUTED = "routed experts"
INDEX_BYTES = 4  # of a row's or expert's number beside it


@dataclass(frozen=True, slots=True)
class Layout:
    """How a service is to be laid out; raises ValueError naming what is out of range."""

    hosts: int = 2
    replicas: int = 1  # hosts that hold each expert
    cache_tokens: int = 32768  # of each attention worker
    weight_bytes: int = 4  # of a weight's number
    cached_bytes: int = 4  # of a cached number

    def __post_init__(self) -> None:
        for name, value in (("hosts", self.hosts), ("cache tokens", self.cache_tokens)):
            if value < 1:
                raise ValueError(f"{value} {name} given; expected at least 1")
        if not 1 <= self.replicas <= self.hosts:
            raise ValueError(f"{self.replicas} replicas on {self.hosts} hosts given; expected 1 to {self.hosts}")


@dataclass(frozen=True, slots=True)
class Footprint:
    """Counts of numbers, and bytes. A host is the fullest, as a service begins: each layer is dealt evenly."""

    parameters: int
    active: int  # of them that a token uses
    dense: int  # in every attention worker
    expert: int  # of one routed expert of one layer
    experts: int  # of all routed experts, once
    dense_bytes: int
    cache_bytes: int  # of a worker
    cached_token_bytes: int
    host_pairs: int  # (layer, expert) pairs
    host_bytes: int
    asked_hosts: int  # that a token is sent to in a layer, at most
    sent_bytes: int  # by a worker, of a token in a layer, at most
    received_bytes: int

    @property
    def worker_bytes(self) -> int:
        return self.dense_bytes + self.cache_bytes


def footprint(config: ModelConfig, layout: Layout) -> Footprint:
    """Raises ValueError for more hosts than the model has experts."""
    layers, experts = len(config.moe_layers), config.n_routed_experts if config.moe_layers else 0
    if layers and layout.hosts > experts:
        raise ValueError(f"{layout.hosts} hosts given; the model has {experts} experts a layer: use at most {experts}")
    kinds = by_kind(config)
    routed, parameters = kinds[ROUTED], kinds.total()
    expert = 3 * config.hidden_size * config.moe_intermediate_size if layers else 0
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size  # embeddings
    chosen = config.num_experts_per_tok if layers else 0
    asked = min(layout.hosts, chosen, config.topk_group * _hosts_of_a_group(config.n_group, layout.hosts))
    pairs = layers * -(-experts * layout.replicas // layout.hosts)  # as `router.placement.initial_placement` has it
    return Footprint(
        parameters=parameters,
        active=parameters - routed - looked_up + layers * chosen * expert,
        dense=parameters - routed,
        expert=expert,
        experts=routed,
        dense_bytes=(parameters - routed) * layout.weight_bytes,
        cache_bytes=layout.cache_tokens * config.num_hidden_layers * config.latent_width * layout.cached_bytes,
        cached_token_bytes=config.num_hidden_layers * config.latent_width * layout.cached_bytes,
        host_pairs=pairs,
        host_bytes=pairs * expert * layout.weight_bytes,
        asked_hosts=asked,
        sent_bytes=asked * config.hidden_size * ROW_BYTES + chosen * 2 * INDEX_BYTES,
        received_bytes=chosen * config.hidden_size * ROW_BYTES,
    )


def fewest_hosts(config: ModelConfig, layout: Layout, room_bytes: int) -> int:
    """Hosts among which the experts fit when each has so much room; raises ValueError when no number is enough."""
    one = footprint(config, layout)
    if not one.expert:
        return layout.replicas
    fit = room_bytes // (one.expert * layout.weight_bytes * len(config.moe_layers))  # experts of each layer
    if fit < layout.replicas:  # which the model's experts, a host each, would have
        raise ValueError(f"{room_bytes} bytes a host given; the experts do not fit, however many hosts there are")
    return max(layout.replicas, -(-config.n_routed_experts * layout.replicas // fit))


def _hosts_of_a_group(groups: int, hosts: int) -> int:
    """Hosts among which one group of experts is spread at most, as a service begins: in runs of equal length."""
    if groups == 1:
        return hosts
    if groups % hosts == 0 or hosts % groups == 0:
        return max(1, hosts // groups)
    return -(-hosts // groups) + 1


def by_kind(config: ModelConfig) -> Counter[str]:
    """Parameters by what they are for: embedding and head, attention, dense and shared experts, routed experts."""
    counts: Counter[str] = Counter()
    for name, shape in expected_tensors(config).items():
        if ".mlp.experts." in name:
            kind = ROUTED
        elif ".mlp." in name:
            kind = "dense layers, shared experts and gates"
        elif ".self_attn." in name:
            kind = "attention"
        else:
            kind = "embedding, head and norms"
        counts[kind] += math.prod(shape)
    return counts
