"""Waiting for a reply that a host writes into this process: first looking for it, then asleep until the bell rings."""

import time
from collections.abc import Callable

from experts.bell import Bell
from experts.client_slots import SlotTable
from experts.errors import HostSlow, HostUnavailable
from experts.pairing import Pairing, PairingFailed
from experts.patience import Patience
from router.placement import Host

NEAR_SLEEP_S = 5e-3  # the bell ends it; this is for a note that was still on its way when it rang
FAR_SLEEP_S = 20e-6


class Arrival:
    """Of one host's replies; one thread at a time waits."""

    def __init__(self, host: Host, bell: Bell, crowded: Callable[[], bool]) -> None:
        """`crowded` says whether hosts may need every core, so that looking would take one from them."""
        self._host = host
        self._bell = bell
        self._crowded = crowded
        self._patience = Patience()

    def wait(
        self, pairing: Pairing, slots: SlotTable, slot: int, deadline_s: float, ended: Callable[[], str | None]
    ) -> int:
        """Bytes of the reply in a slot, once it is there.

        Raises HostSlow past `deadline_s`, on the monotonic clock, and HostUnavailable when `ended` says why no reply
        will come, or the agent failed.
        """
        self._bell.enter()
        try:
            return self._wait(pairing, slots, slot, deadline_s, ended)
        except PairingFailed as error:
            raise self._lost(str(error)) from error
        finally:
            self._bell.leave()

    def _wait(
        self, pairing: Pairing, slots: SlotTable, slot: int, deadline_s: float, ended: Callable[[], str | None]
    ) -> int:
        started_s = time.monotonic()

        def look() -> bool:
            if pairing.poll():
                self._bell.ring_others()
            return slots.length(slot) > 0 or ended() is not None

        crowded = self._crowded()
        look_until_s = started_s + (0.0 if crowded else self._patience.look_s)
        slept = False
        while (length := slots.length(slot)) <= 0:
            if (reason := ended()) is not None:
                raise self._lost(reason)
            if look():
                continue
            now_s = time.monotonic()
            if now_s >= deadline_s:
                raise HostSlow(f"{self._host.id} at {self._host.address}: no reply in {now_s - started_s:.1f} s")
            if now_s >= look_until_s:
                slept = True
                if pairing.near:
                    self._bell.wait(min(NEAR_SLEEP_S, deadline_s - now_s), look)
                else:
                    time.sleep(FAR_SLEEP_S)
        if not crowded:
            self._patience.waited(slept)
        return length

    def _lost(self, reason: str) -> HostUnavailable:
        return HostUnavailable(f"{self._host.id} at {self._host.address}: {reason}")
