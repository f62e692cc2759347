"""A delta: new values for some tensors of a base, as expert-specialised fine-tuning leaves them (arXiv 2407.01906)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from model.adapters.errors import AdapterError
from model.adapters.identity import SECOND, base_identities, base_identity
from model.checkpoint import Checkpoint
from model.safetensors_header import TensorEntry, read_header
from model.staging import staged
from model.tensors import expected_tensors, expert_names

if TYPE_CHECKING:  # whoever reads no weights needs no torch
    from torch import Tensor

FILE = "delta_config.json"
WEIGHTS = "delta.safetensors"
FORMAT, VERSION = "shoal-delta", 1
FIELDS = frozenset({"format", "version", "base", "experts", "metadata"})
NAMED = 5  # tensors named in full in one error
Experts = Mapping[int, Sequence[int]]
"""Experts by layer."""


@dataclass(frozen=True, slots=True)
class Delta:
    """A delta that fits a base; holds no weights."""

    directory: Path
    entries: Mapping[str, TensorEntry]
    experts: Experts
    metadata: Mapping[str, Any]

    @property
    def files(self) -> tuple[Path, ...]:
        return self.directory / FILE, self.directory / WEIGHTS

    def changes(self, name: str) -> bool:
        """Whether a tensor of the base, under Hugging Face's name, has a new value."""
        return name in self.entries

    @contextmanager
    def opened(self) -> Iterator[Callable[[str, Tensor], Tensor]]:
        """What turns (name, tensor of the base) into the new tensor, of the same dtype."""
        with safe_open(self.directory / WEIGHTS, framework="pt") as file:

            def change(name: str, tensor: Tensor) -> Tensor:
                return file.get_tensor(name).to(tensor.dtype) if name in self.entries else tensor

            yield change


def write_delta(
    out: Path | str,
    base: Checkpoint,
    experts: Experts,
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, Any] | None = None,
    others: Sequence[str] = (),
) -> Path:
    """Write the new values of `experts`' three matrices each, and of `others`, in the base's dtypes.

    `tensors` go by Hugging Face's names and are taken one by one; in the order of `delta_names` each is written as it
    comes. `metadata` is anything that JSON can hold. `out` appears only when all of it is written. Raises AdapterError
    when a tensor is missing, unknown, misshaped, given twice or not finite, and CheckpointError when it is not in the
    base's dtype or `out` is in use.
    """
    from model.adapters.tensor_file import DTYPES, TensorFile, rounded  # torch is loaded only where it is needed

    out = Path(out).absolute()
    expected = expected_tensors(base.config)
    missing = dict.fromkeys(delta_names(experts, others))
    unknown = [name for name in missing if name not in expected]
    if unknown or not missing:
        raise AdapterError(
            f"the base has no {_some(unknown)}" if unknown else "a delta without tensors changes nothing"
        )
    document = {
        "format": FORMAT,
        "version": VERSION,
        "base": base_identity(base),
        "experts": {str(layer): sorted(set(experts[layer])) for layer in sorted(experts) if experts[layer]},
        "metadata": dict(metadata or {}),
    }
    encoded = json.dumps(document, indent=2) + "\n"
    with staged(out) as staging:
        (staging / FILE).write_text(encoded, encoding="utf-8")
        with (staging / WEIGHTS).open("wb") as raw:
            dtypes = {name: DTYPES[base.entries[name].dtype] for name in missing}
            file = TensorFile(raw, {name: (dtype, expected[name]) for name, dtype in dtypes.items()})
            for name, tensor in tensors:
                if name not in missing:
                    raise AdapterError(f"{name} was given twice, or is none of the delta's")
                if tensor.shape != expected[name]:
                    raise AdapterError(f"{name} is {list(tensor.shape)}; expected {list(expected[name])}")
                if not tensor.isfinite().all():
                    raise AdapterError(f"{name} has numbers that are not finite: training diverged before this")
                del missing[name]
                file.put(name, rounded(name, tensor, dtypes[name]))
        if missing:
            raise AdapterError(f"tensors were not given: {_some(missing)}")
    return out


def delta_names(experts: Experts, others: Sequence[str] = ()) -> list[str]:
    """What `write_delta` wants, in the order of the layers; raises AdapterError naming what `others` need not say."""
    for name in others:
        if ".mlp.experts." in name:
            raise AdapterError(f"{name} is of a routed expert: name the expert by layer and number")
    numbered = [(layer, expert) for layer in sorted(experts) for expert in sorted(set(experts[layer]))]
    return [*others, *(name for layer, expert in numbered for name in expert_names(layer, expert))]


def read_delta(directory: Path | str, base: Checkpoint) -> Delta:
    """Open a delta without reading its weights.

    Raises AdapterError naming what is wrong with its files, the tensors that do not fit, or both bases when it was
    trained on another.
    """
    directory = Path(directory)
    document = _read_document(directory / FILE)
    given, (now, first) = document["base"], base_identities(base)
    if given not in (now, first):
        raise AdapterError(
            f"{directory} was trained on the base {given}; {base.directory} is "
            f"{now if given.startswith(SECOND) else first}: give the base that it was trained on"
        )
    if not (directory / WEIGHTS).is_file():
        raise AdapterError(f"{directory} has no {WEIGHTS}")
    experts = {int(layer): tuple(numbers) for layer, numbers in document["experts"].items()}
    entries = read_header(directory / WEIGHTS)
    expected = expected_tensors(base.config)
    problems = [
        f"{name} is {list(entry.shape)}, expected {list(expected[name]) if name in expected else 'no such tensor'}"
        for name, entry in entries.items()
        if entry.shape != expected.get(name)
    ]
    if problems:
        raise AdapterError(f"{directory} does not fit {base.directory}: {_some(problems)}")
    listed = {name for layer in experts for expert in experts[layer] for name in expert_names(layer, expert)}
    held = {name for name in entries if ".mlp.experts." in name}
    if listed != held:
        raise AdapterError(f"{directory}: {FILE} and {WEIGHTS} differ in {_some(sorted(listed ^ held))}")
    return Delta(directory, entries, experts, document["metadata"])


def _read_document(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{path} does not exist: give the directory of a delta") from None
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise AdapterError(f"{path} is no delta: format is not {FORMAT!r}")
    if raw.get("version") != VERSION:
        raise AdapterError(f"{path} is of version {raw.get('version')!r}; this program reads version {VERSION}")
    match raw:
        case {"base": str(), "experts": dict(experts), "metadata": dict()} if raw.keys() == FIELDS and all(
            layer.isdecimal() and isinstance(numbers, list) and all(type(number) is int for number in numbers)
            for layer, numbers in experts.items()
        ):
            return raw
    raise AdapterError(f"{path} is malformed; expected {', '.join(sorted(FIELDS))}, with experts by layer")


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    rest = f" and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
    return ", ".join(listed[:NAMED]) + rest
