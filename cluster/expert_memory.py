"""How many experts the memory of a host's pod or GPU has room for."""

from pathlib import Path

from model.config import ModelConfig

GPU_PART = 0.9  # of a device: the rest is for what is computed
LEFT_BYTES = 2 << 30  # of a container: for its processes, and for rows
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # versions 2 and 1
UNLIMITED_BYTES = 1 << 60  # a limit above it is none: version 1 has no word for that


def number_bytes(dtype: str, gpu: bool) -> tuple[int, int]:
    """Bytes of a weight's number and of a cached one, for a checkpoint of this dtype.

    GPUs compute in it. CPUs compute and cache in float32, and keep what is bfloat16 as it is.
    """
    if gpu:
        return (4, 4) if dtype == "float32" else (2, 2)
    return (2, 4) if dtype == "bfloat16" else (4, 4)


def most_pairs(config: ModelConfig, gpus: float) -> int | None:
    """(layer, expert) pairs that fit, at least one; None where no limit is known.

    On a GPU the host has its part of one, `gpus`, and takes nine tenths of it. On CPUs it has what its container may
    use, less 2 GiB; a container of several hosts does not divide that among them, and a machine has no such limit.
    """
    room_bytes = _gpu_bytes(gpus) if gpus > 0 else _container_bytes()
    if room_bytes is None or not config.moe_layers:
        return None
    width, _ = number_bytes(config.dtype, gpus > 0)
    return max(1, room_bytes // (3 * config.hidden_size * config.moe_intermediate_size * width))


def _gpu_bytes(gpus: float) -> int | None:
    import torch

    if not torch.cuda.is_available():
        return None
    return int(GPU_PART * min(gpus, 1.0) * torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)


def _container_bytes() -> int | None:
    for file in LIMITS:
        try:
            limit = int(file.read_text())
        except (OSError, ValueError):  # it is not there, or says "max"
            continue
        return limit - LEFT_BYTES if limit < UNLIMITED_BYTES else None
    return None
