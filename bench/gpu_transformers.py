"""transformers on one device: a prefill forward, then decode forwards over its cache, greedily.

As in `transformers_worker.py`, the fastest of its experts implementations is taken for each workload, for prefill and
for decode by themselves; attention is torch's own (sdpa). Nothing is compiled.
"""

import gc
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bench.child import now_s
from bench.errors import BenchError
from bench.random_checkpoint import DEVIATION, ROUTER_DEVIATION
from bench.timing import GenerationClock, Sample, Workload
from bench.transformers_worker import EXPERTS

ATTENTION = "sdpa"
GATHER_LIMIT_BYTES = 4 << 30  # batched_mm copies a whole expert for every (token, expert) pair
TUNING_STEPS = 4
TUNING_PREFILLS = 2  # of which the faster counts: the first allocates
Shape = tuple[int, int]  # sequences, and tokens of each prompt


class GpuTransformers:
    """DeepseekV2ForCausalLM with random weights, made on the device."""

    def __init__(self, raw: Mapping[str, Any], device: str, dtype: torch.dtype, seed: int) -> None:
        from transformers import AutoModelForCausalLM, DeepseekV2Config

        self._device = device
        self._fastest: dict[Shape, tuple[str, str]] = {}  # experts implementations for prefill and decode
        config = DeepseekV2Config.from_dict(dict(raw))
        with torch.device(device):
            self._model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
        self._model.eval()
        generator = torch.Generator(device).manual_seed(seed)
        with torch.no_grad():
            for name, weight in self._model.named_parameters():
                if weight.ndim == 1:  # of a norm
                    weight.fill_(1.0)
                else:
                    deviation = ROUTER_DEVIATION if name.endswith("mlp.gate.weight") else DEVIATION
                    weight.normal_(0.0, deviation, generator=generator)

    @torch.inference_mode()
    def prepare(self, workload: Workload) -> None:
        """Try every experts implementation; raises BenchError when none has the memory."""
        prompts_BT = torch.tensor(workload.prompts, device=self._device)
        prefills_s: dict[str, float] = {}
        for experts in EXPERTS:
            if not self._fits(experts, prompts_BT.numel()):
                continue
            self._use(experts)
            taken_s = self._prefills_s(prompts_BT)
            if taken_s is None:  # what its tensors take is free again
                self._free()
            else:
                prefills_s[experts] = taken_s
        if not prefills_s:
            raise BenchError("the device's memory is too small for every experts implementation")
        prefill = min(prefills_s, key=lambda experts: prefills_s[experts])
        self._use(prefill)
        tokens_B1, cache = self._forward(prompts_BT, None)
        steps_s: dict[str, float] = {}
        for experts in EXPERTS:
            if not self._fits(experts, workload.batch):
                continue
            self._use(experts)
            tokens_B1, cache = self._forward(tokens_B1, cache)  # its first step allocates
            taken: list[float] = []
            for _ in range(TUNING_STEPS):
                started_s = now_s()
                tokens_B1, cache = self._forward(tokens_B1, cache)
                taken.append(now_s() - started_s)
            steps_s[experts] = min(taken)
        self._fastest[_shape(workload)] = (prefill, min(steps_s, key=lambda experts: steps_s[experts]))

    @torch.inference_mode()
    def measure(self, workload: Workload) -> Sample:
        """Of a workload for whose shape `prepare` was called."""
        prefill, decode = self._fastest[_shape(workload)]
        self._use(prefill)
        self._synchronise()
        clock = GenerationClock(workload, now_s())
        tokens_B1, cache = self._forward(torch.tensor(workload.prompts, device=self._device), None)
        first_s = now_s()
        _arrived(clock, tokens_B1, first_s)
        self._use(decode)
        switching_s = now_s() - first_s  # which no user of one implementation would wait for
        for _ in range(workload.decode_tokens):
            tokens_B1, cache = self._forward(tokens_B1, cache)
            _arrived(clock, tokens_B1, now_s() - switching_s)
        return clock.sample()

    def how(self, workload: Workload) -> str | None:
        return "{} experts for prefill, {} for decode".format(*self._fastest[_shape(workload)])

    def _prefills_s(self, prompts_BT: Tensor) -> float | None:
        """Seconds of the faster one; None when the memory is too small."""
        fastest_s = float("inf")
        try:
            for _ in range(TUNING_PREFILLS):
                started_s = now_s()
                self._forward(prompts_BT, None)
                fastest_s = min(fastest_s, now_s() - started_s)
        except torch.OutOfMemoryError:
            return None
        return fastest_s

    def _forward(self, tokens_BT: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """The next token of each sequence, [B, 1], and the cache; the device has computed it all."""
        output = self._model(tokens_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens_B1 = output.logits[:, -1:].argmax(-1)
        self._synchronise()
        return tokens_B1, output.past_key_values

    def _fits(self, experts: str, tokens: int) -> bool:
        config = self._model.config
        expert_bytes = self._model.dtype.itemsize * 3 * config.hidden_size * config.moe_intermediate_size
        return experts != "batched_mm" or tokens * config.num_experts_per_tok * expert_bytes <= GATHER_LIMIT_BYTES

    def _use(self, experts: str) -> None:
        if self._model.config._experts_implementation != experts:
            self._model.set_experts_implementation(experts)

    def _synchronise(self) -> None:
        if torch.device(self._device).type == "cuda":
            torch.cuda.synchronize()

    def _free(self) -> None:
        gc.collect()
        if torch.device(self._device).type == "cuda":
            torch.cuda.empty_cache()


def _shape(workload: Workload) -> Shape:
    return workload.batch, len(workload.prompts[0])


def _arrived(clock: GenerationClock, tokens_B1: Tensor, at_s: float) -> None:
    for place, row in enumerate(tokens_B1.tolist()):
        clock.add(place, row, at_s)
