"""The manifest: what a snapshot is of, and which file holds which tensor. It is written last and vouches for itself."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, JsonValue, TypeAdapter, ValidationError

from model.snapshots.errors import SnapshotBroken, SnapshotError
from model.snapshots.layout import check_shard_name, step_name

FORMAT = "shoal-snapshot"
VERSION = 1

Json = Mapping[str, JsonValue]


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a snapshot, as its writer saw it. Raises SnapshotError for a name with more than a file name."""

    name: str
    nbytes: int
    sha256: str  # of the whole file
    tensors: tuple[str, ...]

    def __post_init__(self) -> None:
        check_shard_name(self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Raises SnapshotError for what JSON would not give back as it was, and for a shard or tensor named twice."""

    step: int  # steps made
    run_id: str
    fingerprint: str  # of the model, `Checkpoint.fingerprint`
    position: Json  # in the training data
    recipe: Json
    rng: Json
    shards: tuple[Shard, ...]
    extra: Json = field(default_factory=dict)

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")  # where decode() fills it, and its shards

    def __post_init__(self) -> None:
        step_name(self.step)
        for name, text in (("run_id", self.run_id), ("fingerprint", self.fingerprint)):
            if not text:
                raise SnapshotError(f"{name} is empty; expected what names this {name.removesuffix('_id')}")
        for name in ("position", "recipe", "rng", "extra"):
            _check_json(name, getattr(self, name))
        _check_once("shard", [shard.name for shard in self.shards])
        _check_once("tensor", [tensor for shard in self.shards for tensor in shard.tensors])


def encode(manifest: Manifest) -> bytes:
    """The file's content, a function of the manifest alone."""
    return _sealed({"format": FORMAT, "version": VERSION, **asdict(manifest)})


def decode(raw: bytes, path: Path) -> Manifest:
    """The manifest of a file's content; `path` is for the errors.

    Raises SnapshotBroken when any byte is not as written, and SnapshotError when the format is not this one: the seal
    is the same in every version, so what another version wrote is never taken for damage.
    """
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise SnapshotBroken(f"{path} is cut short or damaged: it is not JSON ({error})") from error
    if not isinstance(document, dict) or document.pop("sha256", None) is None or _sealed(document) != raw:
        raise SnapshotBroken(f"{path} is cut short or damaged: its checksum does not hold")
    found = (document.pop("format", None), document.pop("version", None))
    if found != (FORMAT, VERSION):
        raise SnapshotError(
            f"{path} is of format {found[0]!r} version {found[1]!r}; expected {FORMAT!r} version {VERSION}: "
            "resume with the release that wrote it, or move its directory away"
        )
    try:
        return _MANIFEST.validate_python(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise SnapshotBroken(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


_MANIFEST = TypeAdapter(Manifest)


def _sealed(document: Mapping[str, Any]) -> bytes:
    checksum = hashlib.sha256(_dumps(document)).hexdigest()
    return _dumps({**document, "sha256": checksum}) + b"\n"


def _dumps(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def _check_json(name: str, value: Json) -> None:
    try:
        same = json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError, RecursionError) as error:
        raise SnapshotError(f"{name} cannot be written as JSON: {error}") from error
    if not same or not isinstance(value, dict):
        raise SnapshotError(
            f"{name} would not be read back from JSON as it is: {value!r:.200}; "
            "expected a dict of str to numbers, str, bool, None, lists and such dicts"
        )


def _check_once(kind: str, names: list[str]) -> None:
    name, times = Counter(names).most_common(1)[0] if names else ("", 1)
    if times > 1:
        raise SnapshotError(f"{kind} {name} is there {times} times; expected each {kind} once in a snapshot")
