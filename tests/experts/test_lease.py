"""Lease messages: what was said is what is heard, and nothing else passes."""

import subprocess
import sys

import pytest

from experts.lane import lanes_serve
from experts.lease import Accept, Hello, LeaseRefused, NixlEnd, Offer, SharedEnd, decode, encode
from experts.transport_kinds import Ways, check_transport
from experts.transports import open_door, open_transport, ways_of

NIXL = NixlEnd(agent="a", metadata=b"\x00\xff", bell=None, address=2**64 - 1)


def test_messages_survive() -> None:
    for end in (NIXL, SharedEnd(memory="m", bell="b")):
        offer = Offer(host="host-0", generation=1, near=True, end=end)
        assert decode(Offer, encode(offer)) == offer
        assert decode(Accept, encode(Accept(end=end))).end == end
    hello = Hello(version=1, machine="m", slots=4, request_bytes=4096, reply_bytes=8192, shared=True, nixl=False)
    assert decode(Hello, encode(hello)) == hello


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"noise",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"version":1,"machine":"m","slots":99,"request_bytes":4096,"reply_bytes":4096,"shared":true,"nixl":true}',
        b'{"version":1,"machine":"m","slots":4,"request_bytes":-1,"reply_bytes":4096,"shared":true,"nixl":true}',
        b'{"version":1,"machine":"m","slots":4,"request_bytes":4096,"reply_bytes":99999999999,"shared":true,"nixl":true}',
        b'{"version":1,"machine":"m","slots":4,"request_bytes":"4096","reply_bytes":4096,"shared":true,"nixl":true}',
        b'{"version":1,"machine":"m","slots":4,"request_bytes":4096,"reply_bytes":4096,"more":1,"shared":true,"nixl":true}',
        b" " * 1_000_000,
    ],
)
def test_what_is_no_hello_is_refused(text: bytes) -> None:
    with pytest.raises(LeaseRefused, match="lease message"):
        decode(Hello, text)


def test_metadata_must_be_base64() -> None:
    with pytest.raises(LeaseRefused, match="base64"):
        decode(Accept, b'{"end":{"way":"nixl","agent":"a","metadata":"!!","bell":null,"address":1}}')


@pytest.mark.parametrize("end", ['{"way":"pigeon"}', '{"way":"shared"}', '{"memory":"m","bell":"b"}', '{"way":"nixl"}'])
def test_a_way_must_be_known_and_complete(end: str) -> None:
    with pytest.raises(LeaseRefused, match="lease message"):
        decode(Accept, f'{{"end":{end}}}'.encode())


def test_an_unknown_transport_is_named() -> None:
    with pytest.raises(ValueError, match="transport is 'pigeon'; expected one of auto, shared, nixl, grpc"):
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
    monkeypatch.setattr("experts.transports.lanes_serve", lambda: False)
    assert open_door("auto", "host-0", 1) is None
    transport = open_transport("auto", None, None, 8, 2, 64)
    assert type(transport).__name__ == "GrpcTransport"
    transport.close()


def test_shared_memory_that_cannot_be_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experts.transports.lanes_serve", lambda: False)
    with pytest.raises(ValueError, match="takes Linux and the native kernels"):
        ways_of("shared")


@pytest.mark.skipif(not lanes_serve(), reason="no native kernels are built")
def test_nixl_is_not_looked_for_where_memory_can_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experts.nixl.MODULES", ("no_such_module",))
    assert ways_of("auto") == ways_of("shared") == Ways(shared=True, nixl=False)
    monkeypatch.setattr("experts.nixl.MODULES", ("no_such_module", "json"))  # which is there, and is not imported
    monkeypatch.setattr("experts.nixl.importlib.import_module", pytest.fail)
    assert ways_of("auto") == Ways(shared=True, nixl=True)
    assert ways_of("shared") == Ways(shared=True, nixl=False)
