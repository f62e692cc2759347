"""transformers in a process of its own: a prefill forward, then decode forwards over its cache, greedily.

`tune` tries every attention and experts implementation that transformers has for this model and keeps the fastest
for each batch size, for prefill and for decode by themselves: more than its own `generate` would choose.
"""

import itertools
import sys
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from bench.child import answer_commands, now_s
from bench.timing import GenerationClock, Sample, Workload

ATTENTION = ("eager", "sdpa")
EXPERTS = ("eager", "grouped_mm", "batched_mm")
TUNING_STEPS = 4
TUNING_PREFILLS = 2  # of which the faster counts: the first allocates
GATHER_LIMIT_BYTES = 1 << 30  # batched_mm copies a whole expert for every (token, expert) pair


@dataclass(frozen=True, slots=True)
class Implementation:
    """Names as transformers has them."""

    attention: str = "sdpa"
    experts: str = "eager"


@dataclass(frozen=True, slots=True)
class Tuned:
    """The fastest implementations at one batch size, and the seconds they took."""

    batch: int
    prefill: Implementation
    decode: Implementation
    prefill_s: float
    decode_step_s: float


class Transformers:
    """DeepseekV2ForCausalLM in fp32."""

    def __init__(self, checkpoint: str, threads: int) -> None:
        from transformers import DeepseekV2ForCausalLM

        torch.set_num_threads(threads)
        self._model: Any = DeepseekV2ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self._tuned: dict[int, Tuned] = {}

    def tune(self, workloads: list[Workload]) -> list[Tuned]:
        self.measure(workloads[0])
        for workload in workloads:
            self._tuned[workload.batch] = self._fastest(workload)
        return list(self._tuned.values())

    def use(self, tuned: list[Tuned]) -> list[Tuned]:
        """Take over what another process found."""
        self._tuned = {choice.batch: choice for choice in tuned}
        return tuned

    @torch.inference_mode()
    def measure(self, workload: Workload) -> Sample:
        tuned = self._tuned.get(workload.batch)
        self._use(tuned.prefill if tuned else Implementation())
        clock = GenerationClock(workload, now_s())
        tokens_B1, cache = self._forward(torch.tensor(workload.prompts), None)
        first_s = now_s()
        self._arrived(clock, tokens_B1, first_s)
        self._use(tuned.decode if tuned else Implementation())
        switching_s = now_s() - first_s  # which no user of one implementation would wait for
        for _ in range(workload.decode_tokens):
            tokens_B1, cache = self._forward(tokens_B1, cache)
            self._arrived(clock, tokens_B1, now_s() - switching_s)
        return clock.sample()

    def _forward(self, tokens_BT: Tensor, cache: Any) -> tuple[Tensor, Any]:
        output = self._model(tokens_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1:].argmax(-1), output.past_key_values

    def _arrived(self, clock: GenerationClock, tokens_B1: Tensor, at_s: float) -> None:
        for place, row in enumerate(tokens_B1.tolist()):
            clock.add(place, row, at_s)

    @torch.inference_mode()
    def _fastest(self, workload: Workload) -> Tuned:
        prompts_BT = torch.tensor(workload.prompts)
        prefills: dict[Implementation, float] = {}
        decodes: dict[Implementation, float] = {}
        for attention, experts in itertools.product(ATTENTION, EXPERTS):
            implementation = Implementation(attention, experts)
            if not self._fits(experts, prompts_BT.numel()):
                continue
            self._use(implementation)
            forwards: list[float] = []
            for _ in range(TUNING_PREFILLS):
                started_s = now_s()
                self._forward(prompts_BT, None)
                forwards.append(now_s() - started_s)
            prefills[implementation] = min(forwards)
        best = min(prefills, key=lambda implementation: prefills[implementation])
        self._use(best)
        tokens_B1, cache = self._forward(prompts_BT, None)
        for attention, experts in itertools.product(ATTENTION, EXPERTS):
            implementation = Implementation(attention, experts)
            if not self._fits(experts, workload.batch):
                continue
            self._use(implementation)
            tokens_B1, cache = self._forward(tokens_B1, cache)  # its first step allocates
            steps: list[float] = []
            for _ in range(TUNING_STEPS):
                started_s = now_s()
                tokens_B1, cache = self._forward(tokens_B1, cache)
                steps.append(now_s() - started_s)
            decodes[implementation] = min(steps)
        fastest = min(decodes, key=lambda implementation: decodes[implementation])
        return Tuned(workload.batch, best, fastest, prefills[best], decodes[fastest])

    def _fits(self, experts: str, tokens: int) -> bool:
        config = self._model.config
        expert_bytes = 4 * 3 * config.hidden_size * config.moe_intermediate_size
        return experts != "batched_mm" or tokens * config.num_experts_per_tok * expert_bytes <= GATHER_LIMIT_BYTES

    def _use(self, implementation: Implementation) -> None:
        if self._model.config._attn_implementation != implementation.attention:
            self._model.set_attn_implementation(implementation.attention)
        if self._model.config._experts_implementation != implementation.experts:
            self._model.set_experts_implementation(implementation.experts)


def main() -> None:
    """`python -m bench.transformers_worker DIR THREADS`."""
    model = Transformers(sys.argv[1], int(sys.argv[2]))
    workload, workloads, choices = TypeAdapter(Workload), TypeAdapter(list[Workload]), TypeAdapter(list[Tuned])
    answer_commands(
        {
            "measure": lambda raw: TypeAdapter(Sample).dump_json(model.measure(workload.validate_json(raw))),
            "tune": lambda raw: choices.dump_json(model.tune(workloads.validate_json(raw))),
            "use": lambda raw: choices.dump_json(model.use(choices.validate_json(raw))),
        }
    )


if __name__ == "__main__":
    main()
