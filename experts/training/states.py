"""Experts' states on their way: from host to host as messages, and to and from a snapshot's files.

A message is the SHA-256 of the rest, then layer, expert and version, then the state as a safetensors file. A snapshot
has what is learned; matrices that no step changes are the checkpoint's.
"""

import hashlib
import struct
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from experts.errors import HostRefused, TransferFailed
from experts.training.expert import MATRICES, matrices
from experts.training.host import TrainingHost
from model.checkpoint import Checkpoint
from model.snapshots.manifest import Shard
from model.snapshots.shard_file import write_shard
from model.snapshots.snapshot import Snapshot
from router.holding import Pair

PREFIX = struct.Struct("<32sIIQ")
DIGEST_BYTES = 32


def encode_state(pair: Pair, version: int, state: Mapping[str, Tensor]) -> bytes:
    """One expert's state, with its digest before it."""
    body = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})
    head = struct.pack("<IIQ", *pair, version)
    digest = hashlib.sha256(head)
    digest.update(body)
    return b"".join((digest.digest(), head, body))


def decode_state(message: bytes) -> tuple[Pair, int, dict[str, Tensor]]:
    """Inverse of encode_state; raises TransferFailed for anything else."""
    if len(message) < PREFIX.size:
        raise TransferFailed(f"{len(message)} bytes are too few for an expert's state")
    digest, layer, expert, version = PREFIX.unpack_from(message)
    if hashlib.sha256(memoryview(message)[DIGEST_BYTES:]).digest() != digest:
        raise TransferFailed("the digest does not fit the expert's state: it was damaged on the way")
    try:
        state = safetensors.torch.load(message[PREFIX.size :])
    except safetensors.SafetensorError as error:
        raise TransferFailed(f"the state of expert {expert} in layer {layer} is not safetensors: {error}") from error
    return (layer, expert), version, state


def save_states(host: TrainingHost, staging: Path, pairs: Collection[Pair], step: int) -> list[Shard]:
    """Write what experts have learned in `step` steps, a file a layer; nothing steps meanwhile, rows are computed.

    A layer in which none of them is trained has no file.

    Raises HostRefused when one is not at that step, and what `write_shard` raises.
    """
    by_layer: dict[int, list[Pair]] = defaultdict(list)
    for pair in sorted(pairs):
        by_layer[pair[0]].append(pair)
    shards: list[Shard] = []
    with host.reading():
        for layer, members in by_layer.items():
            tensors: dict[str, Tensor] = {}
            for pair in members:
                version, learned = host.learned(pair)
                if version != step:
                    raise HostRefused("not_ready", f"expert {pair} is at step {version}; {step} is to be saved")
                tensors |= {snapshot_name(pair, name): tensor for name, tensor in learned.items()}
            if tensors:
                shards.append(write_shard(staging, f"experts-{layer:03d}-{host.host.host_id}.safetensors", tensors))
    return shards


def load_states(host: TrainingHost, checkpoint: Checkpoint, snapshot: Snapshot, pairs: Sequence[Pair]) -> None:
    """Take experts over from a snapshot, and from the checkpoint what no step changes.

    Raises SnapshotError or CheckpointError, or ValueError where they do not fit.
    """
    for pair in pairs:
        names = host.learned_names(pair)
        read = snapshot.tensors(snapshot_name(pair, name) for name in names)
        state = dict(zip(names, read, strict=True))
        if not state.keys() >= set(MATRICES):
            state = matrices(checkpoint.expert(*pair)) | state
        host.adopt(pair, snapshot.manifest.step, state)


def snapshot_name(pair: Pair, name: str) -> str:
    """What a tensor of an expert's state is called in a snapshot."""
    return f"model.layers.{pair[0]}.mlp.experts.{pair[1]}.{name}"
