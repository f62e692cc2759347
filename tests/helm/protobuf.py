"""Kubernetes' protobuf of a Secret, in which Helm keeps its releases: the one message that it sends no other way."""

import base64
from collections.abc import Iterator

from tests.helm.fake_store import Object

CONTENT_TYPE = "application/vnd.kubernetes.protobuf"
MAGIC = b"k8s\x00"
Field = int | bytes


def read_secret(body: bytes) -> Object:
    """The Secret in a request's body; raises ValueError when it is something else."""
    if not body.startswith(MAGIC):
        raise ValueError("the body does not begin as Kubernetes' protobuf does")
    envelope = dict(_fields(body[len(MAGIC) :]))
    about = {number: _text(value) for number, value in _fields(_bytes(envelope[1]))}
    if about != {1: "v1", 2: "Secret"}:
        raise ValueError(f"protobuf of {about} is not known here; only that of a v1 Secret is")
    secret: Object = {"apiVersion": "v1", "kind": "Secret", "metadata": {}, "data": {}}
    for number, value in _fields(_bytes(envelope[2])):
        if number == 1:
            secret["metadata"] = _metadata(_bytes(value))
        elif number == 2:
            name, data = _entry(_bytes(value))
            secret["data"][name] = base64.b64encode(data).decode()
        elif number == 3:
            secret["type"] = _text(value)
    return secret


def _metadata(message: bytes) -> Object:
    names = {1: "name", 3: "namespace", 6: "resourceVersion"}
    metadata: Object = {}
    for number, value in _fields(message):
        if number in names and value:
            metadata[names[number]] = _text(value)
        elif number == 11:
            name, label = _entry(_bytes(value))
            metadata.setdefault("labels", {})[name] = label.decode()
    return metadata


def _entry(message: bytes) -> tuple[str, bytes]:
    """One entry of a map."""
    pair = dict(_fields(message))
    return _text(pair[1]), _bytes(pair.get(2, b""))


def _fields(message: bytes) -> Iterator[tuple[int, Field]]:
    """Number and value of each field: varints and what has a length, as Kubernetes uses no others here."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        value, at = _varint(message, at)
        if key & 7 == 2:
            yield key >> 3, message[at : at + value]
            at += value
        elif key & 7 == 0:
            yield key >> 3, value
        else:
            raise ValueError(f"field {key >> 3} has wire type {key & 7}; expected 0 or 2")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _bytes(value: Field) -> bytes:
    if isinstance(value, int):
        raise ValueError(f"{value} stands where bytes were expected")
    return value


def _text(value: Field) -> str:
    return _bytes(value).decode()
