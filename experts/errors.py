"""What can go wrong between an attention worker and the expert hosts.

ExpertError
├── HostUnavailable      the host did not answer: connection lost, refused or timed out; another may
│   └── HostSlow         not yet: the same call can be waited for again
├── HostRefused          the host answered that it cannot serve this: its code says why
├── CallRefused          a host cannot do what it was told, nor could another: it does not fit what the host holds
├── FrameError           bytes that are not a frame, or lie about themselves (also a ValueError)
├── TransferFailed       a host did not hand over an expert's weights, or they cannot be trusted; the disk has them too
└── ExpertsUnavailable   every holder stayed unreachable for the client's whole deadline
"""


class ExpertError(Exception):
    """Root of the errors of this package."""


class HostUnavailable(ExpertError):
    """No answer from a host. The request had no effect, and may be sent again or elsewhere."""


class HostSlow(HostUnavailable):
    """No answer so far. The call is still under way, and can be waited for again or released."""


class HostRefused(ExpertError):
    """A host's own word that it cannot serve a request.

    Codes: `wrong_generation` (it is a later life), `not_held` (the expert is elsewhere), `not_ready` (it is not where
    the training is), `unreachable` (memory that was to be shared), `failed` (it tried, and ran out of memory for
    example), `bad_request`.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    @property
    def may_pass(self) -> bool:
        """True when another host, or a newer placement, can lead to one that accepts."""
        return self.code in ("wrong_generation", "not_held", "not_ready", "failed")

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class CallRefused(ExpertError):
    """A call to a training host that is malformed or does not fit, such as a snapshot of another way of training."""


class FrameError(ExpertError, ValueError):
    """A message that cannot be decoded; says what was found and what was expected."""


class TransferFailed(ExpertError):
    """An expert's weights did not come from a host as they should; says what came instead."""


class ExpertsUnavailable(ExpertError):
    """Experts of a layer had no reachable holder within the deadline."""

    def __init__(self, layer: int, experts: tuple[int, ...], waited_s: float, last: str) -> None:
        super().__init__(layer, experts, waited_s, last)
        self.layer = layer
        self.experts = experts
        self.waited_s = waited_s
        self.last = last

    def __str__(self) -> str:
        return (
            f"layer {self.layer}: no host answered for experts {list(self.experts)} "
            f"within {self.waited_s:.1f} s ({self.last})"
        )
