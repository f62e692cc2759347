"""`shoal plan`: what serving a model takes, computed from its config.json."""

import argparse
import json
import math
import re
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.expert_memory import number_bytes
from model.config import ModelConfig, parse_config, read_raw_config
from model.json_file import read_object
from services.commands import CommandError
from services.footprint import Footprint, Layout, by_kind, fewest_hosts, footprint

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
GIB = 2**30


def add_parser(commands_: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `plan` to the command line."""
    text = "Show parameters, memory and traffic of each actor, from a model's config.json alone."
    command = commands_.add_parser("plan", help=text, description=text)
    command.add_argument("model", type=Path, metavar="MODEL", help="a config.json, or the directory that holds one")
    command.add_argument("--expert-hosts", type=int, metavar="N", help="actors that share the experts (2)")
    command.add_argument("--host-memory", type=size, metavar="SIZE", help="or: as few as fit, each with so much: 64Gi")
    command.add_argument("--expert-replicas", type=int, default=1, metavar="R", help="hosts that hold each expert (1)")
    command.add_argument("--attention-replicas", type=int, default=1, metavar="M", help="attention workers (1)")
    command.add_argument("--cache-tokens", type=int, default=32768, metavar="T", help="of each worker's cache (32768)")
    command.add_argument(
        "--gpu",
        action="store_true",
        help="on GPUs, which compute and cache in the checkpoint's dtype; CPUs compute in float32",
    )
    command.add_argument("--json", action="store_true", help="for scripts")
    command.set_defaults(run=run)


def size(text: str) -> int:
    """Bytes of a command line's 64Gi; argparse shows this name for what is no size."""
    given = re.fullmatch(r"(\d+(?:\.\d+)?)(?:([KMGT])(?:iB?)?)?", text)
    if given is None or not 0 < float(given[1]) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} given; expected a size such as 64Gi")
    return int(float(given[1]) * UNITS[given[2] or ""])


def run(options: argparse.Namespace) -> int:
    """Print it."""
    try:
        if options.attention_replicas < 1:
            raise ValueError(f"{options.attention_replicas} attention workers given; expected at least 1")
        if options.expert_hosts is not None and options.host_memory is not None:
            raise ValueError("give one of --expert-hosts and --host-memory")
        config = _read(options.model)
        layout = _layout(options, config)
        needs = footprint(config, layout)
    except ValueError as error:
        raise CommandError(str(error)) from error
    if options.json:
        print(json.dumps(asdict(layout) | asdict(needs) | {"worker_bytes": needs.worker_bytes}, indent=2))
    else:
        _show(config, layout, needs, options.attention_replicas, Console(highlight=False))
    return 0


def _read(path: Path) -> ModelConfig:
    if path.is_dir():
        return parse_config(read_raw_config(path))
    raw = read_object(path, ValueError, "give a config.json, or the directory that holds one")
    return parse_config(raw)


def _layout(options: argparse.Namespace, config: ModelConfig) -> Layout:
    numbers = number_bytes(config.dtype, options.gpu)
    hosts = options.expert_hosts
    if options.host_memory is not None:
        least = Layout(options.expert_replicas, options.expert_replicas, options.cache_tokens, *numbers)
        hosts = fewest_hosts(config, least, options.host_memory)
    return Layout(2 if hosts is None else hosts, options.expert_replicas, options.cache_tokens, *numbers)


def _show(config: ModelConfig, layout: Layout, needs: Footprint, workers: int, console: Console) -> None:
    kinds = by_kind(config)
    table = Table("parameters", "", title_justify="left")
    for kind, numbers in kinds.items():
        table.add_row(kind, f"{numbers:,}")
    table.add_row("all", f"{needs.parameters:,}")
    table.add_row("of them used by a token", f"{needs.active:,}")
    console.print(table)
    table = Table("actor", "", "GiB")
    table.add_row(f"each of {workers} attention workers", "weights", _gib(needs.dense_bytes))
    cached = f"cache of {layout.cache_tokens:,} tokens, {needs.cached_token_bytes:,} bytes each"
    table.add_row("", cached, _gib(needs.cache_bytes))
    table.add_row("", "both", _gib(needs.worker_bytes))
    held = f"{needs.host_pairs:,} experts of {needs.expert * layout.weight_bytes / 2**20:.1f} MiB"
    table.add_row(f"each of {layout.hosts} expert hosts", held, _gib(needs.host_bytes))
    total = workers * needs.worker_bytes + layout.hosts * needs.host_bytes
    table.add_row("all", "without what processes and activations take", _gib(total))
    console.print(table)
    sent, received = needs.sent_bytes, needs.received_bytes
    table = Table("traffic of a worker, at most", "bytes sent", "bytes received")
    table.add_row(f"a token and layer, to {needs.asked_hosts} hosts", f"{sent:,}", f"{received:,}")
    layers = len(config.moe_layers)
    table.add_row(f"a token, {layers} layers", f"{layers * sent:,}", f"{layers * received:,}")
    console.print(table)
    shape = {
        "hiddenSize": config.hidden_size,
        "moeIntermediateSize": config.moe_intermediate_size,
        "routedExperts": config.n_routed_experts,
        "moeLayers": layers,
        "dtype": config.dtype,
    }
    values = ",".join(f"model.shape.{name}={value}" for name, value in shape.items())
    console.print(f"For the chart: --set {values}", soft_wrap=True)


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:,.2f}"
