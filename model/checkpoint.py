"""A checkpoint in Hugging Face's layout, opened without reading its weights; tensors are read one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from model.config import ModelConfig, parse_config, read_raw_config
from model.generation import read_end_tokens
from model.safetensors_header import CheckpointError, TensorEntry, read_header
from model.tensors import expected_tensors, expert_names

if TYPE_CHECKING:  # whoever reads no weights needs no torch
    from torch import Tensor

__all__ = ["Checkpoint", "CheckpointError", "ExpertWeights", "Stamps"]

NAMED = 5  # tensors named in full in one error
TOLERATED = (".rotary_emb.inv_freq",)  # buffers that old exports carry and nobody needs


Stamps = Mapping[str, tuple[int, int]]
"""Size in bytes and time of the last change in ns, by file name."""


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One routed expert, in the checkpoint's dtype."""

    gate_proj: Tensor  # [Im, H]
    up_proj: Tensor  # [Im, H]
    down_proj: Tensor  # [H, Im]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Config and tensor directory of a checkpoint; holds no weights.

    The config's end tokens are those of config.json, then those that generation_config.json adds.
    """

    directory: Path
    config: ModelConfig
    entries: Mapping[str, TensorEntry]

    @classmethod
    def open(cls, directory: Path | str) -> Checkpoint:
        """Read config.json, generation_config.json's end tokens and every safetensors header.

        Raises ConfigError or CheckpointError, both ValueErrors, naming each missing, unexpected, misshaped or
        truncated tensor, or what is wrong with the directory.
        """
        directory = Path(directory)
        if not directory.exists():
            raise CheckpointError(f"{directory} does not exist: give the directory of a Hugging Face checkpoint")
        if not directory.is_dir():
            raise CheckpointError(f"{directory} is a file; expected the directory that holds config.json")
        config = parse_config(read_raw_config(directory))
        ends = dict.fromkeys((*config.eos_token_ids, *read_end_tokens(directory, config.vocab_size)))
        config = replace(config, eos_token_ids=tuple(ends))
        entries = _read_entries(directory)
        _compare(expected_tensors(config), entries)
        return cls(directory, config, entries)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, in the checkpoint's dtype; raises CheckpointError for an unknown name."""
        return next(self.tensors((name,)))

    def tensors(self, names: Iterable[str]) -> Iterator[Tensor]:
        """Read tensors one at a time, in order; each file is opened once and closed at the end."""
        with ExitStack() as files:
            opened: dict[Path, Any] = {}
            for name in names:
                entry = self.entries.get(name)
                if entry is None:
                    raise CheckpointError(f"{self.directory} has no tensor {name}")
                if entry.file not in opened:
                    opened[entry.file] = files.enter_context(safe_open(entry.file, framework="pt"))
                yield opened[entry.file].get_tensor(name)

    def expert(self, layer: int, expert: int) -> ExpertWeights:
        """Read one routed expert's three matrices."""
        return next(self.experts(layer, (expert,)))

    def experts(self, layer: int, experts: Iterable[int]) -> Iterator[ExpertWeights]:
        """Read routed experts of one layer, one at a time, in order."""
        read = self.tensors(name for expert in experts for name in expert_names(layer, expert))
        for gate, up, down in zip(read, read, read, strict=True):
            yield ExpertWeights(gate, up, down)

    def fingerprint(self) -> str:
        """Sixteen hex digits over config, names, shapes and dtypes; weights are not read, so fine-tunes share it."""
        digest = hashlib.sha256(repr(self.config).encode())
        for name in sorted(self.entries):
            entry = self.entries[name]
            digest.update(f"{name} {entry.shape} {entry.dtype}\n".encode())
        return digest.hexdigest()[:16]

    def stamps(self) -> dict[str, tuple[int, int]]:
        """What tells whether config.json and the files of weights are still those that they were.

        Raises CheckpointError naming one that cannot be looked at.
        """
        found: dict[str, tuple[int, int]] = {}
        for file in sorted({self.directory / "config.json", *(entry.file for entry in self.entries.values())}):
            try:
                status = file.stat()
            except OSError as error:
                raise CheckpointError(f"{file} cannot be read any more: {error.strerror}") from error
            found[file.name] = (status.st_size, status.st_mtime_ns)
        return found

    def check_stamps(self, stamps: Stamps) -> None:
        """Raises CheckpointError naming a file that is not as it was when the stamps were taken."""
        found = self.stamps()
        for name in sorted(found.keys() | stamps.keys()):
            if name not in found or name not in stamps or tuple(stamps[name]) != found[name]:
                raise CheckpointError(
                    f"{self.directory / name} changed since this service started: "
                    "restart the service to serve the new weights"
                )


def _read_entries(directory: Path) -> dict[str, TensorEntry]:
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if index.exists():
        placed = _read_index(index)
        entries: dict[str, TensorEntry] = {}
        for shard in sorted(set(placed.values())):
            path = directory / shard
            if not path.is_file():
                raise CheckpointError(f"{index.name} names {shard}, which is not in {directory}: fetch that shard")
            entries |= read_header(path)
        lost = [name for name, shard in placed.items() if name not in entries]
        if lost:
            raise CheckpointError(f"{index.name} places {_some(lost)} in shards that do not hold them")
        return entries
    if single.exists():
        return read_header(single)
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")):
        raise CheckpointError(f"{directory} has pickled weights only; convert them to safetensors, which run no code")
    raise CheckpointError(f"{directory} has neither model.safetensors nor model.safetensors.index.json")


def _read_index(path: Path) -> dict[str, str]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    placed = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(placed, dict) or not all(isinstance(shard, str) for shard in placed.values()):
        raise CheckpointError(f"{path} has no weight_map of tensor names to file names")
    for shard in set(placed.values()):
        if PurePosixPath(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{path} names {shard!r}; expected a .safetensors file beside it")
    return placed


def _compare(expected: Mapping[str, tuple[int, ...]], entries: Mapping[str, TensorEntry]) -> None:
    problems: list[str] = []
    missing = [name for name in expected if name not in entries]
    if missing:
        problems.append(f"missing {_some(missing)}")
    extra = [
        name
        for name, entry in entries.items()
        if name not in expected and not name.endswith(TOLERATED) and 0 not in entry.shape  # transformers' "none"
    ]
    if "lm_head.weight" in extra and "lm_head.weight" not in expected:
        extra.remove("lm_head.weight")  # a tied head written out all the same
    if extra:
        problems.append(f"unexpected {_some(extra)}")
    misshaped = [
        f"{name} (is {list(entries[name].shape)}, config.json says {list(shape)})"
        for name, shape in expected.items()
        if name in entries and entries[name].shape != shape
    ]
    if misshaped:
        problems.append(f"misshaped {_some(misshaped)}")
    if problems:
        raise CheckpointError(f"the tensors do not fit config.json: {'; '.join(problems)}")


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    rest = f" and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
    return ", ".join(listed[:NAMED]) + rest
