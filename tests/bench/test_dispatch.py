"""Round trips to a real host in another process, by every way that is here."""

import pytest

from bench import dispatch
from bench.errors import BenchError
from bench.round_trips import TRANSPORTS
from experts.client import ExpertClient

HERE = [name for name in TRANSPORTS if dispatch._is_here(name)]


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WARM_UP_ROUNDS", 1), ("SETTLE_S", 0.0), ("IDLE_S", 0.1)):
        monkeypatch.setattr(dispatch, name, value)


@pytest.mark.parametrize("transport", HERE)
def test_each_payload_goes_there_and_back_through_the_client(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    start = ExpertClient.start

    def count(self: ExpertClient, layer: int, x_TD, routing, placement):  # type: ignore[no-untyped-def]
        sent.append(x_TD.nbytes)
        return start(self, layer, x_TD, routing, placement)

    monkeypatch.setattr(ExpertClient, "start", count)
    rows = dispatch.measure([transport], [4096, 65536], rounds=3)
    assert [(row.transport, row.payload_bytes, row.rounds) for row in rows] == [
        (transport, 4096, 3),
        (transport, 65536, 3),
    ]
    assert sent == [4096] * 4 + [65536] * 4
    for row in rows:
        assert 0 < row.p50_us <= row.p99_us
        assert row.idle_cores is not None
        assert row.lost_ms is not None
        assert 0 < row.lost_ms < 1000 * dispatch.LOST_S


def test_a_death_that_nobody_is_told_of_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "LOST_S", 0.0)  # over at once
    with pytest.raises(BenchError, match="a host that was killed is waited for"):
        dispatch.measure(HERE[-1:], [4096], rounds=1)


def test_a_transport_that_is_not_here_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "find_nixl", lambda: None)
    assert dispatch.measure(["nixl"], [4096], rounds=1) == []
