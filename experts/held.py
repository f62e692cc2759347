"""The experts that a host holds: loaded and dropped one by one, while others are computed."""

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.experts import PackedExperts
from kernels.lane import Asked
from kernels.native import triton_serves
from model.checkpoint import Checkpoint, ExpertWeights
from model.config import ModelConfig
from router.holding import Pair

Progress = Callable[[int, int], None]


class ExpertStore(Protocol):
    """One layer's experts in memory; see `kernels.experts.PackedExperts`."""

    merges: bool  # whether a row's bits are the same whatever rows are computed with it

    @property
    def nbytes(self) -> int: ...

    def unpacked_dtype(self, dtypes: Sequence[torch.dtype]) -> torch.dtype: ...

    def load(self, expert: int, gate: Tensor, up: Tensor, down: Tensor) -> None: ...

    def unload(self, expert: int) -> None: ...

    def unpack(self, expert: int) -> tuple[Tensor, Tensor, Tensor]: ...

    def answer(self, lane: int, asked: Asked, held_E: int) -> bool: ...

    def __call__(
        self, x_RD: Tensor, pair_row_P: Tensor, pair_expert_P: Tensor, out_PD: Tensor | None = None
    ) -> Tensor: ...


MakeStore = Callable[[int, int, str], ExpertStore]  # hidden size, intermediate size, device


class HeldExperts:
    """By layer and expert. Methods may be called from several threads, beside one another."""

    def __init__(self, config: ModelConfig, host_id: str, device: str, make_store: MakeStore) -> None:
        self.host_id = host_id
        self.device = device
        self.changes = 0  # experts that were taken or dropped
        self._config = config
        self._make_store = make_store
        self._layers: dict[int, ExpertStore] = {}
        self._held_E: dict[int, npt.NDArray[np.bool_]] = {}  # of each layer, the experts that can be computed
        self._held_address: dict[int, int] = {}  # of those, for native code
        self._held: dict[Pair, int] = {}  # the same, with the bytes that each takes
        self._changes = threading.Lock()  # one thread at a time loads or unloads; taken before the others
        self._compute = threading.RLock()  # kernels use the host's whole thread budget
        self._counts = threading.Lock()  # guards `_held`, and is never held for long

    def load(self, checkpoint: Checkpoint, held: Iterable[Pair], progress: Progress | None = None) -> None:
        """Read those of the named (layer, expert) pairs that are not held yet from disk, one expert at a time."""
        present = set(self.held)
        wanted = [pair for pair in held if pair not in present]
        for layer, expert in wanted:
            self._check_pair(layer, expert)
        done = 0
        for layer, pairs in itertools.groupby(wanted, key=lambda pair: pair[0]):
            experts = [expert for _, expert in pairs]
            for expert, weights in zip(experts, checkpoint.experts(layer, experts), strict=True):
                self.take(layer, expert, weights)
                done += 1
                if progress is not None:
                    progress(done, len(wanted))

    def take(self, layer: int, expert: int, weights: ExpertWeights) -> bool:
        """Hold one expert; requests see it once it is complete. False when it is held already, and stays as it is.

        Raises ValueError when the model has no such expert, or one of other shapes.
        """
        self._check_pair(layer, expert)
        with self._changes:
            if (layer, expert) in self._held:
                return False  # a request may be reading it
            target = self._layer(layer)
            # a recorded step knows where a layer's table lies: it is replayed before a change of it, or not at all
            with self._compute if self.computes_slots else nullcontext():
                before = target.nbytes
                target.load(expert, weights.gate_proj, weights.up_proj, weights.down_proj)
                with self._counts:
                    self._held[layer, expert] = target.nbytes - before
                self._held_E[layer][expert] = True
                self.changes += 1
        return True

    def weights_dtype(self, layer: int, dtypes: Sequence[torch.dtype]) -> torch.dtype:
        """Of what `weights` gives, and a host like this one sends, for an expert that is stored in these dtypes."""
        with self._changes:
            return self._layer(layer).unpacked_dtype(dtypes)

    def weights(self, layer: int, expert: int) -> ExpertWeights:
        """What this host computes with, on the CPU and to be read only; its dtype is `weights_dtype`.

        Raises KeyError for an expert that is not held. One that is unloaded meanwhile is still returned whole.
        """
        experts = self._layers.get(layer)
        try:
            if experts is None or (layer, expert) not in self._held:
                raise KeyError(expert)
            return ExpertWeights(*(weight.cpu() for weight in experts.unpack(expert)))
        except KeyError:
            raise KeyError(f"{self.host_id} does not hold expert {expert} of layer {layer}") from None

    def unload(self, held: Iterable[Pair]) -> None:
        """Drop the named pairs and free their memory; raises KeyError, and drops none, when one is not held."""
        pairs = list(dict.fromkeys(held))
        with self._changes:
            for pair in pairs:
                if pair not in self._held:
                    raise KeyError(pair)
            with self._compute:  # what is being computed may have begun with them; nothing begins with them after this
                for layer, expert in pairs:
                    self._held_E[layer][expert] = False
                with self._counts:
                    for pair in pairs:
                        del self._held[pair]
                for layer, expert in pairs:
                    self._layers[layer].unload(expert)
                self.changes += len(pairs)

    @property
    def held(self) -> tuple[Pair, ...]:
        """(layer, expert) pairs, in that order."""
        with self._counts:
            pairs = tuple(self._held)
        return tuple(sorted(pairs))

    @property
    def computes_slots(self) -> bool:
        """Whether a whole step's slots can be computed on this host's GPU without waiting for it."""
        return self._make_store is PackedExperts and triton_serves(self.device)

    def store(self, layer: int) -> ExpertStore:
        """What holds a layer's experts; raises KeyError where none is held."""
        return self._layers[layer]

    def computing(self) -> AbstractContextManager[object]:
        """Nothing else is computed, and nothing unloaded, meanwhile."""
        return self._compute

    def _layer(self, layer: int) -> ExpertStore:
        if layer not in self._layers:
            held_E = self._held_E[layer] = np.zeros(self._config.n_routed_experts, np.bool_)
            self._held_address[layer] = held_E.ctypes.data
            # last: who computes looks for this first
            self._layers[layer] = self._make_store(
                self._config.hidden_size, self._config.moe_intermediate_size, self.device
            )
        return self._layers[layer]

    def _check_pair(self, layer: int, expert: int) -> None:
        if layer not in self._config.moe_layers:
            raise ValueError(f"layer {layer} has no routed experts; MoE layers are {self._config.moe_layers}")
        if not 0 <= expert < self._config.n_routed_experts:
            raise ValueError(f"layer {layer} has no expert {expert}; it has {self._config.n_routed_experts}")
