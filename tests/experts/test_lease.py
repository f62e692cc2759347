"""Lease messages: what was said is what is heard, and nothing else passes."""

import subprocess
import sys

import pytest

from experts.lease import Accept, Hello, LeaseRefused, Offer, decode, encode
from experts.transport_kinds import check_transport
from experts.transports import open_door, open_transport

OFFER = Offer(agent="a", metadata=b"\x00\xff", bell=None, address=2**64 - 1, host="host-0", generation=1, near=True)


def test_messages_survive() -> None:
    assert decode(Offer, encode(OFFER)) == OFFER
    hello = Hello(version=1, machine="m", slots=4, request_bytes=4096, reply_bytes=8192)
    assert decode(Hello, encode(hello)) == hello


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"noise",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"version":1,"machine":"m","slots":99,"request_bytes":4096,"reply_bytes":4096}',
        b'{"version":1,"machine":"m","slots":4,"request_bytes":-1,"reply_bytes":4096}',
        b'{"version":1,"machine":"m","slots":4,"request_bytes":4096,"reply_bytes":99999999999}',
        b'{"version":1,"machine":"m","slots":4,"request_bytes":"4096","reply_bytes":4096}',
        b'{"version":1,"machine":"m","slots":4,"request_bytes":4096,"reply_bytes":4096,"more":1}',
        b" " * 1_000_000,
    ],
)
def test_what_is_no_hello_is_refused(text: bytes) -> None:
    with pytest.raises(LeaseRefused, match="lease message"):
        decode(Hello, text)


def test_metadata_must_be_base64() -> None:
    with pytest.raises(LeaseRefused, match="base64"):
        decode(Accept, b'{"agent":"a","metadata":"!!","bell":null,"address":1}')


def test_an_unknown_transport_is_named() -> None:
    with pytest.raises(ValueError, match="transport is 'pigeon'; expected one of auto, nixl, grpc"):
        check_transport("pigeon")


def test_nixl_leaves_the_logging_of_others_alone() -> None:
    code = """
import logging, logging.handlers, sys
from experts.nixl import find_nixl
handler = logging.handlers.MemoryHandler(9, target=logging.StreamHandler())
logging.getLogger("another").addHandler(handler)
find_nixl()
sys.exit(handler.target is None or not logging.raiseExceptions)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_nixl_that_is_not_installed_is_said_so_and_auto_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experts.nixl.MODULES", ("no_such_module",))
    with pytest.raises(ValueError, match=r"install shoal\[nixl\]"):
        open_door("nixl", "host-0", 1)
    assert open_door("auto", "host-0", 1) is None
    transport = open_transport("auto", None, None, 8, 2, 64)
    assert type(transport).__name__ == "GrpcTransport"
    transport.close()
