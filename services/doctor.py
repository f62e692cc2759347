"""What a person needs to know before a service can start here."""

import importlib.metadata
import math
import os
import shutil
import sys
from dataclasses import dataclass

from services.launch_options import LaunchError, check_port
from services.state import read_record


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `detail` says what to do when it is not ok."""

    what: str
    ok: bool
    detail: str


def examine(model: str | None, port: int) -> list[Finding]:
    """Look at Python, packages, kernels, GPUs, transport, shared memory, the port, and a checkpoint."""
    return [
        _python(),
        *(_package(name) for name in ("ray", "torch", "grpcio", "safetensors", "tokenizers")),
        _kernels(),
        _gpus(),
        _transport(),
        _shared_memory(),
        _port(port),
        *([] if model is None else _checkpoint(model)),
    ]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    ok = (3, 11) <= sys.version_info[:2] <= (3, 12)
    return Finding("python", ok, version if ok else f"{version}; use 3.11 or 3.12")


def _package(name: str) -> Finding:
    try:
        return Finding(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, False, "not installed; run `make env`")


def _kernels() -> Finding:
    from kernels.native import instruction_set

    try:
        serving = instruction_set()
    except ValueError as error:
        return Finding("kernels", False, str(error))
    slow = "torch computes, more slowly; install g++ or clang++ and run `make env`"
    return Finding("kernels", True, slow if serving == "torch" else serving)


def _gpus() -> Finding:
    import torch

    from kernels.native import triton_serves

    count = torch.cuda.device_count()
    if not count:
        return Finding("gpus", True, "none; CPUs compute")
    kernels = "Triton's kernels" if triton_serves("cuda") else "torch, as Triton or an Ampere GPU or later is missing,"
    return Finding("gpus", True, f"{count}; `shoal serve --gpus G` uses them: {kernels} would compute")


def _transport() -> Finding:
    from experts.lane import lanes_serve
    from experts.nixl import find_nixl

    nixl = find_nixl() is not None
    try:
        shared = lanes_serve()
    except ValueError as error:  # the kernels', of which the ways to share memory are part
        return Finding("transport", False, str(error))
    near = "shared memory" if shared else "NIXL" if nixl else "gRPC"
    far = "NIXL" if nixl else "gRPC; `make env` installs NIXL, which is quicker, on Linux"
    return Finding("transport", True, f"{near} on this machine, to others {far}")


def _shared_memory() -> Finding:
    if not os.path.isdir("/dev/shm"):
        return Finding("shared memory", False, "/dev/shm is missing; Ray needs it")
    free = shutil.disk_usage("/dev/shm").free
    ok = free >= 256 << 20
    return Finding("shared memory", ok, f"{free >> 20} MiB free" + ("" if ok else "; Ray needs 256 MiB in /dev/shm"))


def _port(port: int) -> Finding:
    record = read_record(port)
    if record is not None:
        return Finding("port", True, f"{port} serves {record.model}")
    try:
        check_port("127.0.0.1", port)
    except LaunchError as error:
        return Finding("port", False, str(error))
    return Finding("port", True, f"{port} is free")


def _checkpoint(model: str) -> list[Finding]:
    from model.checkpoint import Checkpoint
    from model.tokenizer import Tokenizer

    try:
        checkpoint = Checkpoint.open(model)
        Tokenizer.load(checkpoint.directory)
    except ValueError as error:
        return [Finding("checkpoint", False, str(error))]
    numbers = sum(math.prod(entry.shape) for entry in checkpoint.entries.values())
    needed = sum(math.prod(entry.shape) * (2 if entry.dtype == "BF16" else 4) for entry in checkpoint.entries.values())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fits = needed < memory
    size = f"{needed / 2**30:.2f} GiB on CPUs, {memory / 2**30:.1f} GiB here"
    return [
        Finding("checkpoint", True, f"{model}: {numbers / 1e6:.1f} M parameters, {checkpoint.config.dtype}"),
        Finding("memory", fits, size if fits else f"{size}; spread the experts over several nodes"),
    ]
