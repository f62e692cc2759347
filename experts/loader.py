"""Experts that a living host takes on: from hosts that hold them, else from disk, and all of them or none."""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.errors import ExpertError, TransferFailed
from experts.fetch import fetch
from experts.host import ExpertHost
from experts.tls import TlsFiles
from experts.transfer import DTYPES, ExpertForm
from model.checkpoint import Checkpoint, ExpertWeights, Stamps
from model.tensors import expert_names
from router.holding import Pair
from router.placement import Host

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number
FROM_NAME = {name: dtype for dtype, name in DTYPES.items()}
log = logging.getLogger("shoal.experts")


class LoadAbandoned(ExpertError):
    """A load was given up at its caller's wish; the host holds what it did before."""


class WeightsDamaged(ExpertError):
    """A host does not hold the bits that it was given: its memory cannot be trusted."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Where the pairs came from that were not held before, and why some did not come from their source."""

    from_hosts: int
    from_disk: int
    seconds: float
    reasons: tuple[str, ...] = ()


class Loader:
    """Loads for one host. Calls take turns, so that one that is undone takes nothing from another."""

    def __init__(
        self,
        host: ExpertHost,
        checkpoint: Checkpoint,
        token: str | None = None,
        tls: TlsFiles | None = None,
        stall_s: float = 10.0,
        stamps: Stamps | None = None,
    ) -> None:
        """A source has `stall_s` for each expert. What is read from disk must have these stamps, if given."""
        self._host = host
        self._checkpoint = checkpoint
        self._token = token
        self._tls = tls
        self._stall_s = stall_s
        self._stamps = stamps
        self._turn = threading.Lock()

    def load(
        self,
        pairs: Collection[Pair],
        sources: Mapping[Pair, Host],
        abandoned: Callable[[], bool],
        progress: Callable[[int], None],
    ) -> LoadReport:
        """Hold all of `pairs`; `progress` hears how many are held so far, those that were held before included.

        Raises LoadAbandoned when `abandoned` says so between two experts, CheckpointError when the disk has other
        weights than when the service started, and WeightsDamaged when an expert is not held as it came. Whatever is
        raised, the pairs that this call loaded are unloaded first.
        """
        with self._turn, ExitStack() as undo:
            started_s = time.monotonic()
            wanted = sorted(set(pairs) - set(self._host.held))
            load = _Load(self._host, abandoned, progress, len(set(pairs)) - len(wanted))
            undo.callback(load.undo)
            load.go_on()
            by_source: dict[Host, list[Pair]] = {}
            for pair in wanted:
                if pair in sources:
                    by_source.setdefault(sources[pair], []).append(pair)
            reasons: list[str] = []
            for source, offered in by_source.items():
                try:
                    self._from_host(source, offered, load)
                except TransferFailed as failure:
                    left = len(set(offered) - set(load.taken))
                    log.warning("%s reads %d experts from disk: %s", self._host.host_id, left, failure)
                    reasons.append(str(failure))
            from_hosts = len(load.taken)
            self._from_disk([pair for pair in wanted if pair not in set(load.taken)], load)
            load.go_on()
            undo.pop_all()
            from_disk = len(load.taken) - from_hosts
            return LoadReport(from_hosts, from_disk, time.monotonic() - started_s, tuple(reasons))

    def _from_host(self, source: Host, pairs: list[Pair], load: "_Load") -> None:
        for form, group in itertools.groupby(pairs, key=self._form):
            with closing(fetch(source, list(group), form, self._token, self._tls, self._stall_s)) as received:
                for pair, weights in received:
                    load.keep(pair, weights)
                    load.go_on()

    def _form(self, pair: Pair) -> ExpertForm:
        """What a host like this one sends."""
        config = self._checkpoint.config
        dtypes = [FROM_NAME[self._checkpoint.entries[name].dtype] for name in expert_names(*pair)]
        dtype = self._host.weights_dtype(pair[0], dtypes)
        return ExpertForm(config.hidden_size, config.moe_intermediate_size, dtype)

    def _from_disk(self, pairs: Iterable[Pair], load: "_Load") -> None:
        for layer, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
            self._check_disk()
            experts = [expert for _, expert in group]
            for expert, weights in zip(experts, self._checkpoint.experts(layer, experts), strict=True):
                load.keep((layer, expert), weights)
                load.go_on()
            self._check_disk()  # nor did a file change while it was read

    def _check_disk(self) -> None:
        if self._stamps is not None:
            self._checkpoint.check_stamps(self._stamps)


class _Load:
    """One call's experts so far."""

    def __init__(
        self, host: ExpertHost, abandoned: Callable[[], bool], progress: Callable[[int], None], before: int
    ) -> None:
        self.taken: list[Pair] = []
        self._host = host
        self._abandoned = abandoned
        self._progress = progress
        self._before = before  # pairs that were held

    def go_on(self) -> None:
        """Say how far it is; raises LoadAbandoned when nobody wants the rest."""
        if self._abandoned():
            raise LoadAbandoned(f"{self._host.host_id} gave up a load after {len(self.taken)} experts, and undid it")
        self._progress(self._before + len(self.taken))

    def keep(self, pair: Pair, weights: ExpertWeights) -> None:
        """Let the host take an expert, and look at what it has of it then."""
        if not self._host.take(*pair, weights):
            return
        self.taken.append(pair)
        if not _same_bits(self._host.weights(*pair), weights):
            layer, expert = pair
            raise WeightsDamaged(
                f"{self._host.host_id} does not hold the bits of expert {expert} of layer {layer} that it was given: "
                "test its memory"
            )

    def undo(self) -> None:
        self._host.unload(set(self.taken) & set(self._host.held))


def _same_bits(held: ExpertWeights, given: ExpertWeights) -> bool:
    """Whether one is the other in the dtype in which the host keeps it."""
    return all(
        torch.equal(_bits(ours), _bits(theirs.to(ours.dtype)))
        for ours, theirs in (
            (held.gate_proj, given.gate_proj),
            (held.up_proj, given.up_proj),
            (held.down_proj, given.down_proj),
        )
    )


def _bits(weight: Tensor) -> Tensor:
    return weight.contiguous().view(BITS[weight.element_size()])
