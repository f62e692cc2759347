"""Write a checkpoint in Hugging Face's layout: whole or not at all, one shard in memory at a time."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from model.config import parse_config
from model.safetensors_header import CheckpointError
from model.staging import NotWritten, staged
from model.tensors import expected_tensors

SHARD_BYTES = 5_000_000_000
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files that travel with the weights unchanged."""
CODE = "auto_map"
"""config.json's names of Python files beside it, which do not travel: transformers has this model itself."""


def export_checkpoint(
    out: Path | str,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    companions_from: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write `tensors` under Hugging Face's names, with config.json and the companions of another checkpoint, no code.

    Tensors are taken one by one and kept only until their shard, of at most `shard_bytes` or one tensor, is on
    disk; dtypes stay as they come. `out` appears only when all of it is written, so a crash leaves nothing
    half-done under that name.

    Raises CheckpointError when `out` is in use or cannot be written, or the tensors are not those that the config asks
    for.
    """
    out = Path(out).absolute()
    with staged(out) as staging:
        index = _write_shards(staging, out, tensors, shard_bytes)
        _check(config, index.shapes)
        _name_shards(staging, index)
        _write_json(staging / "config.json", {key: value for key, value in config.items() if key != CODE})
        for shard in staging.glob("*.safetensors"):  # which safetensors writes for its owner alone
            shutil.copymode(staging / "config.json", shard)
        for name in COMPANIONS if companions_from is not None else ():
            if companions_from is not None and (companions_from / name).is_file():
                shutil.copyfile(companions_from / name, staging / name)
    return out


class _Index:
    """What was written so far."""

    def __init__(self) -> None:
        self.shards: list[list[str]] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.bytes = 0


def _write_shards(staging: Path, out: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> _Index:
    index = _Index()
    pending: dict[str, Tensor] = {}
    size = 0

    def flush() -> None:
        try:
            save_file(pending, staging / f"part-{len(index.shards)}", metadata={"format": "pt"})
        except SafetensorError as error:  # of a full disk, say
            raise NotWritten(out, str(error)) from error
        index.shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if name in index.shapes:
            raise CheckpointError(f"{name} was given twice")
        if pending and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        pending[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
        index.shapes[name] = tuple(tensor.shape)
        index.bytes += tensor.nbytes
    flush()
    return index


def _check(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    expected = expected_tensors(parse_config(config))
    wrong: Sequence[str] = sorted(
        name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name)
    )
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{len(wrong)} tensors do not fit the config, first {name}: "
            f"given {shapes.get(name)}, expected {expected.get(name)}"
        )


def _name_shards(staging: Path, index: _Index) -> None:
    if len(index.shards) == 1:
        (staging / "part-0").rename(staging / "model.safetensors")
        return
    placed: dict[str, str] = {}
    for number, names in enumerate(index.shards):
        shard = f"model-{number + 1:05d}-of-{len(index.shards):05d}.safetensors"
        (staging / f"part-{number}").rename(staging / shard)
        placed |= dict.fromkeys(names, shard)
    document = {"metadata": {"total_size": index.bytes}, "weight_map": placed}
    _write_json(staging / "model.safetensors.index.json", document)


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
