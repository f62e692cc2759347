"""Hosts in the same process: for one-process serving, and for tests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experts.errors import HostUnavailable
from experts.host import ExpertHost
from experts.messages import ForwardReply, ForwardRequest
from experts.near import NearHosts
from experts.transport import Pending
from router.placement import Host


@dataclass(frozen=True, slots=True)
class _Call:
    host: ExpertHost | None
    host_id: str
    request: ForwardRequest

    def result(self, timeout_s: float) -> ForwardReply:
        if self.host is None:
            raise HostUnavailable(f"{self.host_id} is not in this process")
        return self.host.forward(self.request)

    def release(self) -> None:
        pass  # the reply owns its memory


class LocalTransport:
    """Calls hosts directly, when the reply is asked for. `hosts` may change while it is in use."""

    def __init__(self, hosts: Mapping[str, ExpertHost]) -> None:
        self._hosts = hosts
        self._near: tuple[tuple[Host, ...], tuple[ExpertHost, ...], NearHosts] | None = None

    def submit(self, host: Host, request: ForwardRequest) -> Pending:
        return _Call(self._hosts.get(host.id), host.id, request)

    def flush(self) -> None:
        pass  # it is computed when the reply is asked for

    def lanes(self, hosts: Sequence[Host]) -> NearHosts | None:
        names = tuple(hosts)
        found = tuple(self._hosts[host.id] for host in names if host.id in self._hosts)
        if len(found) < len(names) or not all(host.computes_slots for host in found):
            return None
        if len({host.device for host in found}) != 1:
            return None
        if self._near is None or self._near[:2] != (names, found):
            self._near = (names, found, NearHosts(names, found))
        return self._near[2]

    def forget(self, host: Host) -> None:
        pass  # nothing is kept open

    def close(self) -> None:
        pass
