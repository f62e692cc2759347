"""Hosts in the same process: for one-process serving, and for tests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experts.errors import HostUnavailable
from experts.host import ExpertHost
from experts.messages import ForwardReply, ForwardRequest
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

    def submit(self, host: Host, request: ForwardRequest) -> Pending:
        return _Call(self._hosts.get(host.id), host.id, request)

    def flush(self) -> None:
        pass  # it is computed when the reply is asked for

    def lanes(self, hosts: Sequence[Host]) -> None:
        return None

    def forget(self, host: Host) -> None:
        pass  # nothing is kept open

    def close(self) -> None:
        pass
