"""One routed expert that learns: its matrices, or low-rank factors beside them, and AdamW's state of what is trained.

Shapes: `N` rows of this expert, `D` model, `I` intermediate, `r` rank.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from experts.training.adamw import Trained
from experts.training.spec import ExpertTraining
from kernels.gated import gated, weighted_gradients
from model.checkpoint import ExpertWeights
from router.holding import Pair

MATRICES = ("gate_up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Contribution:
    """What one call adds to an expert's gradients, kept until it is its turn."""

    x_ND: Tensor
    dout_ND: Tensor
    h_NI: Tensor  # weighted, which is less work than to weight dout
    dgate_up_N2I: Tensor


@dataclass(slots=True)
class TrainedExpert:
    """gate_up [2I, D] and down [D, I], fp32. `version` counts the steps made in a run, -1 before `configure`."""

    gate_up: Tensor
    down: Tensor
    version: int = -1
    parameters: dict[str, Trained] = field(default_factory=dict)
    _scale: float = 0.0  # of the low-rank product; 0 where there is none
    _used: tuple[Tensor, Tensor] | None = None  # what is computed with, where that is not the matrices themselves
    _rounded: bool = False
    _kept: deque[tuple[Tensor, Tensor]] = field(default_factory=lambda: deque(maxlen=0))  # x [N, D], gate_up [N, 2I]

    def configure(self, pair: Pair, training: ExpertTraining) -> None:
        """Begin a run from the weights that are held: no gradients, no moments, version 0."""
        self.version = 0
        self._scale = 0.0
        self._rounded = training.dtype == "bfloat16"
        self.parameters = {}
        if training.trains(pair):
            if training.lora is None:
                self.parameters = {"gate_up_proj": Trained(self.gate_up), "down_proj": Trained(self.down)}
            else:
                self._scale = training.lora.scale
                self.parameters = {name: Trained(value) for name, value in _low_rank(self, pair, training)}
        self._round()

    @property
    def nbytes(self) -> int:
        """Of everything that is held for it from step to step."""
        held = [self.gate_up, self.down]
        for trained in self.parameters.values():
            more = (trained.value, trained.buffer, trained.mean, trained.square)
            held.extend(tensor for tensor in more if tensor is not None and all(tensor is not one for one in held))
        if self._used is not None:
            held.extend(self._used)
        return sum(tensor.nbytes for tensor in held)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Unweighted output [N, D]. `x_ND` is not changed afterwards."""
        gate_up_N2I = self._gate_up(x_ND)
        self._kept.append((x_ND, gate_up_N2I))
        return self._linear("down_proj", self._matrices[1], gated(*gate_up_N2I.chunk(2, dim=-1)))

    def backward(self, x_ND: Tensor, dout_ND: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor, Contribution]:
        """dx [N, D] and dweight [N] of weight · expert(x), for the output gradient dout, and what the gradients gain.

        What forward of these rows computed is taken, if it was kept, or else computed again, which gives the same bits.
        dweight = dout · y is taken as (dout W_down) · h, which needs no y.
        """
        _, down = self._matrices
        gate_up_N2I = self._take(x_ND)
        if gate_up_N2I is None:
            gate_up_N2I = self._gate_up(x_ND)
        dh_NI = dout_ND @ down
        if self._scale:
            factor_a, factor_b = self._factors("down_proj")
            dh_NI += self._scale * ((dout_ND @ factor_b) @ factor_a)
        gate_NI, up_NI = gate_up_N2I.chunk(2, dim=-1)
        dgate_up_N2I, h_NI, dweight_N = weighted_gradients(gate_NI, up_NI, weight_N, dh_NI)
        dx_ND = dgate_up_N2I @ self._matrices[0]
        if self._scale:
            factor_a, factor_b = self._factors("gate_up_proj")
            dx_ND += self._scale * ((dgate_up_N2I @ factor_b) @ factor_a)
        return dx_ND, dweight_N, Contribution(x_ND, dout_ND, h_NI, dgate_up_N2I)

    def accumulate(self, gained: Contribution) -> None:
        """Add to the gradients."""
        if not self.parameters:
            return
        products = (("gate_up_proj", gained.dgate_up_N2I, gained.x_ND), ("down_proj", gained.dout_ND, gained.h_NI))
        for name, dout, into in products:
            if not self._scale:
                self.parameters[name].add(dout, into)
                continue
            factor_a, factor_b = self._factors(name)
            self.parameters[f"{name}.lora_A"].add(self._scale * (dout @ factor_b), into)
            self.parameters[f"{name}.lora_B"].add(self._scale * dout, into @ factor_a.T)

    def begin(self, kept: int) -> None:
        """Begin a step without gradients; of so many forwards, what they computed is kept for backward."""
        self.drop_gradients()
        self._kept = deque(maxlen=kept)

    def drop_gradients(self) -> None:
        self._kept.clear()
        for trained in self.parameters.values():
            trained.grad = None

    def stepped(self) -> None:
        """The values of the parameters changed: one step more."""
        self.version += 1
        self.drop_gradients()
        self._round()

    def replace(self, weights: ExpertWeights) -> None:
        """Take a checkpoint's weights; `configure` comes next."""
        first = matrices(weights)
        self.gate_up.copy_(first["gate_up_proj"])
        self.down.copy_(first["down_proj"])

    def state(self) -> dict[str, Tensor]:
        """Everything but gradients that another holder needs to go on bit for bit."""
        return {"gate_up_proj": self.gate_up, "down_proj": self.down} | self.learned()

    def learned(self) -> dict[str, Tensor]:
        """What of its state the checkpoint does not have: parameters that are trained, and their moments."""
        learned: dict[str, Tensor] = {}
        for name, trained in self.parameters.items():
            mean, square = trained.moments()
            learned |= {name: trained.value, f"{name}.mean": mean, f"{name}.square": square}
        return learned

    def restore(self, state: Mapping[str, Tensor], version: int) -> None:
        """Take over a state; raises ValueError when it has other names or shapes than this expert's."""
        wanted = {name: tuple(tensor.shape) for name, tensor in self.state().items()}
        given = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if wanted != given:
            wrong = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
            raise ValueError(
                f"the state's {wrong[0]} is {given.get(wrong[0])}; expected {wanted.get(wrong[0])}: "
                "it is of another model or another way of training"
            )
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        self.version = version
        self.drop_gradients()
        self._round()

    @property
    def _matrices(self) -> tuple[Tensor, Tensor]:
        return self._used if self._used is not None else (self.gate_up, self.down)

    def _take(self, x_ND: Tensor) -> Tensor | None:
        """gate_up of exactly these rows, where it was kept: it is there once."""
        for place, (kept_ND, gate_up_N2I) in enumerate(self._kept):
            if torch.equal(kept_ND, x_ND):
                del self._kept[place]
                return gate_up_N2I
        return None

    def _gate_up(self, x_ND: Tensor) -> Tensor:
        return self._linear("gate_up_proj", self._matrices[0], x_ND)

    def _linear(self, name: str, matrix: Tensor, x: Tensor) -> Tensor:
        out = F.linear(x, matrix)
        if self._scale:
            factor_a, factor_b = self._factors(name)
            out += self._scale * F.linear(F.linear(x, factor_a), factor_b)
        return out

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        return self.parameters[f"{name}.lora_A"].value, self.parameters[f"{name}.lora_B"].value

    def _round(self) -> None:
        if self._rounded:
            self._used = (self.gate_up.bfloat16().float(), self.down.bfloat16().float())
        else:
            self._used = None


def matrices(weights: ExpertWeights) -> dict[str, Tensor]:
    """A checkpoint's weights by a state's names: gate_up_proj [2I, D], down_proj [D, I], in the checkpoint's dtype."""
    return {"gate_up_proj": torch.cat((weights.gate_proj, weights.up_proj)), "down_proj": weights.down_proj}


def _low_rank(expert: TrainedExpert, pair: Pair, training: ExpertTraining) -> Iterator[tuple[str, Tensor]]:
    """First factors: A as PEFT draws it, uniform in ± in^-0.5 and a function of the run's seed and the pair; B zero."""
    assert training.lora is not None
    for number, (name, matrix) in enumerate(zip(MATRICES, (expert.gate_up, expert.down), strict=True)):
        out, width = matrix.shape
        draw = np.random.Generator(np.random.Philox(key=[training.seed, pair[0] << 32 | pair[1] << 1 | number]))
        factor_a = draw.random((training.lora.rank, width), dtype=np.float32)
        yield f"{name}.lora_A", torch.from_numpy((2 * factor_a - 1) * width**-0.5).to(matrix)
        yield f"{name}.lora_B", torch.zeros(out, training.lora.rank).to(matrix)
