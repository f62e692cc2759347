"""Experts on their way from one host to another: the messages of the gRPC stream `/shoal.Experts/Fetch`.

A receiver names pairs. The host sends a message for each, in that order: the SHA-256 of the rest, then the expert as a
safetensors file. All but the weights is known to the receiver beforehand, so it compares and parses nothing.
"""

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from experts.errors import TransferFailed
from model.checkpoint import ExpertWeights
from router.holding import Pair

METHOD = "/shoal.Experts/Fetch"
DIGEST_BYTES = hashlib.sha256().digest_size
MAX_PAIRS = 1 << 16
MAX_REQUEST_BYTES = 1 << 20
ALIGNMENT = 8  # of the weights in the file, as safetensors itself writes it
LENGTH = struct.Struct("<Q")
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class FetchRequest(BaseModel):
    """Weights that are wanted of one life of a host, in the order in which they shall come."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    generation: int = Field(ge=0)
    pairs: tuple[tuple[int, int], ...] = Field(min_length=1, max_length=MAX_PAIRS, description="(layer, expert)")


@dataclass(frozen=True, slots=True)
class ExpertForm:
    """What every expert of a model looks like on its way: gate and up [I, D], down [D, I]."""

    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        wide, tall = (self.intermediate_size, self.hidden_size), (self.hidden_size, self.intermediate_size)
        return {"gate_proj": wide, "up_proj": wide, "down_proj": tall}

    @property
    def nbytes(self) -> int:
        return 3 * self.hidden_size * self.intermediate_size * self.dtype.itemsize


def encode_request(generation: int, pairs: Sequence[Pair]) -> bytes:
    """Raises ValueError for no pairs, or more than MAX_PAIRS."""
    return FetchRequest(generation=generation, pairs=tuple(pairs)).model_dump_json().encode()


def decode_request(text: bytes) -> FetchRequest:
    """Raises TransferFailed naming what is wrong."""
    if len(text) > MAX_REQUEST_BYTES:
        raise TransferFailed(f"a fetch request of {len(text)} bytes; expected at most {MAX_REQUEST_BYTES}")
    try:
        return FetchRequest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise TransferFailed(f"fetch request: {place}: {first['msg']}") from error


def encode_expert(pair: Pair, weights: ExpertWeights) -> bytes:
    """One expert, with its digest before it."""
    matrices = {"gate_proj": weights.gate_proj, "up_proj": weights.up_proj, "down_proj": weights.down_proj}
    header = _header(pair, {name: (weight.dtype, tuple(weight.shape)) for name, weight in matrices.items()})
    data = [_bytes(weight) for weight in matrices.values()]
    digest = hashlib.sha256(header)
    for part in data:
        digest.update(part)
    return b"".join((digest.digest(), header, *data))  # the only copy


def decode_expert(message: bytes, pair: Pair, form: ExpertForm) -> ExpertWeights:
    """The expert in a message that should hold this one; raises TransferFailed when it holds anything else."""
    header = _header(pair, {name: (form.dtype, shape) for name, shape in form.shapes.items()})
    begin = DIGEST_BYTES + len(header)
    if (found := message[DIGEST_BYTES:begin]) != header:
        given, wanted = (text[LENGTH.size :].rstrip() for text in (found, header))
        raise TransferFailed(f"the expert's header is {given!r}; expected {wanted!r}")
    if len(message) != begin + form.nbytes:
        raise TransferFailed(f"the expert came in {len(message)} bytes; expected {begin + form.nbytes}")
    if hashlib.sha256(memoryview(message)[DIGEST_BYTES:]).digest() != message[:DIGEST_BYTES]:
        raise TransferFailed(f"the digest does not fit expert {pair[1]} of layer {pair[0]}: it was damaged on the way")
    matrices: dict[str, Tensor] = {}
    for name, shape in form.shapes.items():
        size = prod(shape) * form.dtype.itemsize
        raw = np.frombuffer(message, np.uint8, size, begin).copy()  # torch wants writable memory
        matrices[name] = torch.from_numpy(raw).view(form.dtype).view(shape)
        begin += size
    return ExpertWeights(**matrices)


def _header(pair: Pair, matrices: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    """What a safetensors file of these dtypes and shapes begins with."""
    layer, expert = pair
    header: dict[str, object] = {"__metadata__": {"layer": str(layer), "expert": str(expert)}}
    end = 0
    for name, (dtype, shape) in matrices.items():
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return LENGTH.pack(len(text)) + text


def _bytes(weight: Tensor) -> memoryview:
    """The numbers where they lie, if they lie in a row; numpy has no bfloat16."""
    array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = weight.detach().contiguous().view(torch.uint8).numpy()
    return array.data.cast("B")
